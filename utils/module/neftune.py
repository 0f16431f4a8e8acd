"""NEFTune (Jain et al. 2023, https://arxiv.org/abs/2310.05914): uniform noise on the embeddings while training."""

import torch
from torch import nn

from utils.distributed.ranks import print_rank_0
from utils.module.attention import Documents


def add_embedding_noise(model: nn.Module, alpha: float | None) -> None:
    """Hook the input embeddings so that in training mode their output gets uniform noise.

    Its magnitude is alpha / sqrt(length * width): the length is that of the token's document where a row holds several
    documents, and that of the padded row otherwise; the width is the embeddings'. Without an alpha there is no hook.
    """
    if not alpha:
        return

    def noisy(module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return output
        lengths = Documents.lengths or [output.shape[1]]
        lengths = torch.tensor(lengths, dtype=torch.float32)
        start = Documents.part[0] * output.shape[1]  # this rank may have only a part of the row
        per_token = lengths.repeat_interleave(lengths.long())[start : start + output.shape[1]]
        # Asynchronous: a plain copy would make the host wait for all queued work of the GPU.
        per_token = per_token.to(output.device, non_blocking=True)[None, :, None]
        magnitude = alpha / (per_token * output.shape[-1]).sqrt()
        return output + (torch.rand_like(output, dtype=torch.float32) * 2 - 1).mul_(magnitude).to(output.dtype)

    model.get_input_embeddings().register_forward_hook(noisy)
    print_rank_0(f"NEFTune: noise with alpha {alpha} on the embeddings while training")
