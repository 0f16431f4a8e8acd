"""The data of a run, from files to batches: reading, formats, splits, tokenization, mixing, caching, batching."""
