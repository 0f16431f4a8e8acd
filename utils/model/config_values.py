"""Read and change values of a model's configuration wherever they stand: sub-configurations, dictionaries, lists.

Families spell the same thing in many ways and nest it differently. What is looked for here is a kind of value by a part
of its name, not a list of families.
"""

import re
from argparse import Namespace
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig

from utils.errors import UserError

# A number of tokens from which attention, a scan or the rotary embedding treats a document in another way.
WINDOW = re.compile(
    r"(?!.*(experts|layers|pattern)).*(window|chunk|local|block_size|stride|top_?k|original_max_position)"
)
# Every dropout: a probability between 0 and 1. Noise on a router's input is drawn in training too.
DROPOUT = re.compile(r"drop", re.IGNORECASE)
# Leaving out whole layers, and noise: only ever switched off, as 0.
OTHER_RANDOMNESS = re.compile(r"layer_?drop|drop_?path|jitter", re.IGNORECASE)
# A longest sequence. BLOOM's and ChatGLM's `seq_length` is none: their positions have no end.
POSITIONS = (
    "max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "max_target_positions",
    "model_max_length",
)  # fmt: skip


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return the part of a configuration that belongs to the language model; the whole where there is no such part."""
    try:
        return config.get_text_config(decoder=True)
    except ValueError:  # it has several
        return config


def values(config: PretrainedConfig) -> Iterator[tuple[Any, str, Any]]:
    """Yield (holder, name, value) for every value of a configuration and of what it holds; see `set_value`."""
    holders, seen = [config], set()
    while holders:
        holder = holders.pop()
        if id(holder) in seen:
            continue
        seen.add(id(holder))
        for name, value in list((holder if isinstance(holder, dict) else vars(holder)).items()):
            yield holder, str(name), value
            inside = value if isinstance(value, (list, tuple)) else [value]
            holders += [item for item in inside if isinstance(item, (dict, PretrainedConfig))]


def set_value(holder: Any, name: str, value: float) -> None:
    """Change a number that `values` has yielded; a whole number stays one where it can.

    A configuration whose own check refuses the value keeps what it has: the modules are set as well.
    """
    before = holder[name] if isinstance(holder, dict) else getattr(holder, name)
    value = type(before)(value) if float(value).is_integer() and before is not None else value
    if isinstance(holder, dict):
        holder[name] = value
        return
    with suppress(StrictDataclassError):
        setattr(holder, name, value)


def set_dropouts(config: PretrainedConfig, dropout: float) -> None:
    """Set every dropout of the configuration; 0 also turns off the dropping of whole layers and a router's noise."""
    for holder, name, value in list(values(config)):
        if value is None and DROPOUT.search(name) and is_probability(getattr(type(holder), name, None)):
            value = 0.0  # null in the file, where the family has a number
        if not is_probability(value):
            continue
        if OTHER_RANDOMNESS.search(name):
            if dropout == 0:
                set_value(holder, name, 0.0)
        elif DROPOUT.search(name):
            set_value(holder, name, dropout)


def is_probability(value: Any) -> bool:
    """Whether a value can be a probability: a number from 0 to 1, not True or False."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


def windows(config: PretrainedConfig) -> list[int]:
    """Return, in rising order, the numbers of tokens at which the model may treat a document in another way."""
    found = {
        value
        for _, name, value in values(text_config(config))
        if isinstance(value, int) and not isinstance(value, bool) and value > 0 and WINDOW.match(name)
    }
    return sorted(found)


def max_positions(config: PretrainedConfig) -> int | None:
    """Return the longest sequence the model has positions for; None where there is no limit (BLOOM)."""
    own = text_config(config)
    found = (getattr(own, name, None) for name in POSITIONS)  # not `vars`: families rename these
    return next((value for value in found if isinstance(value, int) and value > 0), None)


def check_length(max_seq_len: int, config: PretrainedConfig) -> None:
    """Check that the longest sample has positions; UserError where it has not."""
    limit = max_positions(config)
    if limit is not None and max_seq_len > limit:
        raise UserError(f"--max_seq_len {max_seq_len} is more than the model's {limit} positions: use {limit} or less.")


def rope_switch(config: PretrainedConfig) -> int | None:
    """Return the length above which the rotary embedding of a whole forward changes (Phi-3's long rope), or None."""
    own = text_config(config)
    limits = []
    for holder, name, value in values(own):
        if name in ("rope_type", "type") and value == "longrope":
            limit = holder.get("original_max_position_embeddings") if isinstance(holder, dict) else None
            limits.append(limit or getattr(own, "original_max_position_embeddings", None))
    return min((limit for limit in limits if isinstance(limit, int)), default=None)


def check_rope(config: PretrainedConfig, args: Namespace) -> None:
    """Check that no sample is computed in another way because of one it shares a forward with.

    Raises:
        UserError: samples may be longer than the length at which the rotary embedding of a forward changes.
    """
    switch = rope_switch(config)
    alone = args.padding == "longest" and args.per_device_train_batch_size == args.per_device_eval_batch_size == 1
    if switch is not None and args.max_seq_len > switch and not alone:
        raise UserError(
            f"--max_seq_len {args.max_seq_len}: above {switch} tokens the rotary embedding of model type "
            f"{config.model_type!r} (long rope) changes for a whole forward, short samples in it included. Use "
            f"{switch} or less, or --padding longest with both batch sizes 1, so that each sample has its own forward."
        )
