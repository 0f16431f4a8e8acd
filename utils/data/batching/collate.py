"""Collates samples of different lengths into one batch of tensors; masks come from lengths, never from ids."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

IGNORE_INDEX = -100  # the label of a token that no loss counts

Sample = dict[str, torch.Tensor]


def collate_free(samples: Sequence[Sample]) -> dict[str, Any]:
    """Lay all samples end to end in one row, without padding.

    Args:
        samples: each with `input_ids` and `labels`, both [length].

    Returns:
        input_ids, position_ids (from 0 in each sample), labels: [1, tokens] int64; a sample's first token is
            labelled -100, since the token before it belongs to another sample;
        document_lengths: tokens of each sample; cu_seqlens: [samples + 1] int32, their running sums from 0;
        positions, targets: see `label_positions`.
    """
    lengths = [len(sample["input_ids"]) for sample in samples]
    labels = torch.cat([sample["labels"] for sample in samples])
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    labels[cu_seqlens[:-1].long()] = IGNORE_INDEX
    batch = {
        "input_ids": torch.cat([sample["input_ids"] for sample in samples])[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "labels": labels[None],
        "document_lengths": lengths,
        "cu_seqlens": cu_seqlens,
    }
    return {**batch, **label_positions(batch["labels"])}


def collate_slice(samples: Sequence[Sample], part: tuple[int, int]) -> dict[str, Any]:
    """Return part k of N (`part` = (k, N)) of the row `collate_free` makes, for one rank of a sequence parallel group.

    The row is filled up to a multiple of N with one more document, whose tokens carry no label.

    Returns:
        input_ids, position_ids, labels: [1, tokens / N]; document_lengths and cu_seqlens of the whole row, since
            attention covers the whole row; positions, targets: of the labels predicted in this part. A label that is
            the next part's first token is predicted here: labels were shifted before the row was divided.
    """
    batch = collate_free(samples)
    index, parts = part
    tokens = batch["input_ids"].shape[1]
    width = -(-tokens // parts)
    batch, start = _filled(batch, width * parts), index * width
    for name in ("input_ids", "position_ids", "labels"):
        batch[name] = batch[name][:, start : start + width]
    mine = (batch["positions"] >= start) & (batch["positions"] < start + width)
    labels = {"positions": batch["positions"][mine] - start, "targets": batch["targets"][mine]}
    return {**batch, **labels, "part": part}


def collate_filled(samples: Sequence[Sample], tokens: int) -> dict[str, Any]:
    """Return the row `collate_free` makes, filled up to so many tokens with one more document without labels."""
    return _filled(collate_free(samples), tokens)


def _filled(batch: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Fill a row up to so many tokens; its last document then has no label and the positions of a first token."""
    padding = tokens - batch["input_ids"].shape[1]
    if padding <= 0:
        return batch
    fill = {"input_ids": 0, "position_ids": 0, "labels": IGNORE_INDEX}
    return {
        **batch,
        **{name: F.pad(batch[name], (0, padding), value=value) for name, value in fill.items()},
        "document_lengths": [*batch["document_lengths"], padding],
        "cu_seqlens": F.pad(batch["cu_seqlens"], (0, 1), value=tokens),
    }


def collate_padded(samples: Sequence[Sample], pad_token_id: int, pad_to: int | None = None) -> dict[str, torch.Tensor]:
    """Pad the samples on the right, to the longest of them or to `pad_to`.

    Args:
        samples: each with `input_ids` and `labels`, both [length].

    Returns:
        input_ids, attention_mask, labels: [batch, width] int64, padding labelled -100;
        positions, targets: see `label_positions`.
    """
    lengths = [len(sample["input_ids"]) for sample in samples]
    width = max(max(lengths), pad_to or 0)
    input_ids = torch.full((len(samples), width), pad_token_id, dtype=torch.long)
    labels = torch.full((len(samples), width), IGNORE_INDEX, dtype=torch.long)
    attention_mask = torch.zeros((len(samples), width), dtype=torch.long)
    for row, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
        input_ids[row, :length] = sample["input_ids"]
        labels[row, :length] = sample["labels"]
        attention_mask[row, :length] = 1
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    return {**batch, **label_positions(labels)}


def label_positions(labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Find the positions whose logits predict a label: the token before it in the same row (the shift).

    Computed here, on the CPU, so that selecting these rows of the logits never synchronizes the device.

    Returns:
        positions: [label tokens] indexes into the flattened [batch * width] logits; targets: their labels.
    """
    predicted = labels[:, 1:] != IGNORE_INDEX
    rows, columns = predicted.nonzero(as_tuple=True)
    return {"positions": rows * labels.shape[1] + columns, "targets": labels[:, 1:][predicted]}
