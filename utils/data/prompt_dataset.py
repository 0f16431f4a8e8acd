"""The tokenized samples of one phase: a torch data set over memory-mapped Arrow."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
import torch.nn.functional as F

from utils.data.batching.collate import IGNORE_INDEX

ID_COLUMNS = {1: ["input_ids"], 2: ["chosen_ids", "rejected_ids"], 3: ["prompt_ids"]}


class Sources(NamedTuple):
    """The data sets that the samples of a blend come from."""

    names: list[str]
    of_sample: np.ndarray  # [samples], the place in `names` of each sample's

    @classmethod
    def of(cls, names: Sequence[str], of_sample: np.ndarray) -> "Sources":
        """Return them with a name of its own for each: the second of a name has " (2)" behind it."""
        numbers = [list(names[:place]).count(name) for place, name in enumerate(names)]
        return cls([f"{name} ({n + 1})" if n else name for name, n in zip(names, numbers, strict=True)], of_sample)


class PromptDataset(torch.utils.data.Dataset):
    """Tokenized samples of one phase, memory-mapped.

    Items, tensors of int64:
        phase 1: dict of `input_ids`, `attention_mask`, `labels`, each [length], unpadded; with completion-only loss
            everything outside the responses is labelled -100. A DataLoader gets those of a batch padded to the longest
            of them, so that `default_data_collator` can stack them; main.py reads items one by one;
        phase 2: (chosen ids, chosen mask, rejected ids, rejected mask), each [1, max_seq_len], padded, since the
            reward phase concatenates them;
        phase 3: (reversed prompt ids, reversed mask, pad id), [length]; the RLHF phase pads them and reverses again.
    """

    content: Any = None  # what identifies the prepared data, see `utils.data.agreement`
    chat: Any = None  # the `ChatFormat` of the training data, see `utils.data.open_sets.chat_of`
    sources: Sources | None = None  # of the evaluation data: which data set each sample is of
    after: dict[str, Any] | None = None  # in a window of a stream: where the next window begins

    def __init__(
        self, table: datasets.Dataset, train_phase: int, pad_token_id: int | None = None, max_seq_len: int = 0
    ) -> None:
        self.table = table.with_format("numpy")
        self.train_phase = train_phase
        self.pad_token_id = pad_token_id
        self.max_seq_len = max_seq_len
        self.completion_only = "label_spans" in table.column_names
        self.counts: dict[str, Any] = {}  # what became of the rows, see `utils.data.outcomes.count`

    def __len__(self) -> int:
        return len(self.table)

    def follow(self, position: dict[str, Any] | None) -> dict[str, Any] | None:
        """Return None: only a stream has windows to move to, see `PromptStream.follow`."""
        return None

    def by_source(self) -> dict[str, np.ndarray]:
        """Return the samples of each data set, by its name; all of them under "" where there is only one."""
        if self.sources is None or len(self.sources.names) < 2:
            return {"": np.arange(len(self))}
        return {name: np.flatnonzero(self.sources.of_sample == n) for n, name in enumerate(self.sources.names)}

    def lengths(self) -> np.ndarray:
        """Return the tokens of every sample of phase 1, [samples] int64, read from the Arrow offsets."""
        lists = self.table.with_format("arrow")[:]["input_ids"]
        return pc.list_value_length(lists).to_numpy().astype(np.int64)

    def label_counts(self) -> np.ndarray:
        """Return the label tokens of every sample of phase 1, [samples] int64: all but the first, or the responses'."""
        if not self.completion_only:
            return self.lengths() - 1
        lists = self.table.with_format("arrow")[:]["label_spans"]
        flat = pc.list_flatten(lists).to_numpy().astype(np.int64)
        sample_of = np.repeat(np.arange(len(self)), pc.list_value_length(lists).to_numpy() // 2)
        return np.bincount(sample_of, flat[1::2] - flat[::2], minlength=len(self)).astype(np.int64)

    def __getitem__(self, index: int) -> Any:
        row = self.table[int(index)]
        spans = row.get("label_spans", ())
        row = {key: torch.from_numpy(np.asarray(row[key], dtype=np.int64)) for key in ID_COLUMNS[self.train_phase]}
        if self.train_phase == 1:
            ids = row["input_ids"]
            labels = torch.full_like(ids, IGNORE_INDEX) if self.completion_only else ids.clone()
            for start, end in zip(spans[::2], spans[1::2], strict=True):
                labels[start:end] = ids[start:end]
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        if self.train_phase == 2:
            return (*self._padded(row["chosen_ids"]), *self._padded(row["rejected_ids"]))
        ids = row["prompt_ids"].flip(0)
        return ids, torch.ones_like(ids), self.pad_token_id

    def __getitems__(self, indices: list[int]) -> list[Any]:
        """Return the items of a DataLoader's batch; in phase 1 of one length, with padding masked and not labelled."""
        items = [self[index] for index in indices]
        if self.train_phase != 1:
            return items
        width = max(len(item["input_ids"]) for item in items)
        fill = {"input_ids": self.pad_token_id or 0, "attention_mask": 0, "labels": IGNORE_INDEX}
        return [
            {key: F.pad(ids, (0, width - len(ids)), value=fill[key]) for key, ids in item.items()} for item in items
        ]

    def _padded(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        padded = torch.full((1, self.max_seq_len), self.pad_token_id, dtype=torch.long)
        mask = torch.zeros((1, self.max_seq_len), dtype=torch.long)
        padded[0, : len(ids)] = ids
        mask[0, : len(ids)] = 1
        return padded, mask
