"""torch.compile for the transformer blocks, over rows of one size: each block is compiled once and used for every row.

A block is compiled between its inputs and the attention, and from there to its outputs: attention reads the layout of
the row, which changes with every row, and stays outside. Rows of another size (an evaluation's, a last one that is not
full) go through the block as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from utils.distributed.ranks import print_rank_0
from utils.errors import UserError
from utils.module.attention import keep_attention_uncompiled
from utils.module.router_loss import router_of

Shape = tuple[int, int]  # rows, tokens of a row


def compile_blocks(model: nn.Module, shape: Shape | None) -> int:
    """Compile the model's blocks for training batches of `shape`; return how many, and print it.

    Args:
        model: the bare model, on its device and with the attention that it trains with.
        shape: [rows, tokens] of every full training batch; None where they have no fixed size: nothing is compiled.

    Raises:
        UserError: the model has experts, whose share of tokens changes from row to row, or no blocks; or this machine
            has no compiler that torch can use.
    """
    if shape is None:
        print_rank_0("Compiled: nothing, since batches have no fixed size in this layout")
        return 0
    blocks = blocks_of(model)
    if router_of(model) is not None or not blocks:
        why = "it has no transformer blocks that are known as such" if not blocks else "it routes tokens to experts"
        raise UserError(f"--torch_compile can't be used with model type {model.config.model_type!r}: {why}.")
    _check_compiler(next(model.parameters()).device)
    keep_attention_uncompiled()
    for block in blocks:
        block.forward = _for_shape(block, shape)
    print_rank_0(
        f"Compiled: {len(blocks)} blocks ({type(blocks[0]).__name__}), for training batches of {shape[0]} x {shape[1]} "
        "tokens; the first step waits for the compiler"
    )
    return len(blocks)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the transformer blocks: the layers that transformers can checkpoint."""
    from transformers.modeling_layers import GradientCheckpointingLayer  # brings torch's compiler, seconds

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _for_shape(block: nn.Module, shape: Shape) -> Callable[..., Any]:
    """Return a forward of the block that is compiled for training on hidden states of `shape`."""
    plain = block.forward
    compiled = torch.compile(plain, dynamic=False)

    def forward(hidden_states: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        call = compiled if block.training and tuple(hidden_states.shape[:2]) == shape else plain
        return call(hidden_states, *arguments, **named)

    return forward


def _check_compiler(device: torch.device) -> None:
    """Compile a sum; UserError where that fails, with the reason."""
    try:
        torch.compile(lambda one: one.sin() + 1)(torch.zeros(8, device=device))
    except Exception as err:  # whatever the compiler's backends raise
        reason = " ".join(str(err).split())[:300]
        raise UserError(f"--torch_compile: torch can't compile on this machine ({reason}). Leave it out.") from err
