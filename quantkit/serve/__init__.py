"""Packed models where people use them: conversations, endpoints and other engines."""
