"""Tiled MLPs (`--tiled_mlp`): the blocks' MLPs computed piece by piece, so only a piece's wide activations are held.

DeepSpeed's `TiledMLP` (Bekman et al. 2025, https://arxiv.org/abs/2506.13996) computes each piece again in the backward
and tells ZeRO that a weight's gradient is complete with the last piece.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP
from deepspeed.utils import set_z3_leaf_module
from torch import nn
from transformers import PretrainedConfig

from utils.errors import UserError
from utils.module.empty_model import empty_model
from utils.module.lora_names import find_blocks

NAMES = ("mlp", "feed_forward")  # of a block's MLP, in transformers' families


def tile_mlps(model: nn.Module) -> str:
    """Make every block's MLP compute pieces of at most as many tokens as the model is wide; return what was tiled.

    Call this before LoRA wraps layers: blocks are found by the layers it could wrap.

    Raises:
        UserError: a block has no MLP that can be tiled.
    """
    mlps = find_mlps(model)
    width = model.config.get_text_config().hidden_size
    for mlp in mlps:
        mlp.forward = partial(_tiled, type(mlp).forward, mlp, width)
        # ZeRO 3 gathers a leaf's weights once for all pieces, so ranks may have different numbers of pieces. Gathering
        # for each piece, they would wait for each other for ever.
        set_z3_leaf_module(mlp, True)
    return f"{len(mlps)} {type(mlps[0]).__name__} in pieces of {width} tokens"


def _tiled(forward: Any, mlp: nn.Module, width: int, hidden: torch.Tensor) -> torch.Tensor:
    """Return `forward(mlp, hidden)` computed in pieces of the row; hidden: [batch, tokens, width of the model]."""
    tokens = hidden.shape[-2]
    if tokens <= width:
        return forward(mlp, hidden)
    # Exactly the number of pieces `torch.chunk` makes: DeepSpeed counts them to find the last one.
    pieces = -(-tokens // -(-tokens // -(-tokens // width)))
    if torch.is_grad_enabled() and not hidden.requires_grad:
        hidden = hidden.detach().requires_grad_()  # otherwise the weights get no gradient
    weights = [parameter for parameter in mlp.parameters() if parameter.requires_grad]
    return TiledMLP.apply(forward, mlp, hidden, pieces, weights)


def find_mlps(model: nn.Module) -> list[nn.Module]:
    """Return the MLP of each block.

    Raises:
        UserError: a block has no module for its MLP, or the tokens of an MLP can't be computed independently.
    """
    prefix = find_blocks(model)
    blocks = [] if prefix is None else list(model.get_submodule(prefix.rstrip(".")))
    found = [next((getattr(block, name) for name in NAMES if hasattr(block, name)), None) for block in blocks]
    why = None
    if not found or None in found:
        why = "its blocks have no MLP as a module of their own"
    elif any(_has_experts(mlp) for mlp in found):
        why = "its MLPs are mixtures of experts, which already take tokens in groups"
    elif any(len(_required_inputs(mlp)) != 1 for mlp in found):
        why = f"its MLPs take {', '.join(_required_inputs(found[0]))}, not the hidden states alone"
    elif any(isinstance(part, nn.Dropout) and part.p > 0 for mlp in found for part in mlp.modules()):
        why = "there is dropout within its MLPs, and the second computation would draw another: --disable_dropout"
    if why is not None:
        raise UserError(f"--tiled_mlp can't be used with model type {model.config.model_type!r}: {why}.")
    return found


def _has_experts(mlp: nn.Module) -> bool:
    return any(part.endswith(("experts", "router")) for name, _ in mlp.named_modules() for part in name.split("."))


def _required_inputs(mlp: nn.Module) -> list[str]:
    parameters = inspect.signature(type(mlp).forward).parameters.values()
    return [one.name for one in parameters if one.default is one.empty and one.name != "self"]


def check_tiled_mlp(config: PretrainedConfig) -> None:
    """Check without its weights that `tile_mlps` accepts the model; the caller has set the dropout of `config`.

    Raises:
        UserError: `tile_mlps` would refuse the model.
    """
    find_mlps(empty_model(config))
