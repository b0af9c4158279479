"""Storage formats: one layout of a packed weight a file."""
