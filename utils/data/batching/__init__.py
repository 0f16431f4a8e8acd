"""Forms micro batches: order and sampling, packing, collating."""
