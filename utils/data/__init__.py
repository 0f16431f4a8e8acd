"""Data of a run: reading, formats, splits, mixtures, tokenization, batching, cache and streams."""
