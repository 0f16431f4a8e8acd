"""The known data sets, each described in a few lines.

To add one, write a class below the others; defining it is enough for `--data_path` to find it by its name:

    class MyDataset(PromptRawDataset):
        dataset_name = "me/my-data"
        eval_split = "test"
        prompt = human("question")
        chosen = reply("answers", 0, "text")
        rejected = None

`human`, `reply` and `as_is` name a column, or a value inside one. Where that is not enough, write a method
`prompt(self, sample)`, `chosen(self, sample)` or `rejected(self, sample)`, and list its columns in `columns`.
"""

import os
import re

from utils.data.formats.base import RAW_DATASETS, PromptRawDataset
from utils.data.formats.column_text import Sample, Text, around, as_is, human, joined, reply
from utils.data.reading.arrow_files import SplitData
from utils.errors import MissingDataSet

__all__ = ["RAW_DATASETS", "PromptRawDataset", "find_raw_dataset_class", "known_name"]


def known_name(dataset_name: str) -> str | None:
    """Return the known name that a `--data_path` contains: the longest of several, None if it contains none."""
    return max((argument for argument in RAW_DATASETS if argument in dataset_name), key=len, default=None)


def find_raw_dataset_class(dataset_name: str) -> type[PromptRawDataset]:
    """Return the class whose name a `--data_path` contains, that of the longest name of several.

    Raises:
        MissingDataSet: it contains no known name.
    """
    name = known_name(dataset_name)
    if name:
        return RAW_DATASETS[name]
    raise MissingDataSet(
        f'--data_path "{dataset_name}" is no file or folder that exists, and contains no known data set name. Known: '
        f"{', '.join(RAW_DATASETS)}.\n"
        "For data of your own, give a file or folder of json, jsonl, parquet or csv; or put data/train.json and "
        "data/eval.json (lists of objects with prompt, chosen and perhaps rejected) at the repository root and give "
        "local/jsonfile. To add a data set, write a class of about five lines in utils/data/raw_datasets.py: see the "
        "top of that file."
    )


class DahoasRmstaticDataset(PromptRawDataset):
    dataset_name = "Dahoas/rm-static"
    eval_split = "test"
    prompt = as_is("prompt")
    chosen = as_is("chosen")
    rejected = as_is("rejected")


class DahoasFullhhrlhfDataset(DahoasRmstaticDataset):
    dataset_name = "Dahoas/full-hh-rlhf"


class DahoasSyntheticinstructgptjpairwiseDataset(PromptRawDataset):
    dataset_name = "Dahoas/synthetic-instruct-gptj-pairwise"
    prompt = human("prompt")
    chosen = reply("chosen")
    rejected = reply("rejected")


class YitingxieRlhfrewarddatasetsDataset(PromptRawDataset):
    dataset_name = "yitingxie/rlhf-reward-datasets"
    eval_split = "test"
    prompt = Text(("prompt",), after="Assistant:")
    columns = {"chosen": str, "rejected": str}

    def chosen(self, sample: Sample) -> str | None:
        return self.after_last_assistant(sample["chosen"])

    def rejected(self, sample: Sample) -> str | None:
        return self.after_last_assistant(sample["rejected"])

    @staticmethod
    def after_last_assistant(text: str | None) -> str | None:
        return None if text is None else text.split("Assistant:")[-1]

    # The answers already contain "Assistant:", sometimes after earlier turns.
    def get_prompt_and_chosen(self, sample: Sample) -> str | None:
        return joined(sample["prompt"], sample["chosen"])

    def get_prompt_and_rejected(self, sample: Sample) -> str | None:
        return joined(sample["prompt"], sample["rejected"])


class OpenaiWebgptcomparisonsDataset(PromptRawDataset):
    dataset_name = "openai/webgpt_comparisons"
    prompt = human("question", "full_text")
    columns = {"answer_0": str, "answer_1": str, "score_0": float, "score_1": float}
    not_null = ("score_0", "score_1")

    def chosen(self, sample: Sample) -> str | None:
        return self.answer(sample, 0 if sample["score_0"] >= sample["score_1"] else 1)

    def rejected(self, sample: Sample) -> str | None:
        return self.answer(sample, 1 if sample["score_0"] >= sample["score_1"] else 0)

    @staticmethod
    def answer(sample: Sample, number: int) -> str | None:
        text = sample[f"answer_{number}"]
        # Citations such as [1] refer to pages that the model does not see. Two passes, as published: brackets after a
        # space are removed first, which decides what remains of nested brackets.
        for bracketed in (r" [\(\[].*?[\)\]]", r"[\(\[].*?[\)\]]"):
            text = None if text is None else re.sub(bracketed, "", text)
        return around(text, " ")


class StanfordnlpSHPDataset(PromptRawDataset):
    dataset_name = "stanfordnlp/SHP"
    eval_split = "validation"
    prompt = human("history")
    columns = {"human_ref_A": str, "human_ref_B": str, "labels": int}
    not_null = ("labels",)

    def chosen(self, sample: Sample) -> str | None:
        return around(sample["human_ref_A" if sample["labels"] == 1 else "human_ref_B"], " ")

    def rejected(self, sample: Sample) -> str | None:
        return around(sample["human_ref_B" if sample["labels"] == 1 else "human_ref_A"], " ")


class PvduySharegptalpacaoavicunaformatDataset(PromptRawDataset):
    dataset_name = "pvduy/sharegpt_alpaca_oa_vicuna_format"
    eval_split = "test"
    columns = {"prompt": str, "label": str}

    def prompt(self, sample: Sample) -> str | None:
        text = sample["prompt"]
        return text.replace("USER", "Human").replace("ASSISTANT", "Assistant") if text else None

    def chosen(self, sample: Sample) -> str | None:
        return around(sample["label"] or None, " ")


class LocalJsonFileDataset(PromptRawDataset):
    """The user's own train.json and eval.json, in `data_folder` or in the folder given as `--data_path`.

    Args:
        chat_path: a folder with `data/train.json` and `data/eval.json`, read in place of those.
    """

    dataset_name = "local/jsonfile"
    eval_split = "eval"
    prompt = reply("prompt")
    chosen = reply("chosen")
    rejected = reply("rejected")
    optional = ("rejected",)
    not_null = ("prompt", "chosen")
    data_folder = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "data")

    def __init__(
        self,
        output_path: str,
        seed: int,
        local_rank: int,
        dataset_name: str,
        chat_path: str | None = None,
        streaming: bool = False,
    ) -> None:
        self.chat_path = chat_path
        super().__init__(output_path, seed, local_rank, dataset_name, streaming)

    def _load(self) -> dict[str, SplitData]:
        folder = self.source if os.path.isdir(self.source) else self.data_folder
        folder = os.path.normpath(folder if self.chat_path is None else os.path.join(self.chat_path, "data"))
        return {
            split: self._load_files([self._file(folder, split)], self.schema(), folder)
            for split in (self.train_split, self.eval_split)
        }

    @staticmethod
    def _file(folder: str, split: str) -> str:
        for name in (f"{split}.json", f"{split}.jsonl"):
            if os.path.isfile(os.path.join(folder, name)):
                return os.path.join(folder, name)
        raise MissingDataSet(
            f"local/jsonfile needs the file {os.path.join(folder, split)}.json: put a list of objects with prompt, "
            "chosen and perhaps rejected there."
        )


class Wangrui6ZhihuKOLDataset(PromptRawDataset):
    dataset_name = "wangrui6/Zhihu-KOL"
    prompt = human("INSTRUCTION")
    chosen = reply("RESPONSE")


class CohereMiraclzhqueries2212Dataset(PromptRawDataset):
    dataset_name = "Cohere/miracl-zh-queries-22-12"
    eval_split = "dev"
    prompt = human("query")
    chosen = reply("positive_passages", 0, "text")
    rejected = reply("negative_passages", 0, "text")


class HelloSimpleAIHC3ChineseDataset(PromptRawDataset):
    dataset_name = "Hello-SimpleAI/HC3-Chinese"
    hub_config = "all"
    prompt = human("question")
    chosen = reply("human_answers", 0)


class MkqaChineseDataset(PromptRawDataset):
    dataset_name = "mkqa"
    argument = "mkqa-Chinese"
    prompt = human("queries", "zh_cn")
    chosen = reply("answers", "zh_cn", 0, "text")


class MkqaJapaneseDataset(PromptRawDataset):
    dataset_name = "mkqa"
    argument = "mkqa-Japanese"
    prompt = human("queries", "ja")
    chosen = reply("answers", "ja", 0, "text")


class CohereMiracljaqueries2212Dataset(CohereMiraclzhqueries2212Dataset):
    dataset_name = "Cohere/miracl-ja-queries-22-12"


class LmqgQgjaquadDataset(PromptRawDataset):
    dataset_name = "lmqg/qg_jaquad"
    eval_split = "validation"
    prompt = human("question")
    chosen = reply("sentence")


class LmqgQagjaquadDataset(PromptRawDataset):
    dataset_name = "lmqg/qag_jaquad"
    eval_split = "validation"
    prompt = human("questions", 0)
    chosen = reply("paragraph")
