"""Batches and text of the reward and RLHF phases (steps 2 and 3), which scripts for DeepSpeed-Chat import from here.

Nothing in SFT uses them: the steps that do run elsewhere, on data split here.
"""

from argparse import Namespace
from collections.abc import Sequence
from itertools import chain
from typing import Any

import datasets
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

Pair = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
Prompt = tuple[torch.Tensor, torch.Tensor, int]


class DataCollatorReward:
    """Joins samples of phase 2 into a batch of twice as many rows: all chosen, then all rejected. Used by step 2."""

    def __call__(self, data: Sequence[Pair]) -> dict[str, torch.Tensor]:
        """Return `input_ids` and `attention_mask`, each [2 * samples, max_seq_len]."""
        chosen, chosen_mask, rejected, rejected_mask = zip(*data, strict=True)
        return {
            "input_ids": torch.cat([*chosen, *rejected]),
            "attention_mask": torch.cat([*chosen_mask, *rejected_mask]),
        }


class DataCollatorRLHF:
    """Joins prompts of phase 3 into a batch padded on the left, so that answers can be generated. Used by step 3.

    Args:
        max_token_len: the width prompts are padded to.
        inference_tp_size: kept as an attribute, for the engine that generates.
    """

    def __init__(self, max_token_len: int, inference_tp_size: int) -> None:
        self.max_token_len = max_token_len
        self.inference_tp_size = inference_tp_size

    def __call__(self, data: Sequence[Prompt]) -> dict[str, torch.Tensor]:
        """Return `prompt` and `prompt_att_mask`, each [samples, max_token_len], or as wide as the longest prompt.

        Prompts come reversed: padded on the right and reversed again, they end where the answer begins.
        """
        pad_token_id = data[-1][-1]
        return {
            "prompt": self._left_padded([sample[0] for sample in data], pad_token_id),
            "prompt_att_mask": self._left_padded([sample[1] for sample in data], 0),
        }

    def _left_padded(self, rows: list[torch.Tensor], fill: int) -> torch.Tensor:
        batch = pad_sequence(rows, batch_first=True, padding_value=fill)
        return F.pad(batch, (0, max(0, self.max_token_len - batch.shape[1])), value=fill).flip(1)


class MiniDataset:
    """Collects batches of experience and gives them back cut into small ones, for PPO's updates. Used by step 3.

    Args:
        max_size: how many batches are collected.
        small_batch_size: rows of a small batch; the last one of a batch may have fewer.
    """

    def __init__(self, max_size: int, small_batch_size: int) -> None:
        self.dataset: list[Any] = []
        self.max_size = max_size
        self.small_batch_size = small_batch_size

    def add(self, data: Any) -> list[Any] | None:
        """Keep a batch: a tensor, or a list, tuple or dict of them. Returns all small ones once `max_size` are here.

        Raises:
            ValueError: as many batches are here already (only with a `max_size` of 0, or after changing it).
        """
        if len(self.dataset) >= self.max_size:
            raise ValueError(f"the data set already holds its {self.max_size} batches: call free() first")
        self.dataset.append(data)
        return self.seperate() if len(self.dataset) == self.max_size else None

    def seperate(self) -> list[Any]:
        """Return everything collected in small batches, in order, and forget it (the users' spelling)."""
        small = [part for batch in self.dataset for part in self._cut(batch)]
        self.free()
        return small

    def free(self) -> None:
        """Forget what was collected."""
        self.dataset = []

    def _cut(self, batch: Any) -> list[Any]:
        size = self.small_batch_size
        if isinstance(batch, dict):
            rows = len(next(iter(batch.values())))
            return [{key: value[at : at + size] for key, value in batch.items()} for at in range(0, rows, size)]
        if isinstance(batch, (list, tuple)):
            return [[value[at : at + size] for value in batch] for at in range(0, len(batch[0]), size)]
        return [batch[at : at + size] for at in range(0, len(batch), size)]


def get_unsupervised_data(args: Namespace, tokenizer: PreTrainedTokenizerBase) -> datasets.Dataset:
    """Return plain text in blocks of one length, for the language modelling loss that step 3 can add to PPO's.

    Texts are encoded, joined and cut; the rest of each batch of rows is left out, unless it is all there is.

    Args:
        args: reads `unsupervised_dataset_name`, `unsupervised_dataset_config_name`, `preprocessing_num_workers`,
            `max_prompt_seq_len` and `max_answer_seq_len`, whose sum is the length of a block.

    Returns:
        the train split with `input_ids`, `attention_mask` and `labels`.
    """
    train = datasets.load_dataset(args.unsupervised_dataset_name, args.unsupervised_dataset_config_name)["train"]
    column = "text" if "text" in train.column_names else train.column_names[0]
    length = args.max_prompt_seq_len + args.max_answer_seq_len

    def blocks(rows: dict[str, list]) -> dict[str, list]:
        joined = {key: list(chain(*values)) for key, values in tokenizer(rows[column]).items()}
        total = len(joined["input_ids"])
        end = total // length * length or total
        starts = range(0, end, length)
        cut = {key: [values[at : min(at + length, end)] for at in starts] for key, values in joined.items()}
        return {**cut, "labels": [list(block) for block in cut["input_ids"]]}

    return train.map(
        blocks, batched=True, num_proc=args.preprocessing_num_workers, remove_columns=train.column_names,
        desc=f"cutting text into blocks of {length} tokens",
    )  # fmt: skip
