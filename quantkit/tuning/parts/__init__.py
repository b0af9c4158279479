"""Packed weights taken apart for tuning: one storage format a file."""
