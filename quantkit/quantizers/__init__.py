"""Quantizers: one algorithm a file, from a dense weight and its layer's statistics to a packed weight."""
