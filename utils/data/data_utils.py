"""The published names of data preparation, with their published signatures; `utils.data.prepare` does the work."""

import abc
from collections.abc import Iterable
from typing import Any

import datasets
import torch
from transformers import PreTrainedTokenizerBase

from utils.data import prompt_dataset, splits
from utils.data.formats.chat_template import AUTO, resolve_chat_format
from utils.data.formats.custom import OwnOptions
from utils.data.mixture import SFT_ONLY_SPLIT, DataSources
from utils.data.open_sets import Preparation
from utils.data.prepare import get_raw_dataset, prepare_data_set, prepare_prompt_data, tokenize_part
from utils.data.raw_datasets import PromptRawDataset
from utils.data.rlhf_data import DataCollatorReward, DataCollatorRLHF, MiniDataset, get_unsupervised_data
from utils.data.splits import get_shuffle_idx
from utils.data.tokenization.tokenize_rows import DEFAULT_END_TOKEN, SampleForm

__all__ = [
    "SFT_ONLY_SPLIT",
    "DataCollatorRLHF",
    "DataCollatorReward",
    "MiniDataset",
    "PromptDataset",
    "create_dataset",
    "create_dataset_split",
    "create_prompt_dataset",
    "get_raw_dataset",
    "get_raw_dataset_split_index",
    "get_shuffle_idx",
    "get_unsupervised_data",
]


class PromptDataset(torch.utils.data.Dataset, metaclass=abc.ABCMeta):
    """Samples of one phase from lists of what a tokenizer returned, as the caller padded them.

    The data sets of the functions below are instances of it too, and read the same items from memory-mapped Arrow
    (see `utils.data.prompt_dataset`).

    Args:
        prompt_dataset, chosen_dataset, reject_dataset: each sample's `input_ids` and `attention_mask`; phase 1 reads
            the chosen ones, 2 the chosen and the rejected, 3 the prompts.
    """

    def __init__(
        self, prompt_dataset: list, chosen_dataset: list, reject_dataset: list, pad_token_id: int, train_phase: int
    ) -> None:
        self.prompt_dataset = prompt_dataset
        self.chosen_dataset = chosen_dataset
        self.reject_dataset = reject_dataset
        self.pad_token_id = pad_token_id
        self.train_phase = train_phase

    def __len__(self) -> int:
        return len(self.prompt_dataset if self.train_phase == 3 else self.chosen_dataset)

    def __getitem__(self, index: int) -> Any:
        def parts(samples: list) -> tuple[Any, Any]:
            return samples[index]["input_ids"], samples[index]["attention_mask"]

        if self.train_phase == 3:
            return (*parts(self.prompt_dataset), self.pad_token_id)
        ids, mask = parts(self.chosen_dataset)
        if self.train_phase == 2:
            return (ids, mask, *parts(self.reject_dataset))
        return {"input_ids": ids, "attention_mask": mask, "labels": ids}


PromptDataset.register(prompt_dataset.PromptDataset)


def get_raw_dataset_split_index(
    local_rank: int,
    output_path: str,
    dataset_name: str,
    seed: int,
    split_name: str,
    data_split: str,
    split_index: int,
    data_size: int,
    rebuild: bool = False,
) -> list[int]:
    """Return the row numbers of one part of a data set as a list; see `utils.data.splits`."""
    return splits.get_raw_dataset_split_index(
        local_rank, output_path, dataset_name, seed, split_name, data_split, split_index, data_size, rebuild
    ).tolist()


def sample_form(tokenizer: PreTrainedTokenizerBase, end_of_conversation_token: str, max_seq_len: int) -> SampleForm:
    """Return what a sample is where the end token may be any text.

    A special token is one id in any text, so it ends every sample exactly once, also one that was there already. Any
    other text becomes the tokens it has in its place, `<|endoftext|>` too where the tokenizer has no such token.
    """
    special = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    text = None if end_of_conversation_token in special else end_of_conversation_token
    return SampleForm(tokenizer, end_of_conversation_token, max_seq_len, end_text=text)


def create_dataset_split(
    current_dataset: datasets.Dataset,
    raw_dataset: PromptRawDataset,
    train_phase: int,
    tokenizer: PreTrainedTokenizerBase,
    end_of_conversation_token: str,
    max_seq_len: int,
) -> prompt_dataset.PromptDataset:
    """Return the rows of `current_dataset` tokenized for one phase, in memory."""
    sample = sample_form(tokenizer, end_of_conversation_token, max_seq_len)
    return tokenize_part(current_dataset, raw_dataset, sample, train_phase)


def create_dataset(
    local_rank: int,
    dataset_name: str,
    data_split: str,
    output_path: str,
    train_phase: int,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    end_of_conversation_token: str,
    max_seq_len: int,
    rebuild: bool = False,
) -> tuple[prompt_dataset.PromptDataset, prompt_dataset.PromptDataset]:
    """Return the phase's part of one data set, tokenized, in memory: (train, eval)."""
    sample = sample_form(tokenizer, end_of_conversation_token, max_seq_len)
    preparation = Preparation(local_rank, output_path, train_phase, seed, rebuild)
    return prepare_data_set(dataset_name, data_split, sample, None, preparation)


def create_prompt_dataset(
    local_rank: int,
    data_path: list[str],
    data_split: str,
    output_path: str,
    train_phase: int,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_len: int,
    end_of_conversation_token: str = DEFAULT_END_TOKEN,
    sft_only_data_path: Iterable[str] = (),
    reload: bool = False,
) -> tuple[prompt_dataset.PromptDataset, prompt_dataset.PromptDataset]:
    """Return the mixed, tokenized data of one phase as (train, eval), from the cache in `output_path` where it fits.

    A DataLoader with transformers' `default_data_collator` makes batches of phase 1, padded to their longest sample.

    Args:
        local_rank: rank on this node, -1 without ranks; only the first one prints what the data are.
        data_path: data sets (`NAME` or `NAME:WEIGHT`) divided by `data_split`; phase `train_phase` uses its part.
        data_split: any number of shares; phase k uses the k-th.
        output_path: cache folder, on the node's own or a shared disk.
        end_of_conversation_token: any text; see `sample_form`.
        sft_only_data_path: data sets that phase 1 uses whole.
        reload: build anew even where the cache fits.

    Raises:
        UserError: bad data, or no training sample is left.
    """
    sample = sample_form(tokenizer, end_of_conversation_token, max_seq_len)
    own = OwnOptions(chat=resolve_chat_format(AUTO, tokenizer, end_of_conversation_token), tokenizer=tokenizer)
    sources = DataSources(data_path, data_split, tuple(sft_only_data_path))
    preparation = Preparation(local_rank, output_path, train_phase, seed, reload)
    return prepare_prompt_data(sources, sample, own, preparation)
