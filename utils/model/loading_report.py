"""Judge what loading a model's weights found: missing ones, ones without a place, other shapes."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch
import transformers

from utils.errors import UserError

SHOWN = 3
# What stands on a language model for another task: a reward or value head (TRL, DeepSpeed-Chat), transformers'
# classification of texts and tokens.
HEADS = ("v_head", "value_head", "reward_head", "score", "classifier")
LORA_HALVES = ("lora_right_weight", "lora_left_weight")


class Report(NamedTuple):
    """What transformers found while loading."""

    missing: list[str]  # weights of the model that no file holds
    unexpected: list[str]  # weights in the files that the model has no place for
    mismatched: list[tuple[str, list[int], list[int]]]  # name, shape in the files, shape in the model

    @classmethod
    def of(cls, info: dict[str, Any]) -> Report:
        """Read the dictionary of `from_pretrained(..., output_loading_info=True)`."""
        mismatched = sorted((key, list(stored), list(own)) for key, stored, own in info["mismatched_keys"])
        return cls(sorted(info["missing_keys"]), sorted(info["unexpected_keys"]), mismatched)


def check_report(
    name: str,
    model: transformers.PreTrainedModel,
    report: Report,
    stored: dict[str, torch.Tensor] | None = None,
) -> list[str]:
    """Accept what can't change the model, and refuse everything else; return lines on what is left out.

    Args:
        name: folder or hub name, for the message.
        stored: the weights in the files, without memory; None where only names are known.

    Raises:
        UserError: weights are missing, have no place in the model, or have other shapes.
    """
    left_out = [key for key in report.unexpected if _is_buffer(key, model, (stored or {}).get(key))]
    heads = [key for key in report.unexpected if key.split(".")[0] in HEADS]
    unexpected = [key for key in report.unexpected if key not in {*left_out, *heads}]
    if not (report.missing or unexpected or report.mismatched):
        lines = []
        if left_out:
            lines.append(f"Checkpoint: {len(left_out)} stored buffers are not read, the model computes them: "
                         f"{_first(left_out)}")  # fmt: skip
        if heads:
            lines.append(f"Checkpoint: the head of another task is left out: {_first(heads)}")
        return lines
    total = len(model.state_dict())
    found = []
    if report.missing:
        found.append(f"{len(report.missing)} of the model's {total} weights are missing ({_first(report.missing)})")
    if unexpected:
        found.append(f"{len(unexpected)} weights have no place in the model ({_first(unexpected)})")
    if report.mismatched:
        shapes = [f"{key} is {ours} in the files and {own} in the model" for key, ours, own in report.mismatched]
        found.append(f"{len(shapes)} have other shapes than config.json says ({_first(shapes)})")
    raise UserError(
        f"the checkpoint {name} does not fit {type(model).__name__}, and would train from random weights in part: "
        f"{'; '.join(found)}. {_advice(name, report.missing, unexpected)}"
    )


def _advice(name: str, missing: list[str], unexpected: list[str]) -> str:
    if any(key.endswith(LORA_HALVES) for key in unexpected):
        return (
            "It was saved with LoRA that is not merged, as a DeepSpeed-Chat run can leave it: "
            f"`python -m tools.merge_lora {name} MERGED_FOLDER` merges it."
        )
    prefix = _prefix(missing, unexpected)
    if prefix:
        return (
            f"Its names begin with {prefix!r}, that of a wrapper (torch.compile, DataParallel and others): save the "
            "model inside the wrapper, or take the prefix off the names."
        )
    return "Is config.json the one of these weights, and is every file of them there?"


def _prefix(missing: list[str], unexpected: list[str]) -> str:
    """Return what stands before the model's own names in most of the names that have no place; "" for nothing."""
    own = set(missing)
    found = Counter()
    for key in unexpected:
        parts = key.split(".")
        cut = next((i for i in range(1, len(parts)) if ".".join(parts[i:]) in own), None)
        if cut is not None:
            found[".".join(parts[:cut]) + "."] += 1
    prefix, count = found.most_common(1)[0] if found else ("", 0)
    return prefix if 2 * count > len(unexpected) else ""


def _is_buffer(key: str, model: transformers.PreTrainedModel, stored: torch.Tensor | None) -> bool:
    """Whether a stored tensor is one that models compute: a causal mask, rotary frequencies, numbers of positions.

    Older versions of transformers stored them with the weights.
    """
    if any(key == own or key.endswith("." + own) or own.endswith("." + key) for own, _ in model.named_buffers()):
        return True
    leaf = key.rpartition(".")[2]
    if leaf in ("inv_freq", "masked_bias", "position_ids", "causal_mask"):
        return True
    is_mask = stored is not None and stored.dim() == 4 and stored.shape[:2] == (1, 1)
    return leaf == "bias" and is_mask and stored.shape[2] == stored.shape[3]


def _first(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
