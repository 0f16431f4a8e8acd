"""Parts of a model: LoRA, attention, loss, embedding noise, tiled MLPs, sequence parallelism."""
