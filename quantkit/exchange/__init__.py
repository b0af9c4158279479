"""Packed checkpoints in other programs' forms, and those of other programs packed: exact where both hold the same."""
