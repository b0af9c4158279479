"""A KV cache in 2 to 4 true bits: codec, storage, transformers' cache interface, attention on packed data."""
