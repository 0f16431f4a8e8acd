"""Turn samples of different lengths into one batch of tensors. Masks come from lengths, never from ids."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from utils.data.prompt_dataset import IGNORE_INDEX

Sample = dict[str, torch.Tensor]


def collate_free(samples: Sequence[Sample]) -> dict[str, Any]:
    """One row of all samples end to end, without padding.

    Args:
        samples: each with `input_ids` and `labels`, both [length].

    Returns:
        input_ids, position_ids (from 0 in each sample), labels: [1, tokens] int64; a sample's first token is
            labelled -100, since what stands before it is another sample;
        document_lengths: tokens of each sample; cumulative: [samples + 1] int32, their running sums from 0;
        positions, targets: see `label_positions`.
    """
    lengths = [len(sample["input_ids"]) for sample in samples]
    labels = torch.cat([sample["labels"] for sample in samples])
    cumulative = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    labels[cumulative[:-1].long()] = IGNORE_INDEX
    batch = {
        "input_ids": torch.cat([sample["input_ids"] for sample in samples])[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "labels": labels[None],
        "document_lengths": lengths,
        "cumulative": cumulative,
    }
    return {**batch, **label_positions(batch["labels"])}


def collate_slice(samples: Sequence[Sample], part: tuple[int, int]) -> dict[str, Any]:
    """Part k of N (`part` = (k, N)) of the row `collate_free` makes: what one rank of a sequence parallel group gets.

    The row is filled up to a multiple of N with one more document, whose tokens count in nothing.

    Returns:
        input_ids, position_ids, labels: [1, tokens / N]; document_lengths and cumulative of the whole row, since
            attention goes over all of it; positions, targets: of the labels predicted in this part. A label that is
            the next part's first token is predicted here: labels were shifted before the row was cut.
    """
    batch = collate_free(samples)
    index, parts = part
    tokens = batch["input_ids"].shape[1]
    width = -(-tokens // parts)
    padding, start = width * parts - tokens, index * width
    fill = {"input_ids": 0, "position_ids": 0, "labels": IGNORE_INDEX}
    for name, value in fill.items():
        batch[name] = F.pad(batch[name], (0, padding), value=value)[:, start : start + width]
    if padding:
        batch["document_lengths"] = [*batch["document_lengths"], padding]
        batch["cumulative"] = F.pad(batch["cumulative"], (0, 1), value=width * parts)
    mine = (batch["positions"] >= start) & (batch["positions"] < start + width)
    labels = {"positions": batch["positions"][mine] - start, "targets": batch["targets"][mine]}
    return {**batch, **labels, "part": part}


def collate_padded(samples: Sequence[Sample], pad_token_id: int, pad_to: int | None = None) -> dict[str, torch.Tensor]:
    """Pad to the longest sample (or to `pad_to`) on the right.

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
    """Where the flattened logits predict a label: the token before it in the same row (the shift).

    Worked out here, on the CPU, so that picking the rows out never makes the training loop wait.

    Returns:
        positions: [label tokens] places in the flattened [batch * width] logits; targets: the labels there.
    """
    predicted = labels[:, 1:] != IGNORE_INDEX
    rows, columns = predicted.nonzero(as_tuple=True)
    return {"positions": rows * labels.shape[1] + columns, "targets": labels[:, 1:][predicted]}
