"""PV-Tuning of packed models, block by block and end to end, and of their low-rank corrections."""
