"""The published names of data preparation, with their published signatures; `utils.data.prepare` does the work."""

from collections.abc import Iterable

import datasets
from transformers import PreTrainedTokenizerBase

from utils.data.formats.custom import own_options
from utils.data.mixture import SFT_ONLY_SPLIT, DataSources
from utils.data.prepare import Preparation, get_raw_dataset, prepare_data_set, prepare_prompt_data, tokenize_part
from utils.data.prompt_dataset import PromptDataset
from utils.data.raw_datasets import PromptRawDataset
from utils.data.splits import get_raw_dataset_split_index, get_shuffle_idx
from utils.data.tokenization.tokenize_rows import DEFAULT_END_TOKEN, SampleForm

__all__ = [
    "SFT_ONLY_SPLIT",
    "PromptDataset",
    "create_dataset",
    "create_dataset_split",
    "create_prompt_dataset",
    "get_raw_dataset",
    "get_raw_dataset_split_index",
    "get_shuffle_idx",
]


def create_dataset_split(
    current_dataset: datasets.Dataset,
    raw_dataset: PromptRawDataset,
    train_phase: int,
    tokenizer: PreTrainedTokenizerBase,
    end_of_conversation_token: str,
    max_seq_len: int,
) -> PromptDataset:
    """Return the rows of `current_dataset` tokenized for one phase, in memory."""
    sample = SampleForm(tokenizer, end_of_conversation_token, max_seq_len)
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
) -> tuple[PromptDataset, PromptDataset]:
    """Return the phase's part of one data set, tokenized, in memory: (train, eval)."""
    sample = SampleForm(tokenizer, end_of_conversation_token, max_seq_len)
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
) -> tuple[PromptDataset, PromptDataset]:
    """Return the mixed, tokenized data of one phase as (train, eval), from the cache in `output_path` where it fits.

    Args:
        local_rank: rank on this node, -1 without ranks; only the first one prints what the data are.
        data_path: data sets (`NAME` or `NAME:WEIGHT`) divided by `data_split`; phase `train_phase` uses its part.
        output_path: cache folder, on the node's own or a shared disk.
        sft_only_data_path: data sets that phase 1 uses whole.
        reload: build anew even where the cache fits.

    Raises:
        UserError: bad data, or no training sample is left.
    """
    sample = SampleForm(tokenizer, end_of_conversation_token, max_seq_len)
    sources = DataSources(data_path, data_split, tuple(sft_only_data_path))
    preparation = Preparation(local_rank, output_path, train_phase, seed, reload)
    return prepare_prompt_data(sources, sample, own_options(tokenizer, sample.end_id), preparation)
