"""The forms in which other programs store quantized weights, a file for those that are alike; see `io.stored_forms`."""
