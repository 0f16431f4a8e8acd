"""The tensors of a saved model under the names that its family is published with.

transformers renames weights, and joins some (all experts of a layer in one), while it loads a checkpoint, and undoes
that in `save_pretrained`. A folder for other loaders must have the published names too, so the same reversal is planned
here on tensors without memory, in groups that can be gathered and converted one after the other.
"""

import re
from typing import NamedTuple

import torch

from utils.distributed.zero3 import whole_numel, whole_shape
from utils.errors import UserError
from utils.module.lora import LinearLayer_LoRA
from utils.module.quantized import plain_dtype


class SavedTensor(NamedTuple):
    """One tensor of the live model, as a plain copy of the model has it."""

    name: str
    source: torch.Tensor
    lora: LinearLayer_LoRA | None  # merged into it
    size: int  # bytes


class PublishedTensor(NamedTuple):
    """One tensor of the saved model."""

    name: str
    shape: tuple[int, ...]
    size: int  # bytes


class Group(NamedTuple):
    """Live tensors that become published ones together; most are alone and only get another name."""

    sources: list[SavedTensor]
    published: list[PublishedTensor]
    is_renamed_only: bool


def saved_tensors(model: torch.nn.Module) -> list[SavedTensor]:
    """List the tensors a plain copy of `model` has, in order; tied ones once, under the name that is published."""
    lora_modules = {name: module for name, module in model.named_modules() if isinstance(module, LinearLayer_LoRA)}
    names: dict[int, list[str]] = {}
    tensors = {}
    ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
    for name, tensor in model.state_dict(keep_vars=True).items():
        owner, _, leaf = name.rpartition(".")
        if name not in ignored and not (owner in lora_modules and leaf.startswith("lora_")):
            names.setdefault(id(tensor), []).append(name)
            tensors[name] = tensor
    kept = {_kept_name(model, tied) for tied in names.values()}
    saved = []
    for name, tensor in tensors.items():
        if name in kept:
            owner, _, leaf = name.rpartition(".")
            lora = lora_modules.get(owner) if leaf == "weight" else None
            saved.append(SavedTensor(name, tensor, lora, whole_numel(tensor) * plain_dtype(tensor).itemsize))
    return saved


def _kept_name(model: torch.nn.Module, tied: list[str]) -> str:
    """Return the name that a tensor with several keeps: the first that is not a copy in the model's own words."""
    if len(tied) == 1:
        return tied[0]
    copies = [
        f"{prefix}.{pattern}" if prefix else pattern
        for prefix, module in model.named_modules()
        for pattern in getattr(module, "_tied_weights_keys", None) or ()
    ]
    originals = [name for name in tied if not any(re.search(pattern, name) for pattern in copies)]
    return originals[0] if originals else max(tied)


def published_groups(model: torch.nn.Module) -> list[Group]:
    """Plan the saved model: its groups, in order. Needs no weights, and is the same on every rank.

    Raises:
        UserError: transformers' own reversal can't be followed in groups; the model could only be saved wrongly.
    """
    sources = saved_tensors(model)
    empty = {
        entry.name: torch.empty(tuple(whole_shape(entry.source)), dtype=plain_dtype(entry.source), device="meta")
        for entry in sources
    }
    from transformers.core_model_loading import revert_weight_conversion  # slow to import: models need it anyway

    whole = revert_weight_conversion(model, dict(empty))
    renamed = {id(tensor): name for name, tensor in whole.items()}
    rules = _reversed_rules(model)
    groups: dict[str, list[SavedTensor]] = {}
    for entry in sources:
        tensor = empty[entry.name]
        key = entry.name if id(tensor) in renamed else f"converted {_converted_key(rules, entry.name)}"
        groups.setdefault(key, []).append(entry)
    planned = []
    for entries in groups.values():
        alone = renamed.get(id(empty[entries[0].name]))
        if alone is not None:
            outputs = {alone: empty[entries[0].name]}
        else:
            outputs = revert_weight_conversion(model, {entry.name: empty[entry.name] for entry in entries})
        published = [
            PublishedTensor(name, tuple(tensor.shape), tensor.numel() * tensor.element_size())
            for name, tensor in outputs.items()
        ]
        planned.append(Group(entries, published, alone is not None))
    _check_plan(planned, whole)
    return planned


def _check_plan(groups: list[Group], whole: dict[str, torch.Tensor]) -> None:
    """Compare the plan in groups with the reversal of the whole model."""
    planned = [(tensor.name, tensor.shape) for group in groups for tensor in group.published]
    expected = [(name, tuple(tensor.shape)) for name, tensor in whole.items()]
    if sorted(planned) != sorted(expected):
        other = sorted({str(tensor) for tensor in set(planned) ^ set(expected)})
        raise UserError(
            f"the names under which this model is published can't be made part by part ({', '.join(other[:3])}, ...): "
            "this version of transformers converts it in a way that is not known here."
        )


def _reversed_rules(model: torch.nn.Module) -> list:
    """Return transformers' rules that convert weights back, without those that only rename them.

    A version without these rules has none here: all converted tensors are then one group, which is right and needs
    more memory.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    rules = getattr(model, "_weight_conversions", None)
    try:
        if rules is None:
            rules = get_model_conversion_mapping(model, add_legacy=False)
        return [rule.reverse_transform() for rule in rules[::-1] if isinstance(rule, WeightConverter)]
    except (AttributeError, TypeError):
        return []


def _converted_key(rules: list, name: str) -> str:
    """Return what the tensors that are converted together with `name` have in common."""
    for rule in rules:
        key, pattern = rule.rename_source_key(name)
        if pattern is not None:
            return key
    return ""


def convert(model: torch.nn.Module, group: Group, tensors: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the published tensors of a group by name, from its gathered live ones in the order of `sources`."""
    if group.is_renamed_only:
        return {group.published[0].name: tensors[0]}
    from transformers.core_model_loading import revert_weight_conversion

    live = {entry.name: tensor for entry, tensor in zip(group.sources, tensors, strict=True)}
    return {name: tensor.contiguous() for name, tensor in revert_weight_conversion(model, live).items()}
