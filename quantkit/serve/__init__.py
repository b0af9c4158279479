"""Packed models where people use them: conversations, endpoints, and engines of their own, a folder each."""
