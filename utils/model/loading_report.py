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
PEFT_PARTS = (".lora_A.", ".lora_B.", ".base_layer.", ".modules_to_save.")
# What GPTQ, AWQ, bitsandbytes, compressed-tensors and fp8 checkpoints have beside or in place of a weight.
QUANTIZED = (
    ".qweight", ".qzeros", ".scales", ".absmax", ".quant_map", ".SCB", ".weight_scale", ".weight_scale_inv",
    ".weight_packed",
)  # fmt: skip


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
        f"{'; '.join(found)}. {_advice(model, name, report.missing, unexpected)}"
    )


def _advice(model: transformers.PreTrainedModel, name: str, missing: list[str], unexpected: list[str]) -> str:
    if any(key.endswith(LORA_HALVES) for key in unexpected):
        return (
            "It was saved with LoRA that is not merged, as a DeepSpeed-Chat run can leave it: "
            f"`python -m tools.merge_lora {name} MERGED_FOLDER` merges it."
        )
    if any(key.startswith("rwtransformer.") for key in unexpected):
        return "It is a reward model, of step 2 of DeepSpeed-Chat: give the model that step began with."
    if any(part in key for key in unexpected for part in PEFT_PARTS):
        return "It was saved with a PEFT adapter that is not merged: save what merge_and_unload() returns."
    if any(key.endswith(QUANTIZED) for key in unexpected):
        return "Its weights are quantized, and only whole weights can be trained: give the model they were made from."
    wrapper, is_prefix = _wrapper(missing, unexpected)
    if wrapper:
        whose = "a wrapper (torch.compile, DataParallel and others)"
        what = (
            f"Its names begin with {wrapper!r}, that of {whose}"
            if is_prefix
            else (f"Its names have {wrapper!r} in them, that of {whose}")
        )
        return f"{what}: save the model inside the wrapper, or take the prefix off the names."
    head = model.get_output_embeddings()
    if head is not None and not unexpected and _names_of(model, head) >= set(missing):
        return (
            "What is missing is the head alone: these files are of a model without one, for embeddings or "
            "classification, say. Where the head is the input embedding, config.json says tie_word_embeddings true."
        )
    return "Is config.json the one of these weights, and is every file of them there?"


def _names_of(model: transformers.PreTrainedModel, part: torch.nn.Module) -> set[str]:
    """Return the names of the weights of one module of a model."""
    own = {id(parameter) for parameter in part.parameters()}
    return {key for key, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) in own}


def _wrapper(missing: list[str], unexpected: list[str]) -> tuple[str, bool]:
    """Return what stands in most of the names that have no place and not in the model's own, and whether in front."""
    own = set(missing)
    found = Counter()
    for key in unexpected:
        parts = key.split(".")
        cuts = ((i, j) for i in range(len(parts)) for j in range(i + 1, len(parts)))
        cut = next((cut for cut in cuts if ".".join(parts[: cut[0]] + parts[cut[1] :]) in own), None)
        if cut is not None:
            found[".".join(parts[cut[0] : cut[1]]) + ".", cut[0] == 0] += 1
    (wrapper, is_prefix), count = found.most_common(1)[0] if found else (("", False), 0)
    return (wrapper, is_prefix) if 2 * count > len(unexpected) else ("", False)


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
