"""The load balancing of mixtures of experts: the router's auxiliary loss, and how many tokens each expert got.

The loss is that of Switch Transformers (Fedus et al. 2021, https://arxiv.org/abs/2101.03961, equations 4 to 6), over
the tokens of all layers together, as transformers computes it: the number of experts times the sum over experts of
(share of tokens sent to it) x (mean probability the router gave it). It is the number of experts per token where all
experts get the same.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any, NamedTuple

import torch
import transformers

from utils.distributed.ranks import print_rank_0

ROUTER_LOGITS = "router_logits"
USUAL = ["gate_logits", "num_experts", "top_k", "attention_mask"]  # of transformers' load_balancing_loss_func


class Router(NamedTuple):
    """How a model's routers work."""

    experts: int
    experts_per_token: int
    coefficient: float  # of the auxiliary loss in the training loss; 0 where the configuration does not ask for it


def router_of(model: transformers.PreTrainedModel) -> Router | None:
    """Return how the model's routers work; None for a model without, or whose routers are not measured in this way.

    The auxiliary loss counts where the configuration says `output_router_logits`, as in transformers. Numbers are those
    that transformers' own class of the model computes with, else its configuration's.
    """
    config = model.config.get_text_config()
    recorded = ROUTER_LOGITS in (getattr(model.base_model, "_can_record_outputs", None) or {})
    if not recorded or not _is_usual(model):
        return None
    experts = _first((model, config), ("num_experts", "num_local_experts"))
    per_token = _first((model, config), ("num_experts_per_tok",))
    if not experts or not per_token:
        return None
    coefficient = _first((model, config), ("router_aux_loss_coef", "aux_loss_coef")) or 0.0
    return Router(int(experts), int(per_token), float(coefficient) if _is_asked_for(model) else 0.0)


def _first(places: tuple[Any, ...], names: tuple[str, ...]) -> Any:
    """Return the first of the attributes that one of the places has; None where none has."""
    found = (getattr(place, name, None) for place in places for name in names)
    return next((value for value in found if value is not None), None)


def _is_usual(model: transformers.PreTrainedModel) -> bool:
    """Whether the family's own auxiliary loss, if it has one, is that of `balance`: Doge's has two routers' halves."""
    own = getattr(sys.modules.get(type(model).__module__), "load_balancing_loss_func", None)
    return own is None or list(inspect.signature(own).parameters) == USUAL


def _is_asked_for(model: transformers.PreTrainedModel) -> bool:
    return bool(getattr(model.config.get_text_config(), "output_router_logits", False))


def describe_routers(model: transformers.PreTrainedModel) -> None:
    """Print whether the routers' auxiliary loss counts; nothing for a model without routers."""
    router = router_of(model)
    if router is None:
        if _is_asked_for(model):
            print_rank_0(
                "Experts: the model's configuration asks for the routers' auxiliary loss (output_router_logits), which "
                f"does NOT count here: that of {model.config.model_type} is none of the usual kind"
            )
        return
    if router.coefficient:
        print_rank_0(
            f"Experts: {router.experts_per_token} of {router.experts} for each token; the routers' auxiliary loss "
            f"counts {router.coefficient:g} times, as the model's configuration asks (output_router_logits)"
        )
    else:
        print_rank_0(
            f"Experts: {router.experts_per_token} of {router.experts} for each token; the routers' auxiliary loss does "
            "not count, since the model's configuration does not ask for it (output_router_logits)"
        )


def balance(
    router: Router, logits: tuple[torch.Tensor, ...], attention_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the auxiliary loss, before its coefficient, and the tokens of each expert; nothing waits for the device.

    Args:
        logits: of each layer with experts, [tokens, experts]; one more where a token may skip the experts (Zaya).
        attention_mask: [batch, length], 0 at padding, which does not count; None: every token counts.

    Returns:
        A float32 scalar with a gradient, and [layers, experts] in float32 without.
    """
    counts, shares, tokens, choices = [], [], 0, logits[0].shape[-1]
    for layer in logits:
        chances = layer.reshape(-1, layer.shape[-1]).float().softmax(-1)
        weights = chances.new_ones(len(chances)) if attention_mask is None else attention_mask.reshape(-1).to(chances)
        chosen = chances.detach().topk(router.experts_per_token).indices
        each = weights[:, None].expand_as(chosen).reshape(-1)
        counts.append(chances.new_zeros(choices).scatter_add_(0, chosen.reshape(-1), each))
        shares.append((chances * weights[:, None]).sum(0))
        tokens = tokens + weights.sum()
    by_layer = torch.stack(counts)
    loss = choices * (by_layer.sum(0) / tokens * (torch.stack(shares).sum(0) / tokens)).sum()
    return loss, by_layer


def router_logits_of(outputs: Any) -> tuple[torch.Tensor, ...]:
    """Return the router logits of a model's output; () where it has none."""
    return tuple(layer for layer in (getattr(outputs, ROUTER_LOGITS, None) or ()) if layer is not None)
