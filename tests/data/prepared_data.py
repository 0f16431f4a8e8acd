"""Prepares data for tests with everything that the command line can ask for."""

from typing import Any

from utils.data.formats.chat_template import AUTO
from utils.data.formats.custom import own_options
from utils.data.mixture import DataSources
from utils.data.prepare import Preparation, prepare_prompt_data
from utils.data.prompt_dataset import PromptDataset
from utils.data.tokenization.tokenize_rows import SampleForm

SEED = 1234


def prepare(
    paths: list[Any], cache: Any, tokenizer: Any, max_seq_len: int, data_split: str = "10,0,0", phase: int = 1, **more
) -> tuple[PromptDataset, PromptDataset]:
    """Return (train, eval) of samples that end in `</s>`.

    Args:
        more: completion_only, columns, chat_template, rebuild, num_proc.
    """
    sample = SampleForm(tokenizer, "</s>", max_seq_len, more.pop("completion_only", False))
    own = own_options(tokenizer, sample.end_id, more.pop("columns", None), more.pop("chat_template", AUTO))
    sources = DataSources([str(path) for path in paths], data_split)
    return prepare_prompt_data(sources, sample, own, Preparation(0, str(cache), phase, SEED, **more))
