"""The prompts of a comparison: built in, six per language, or read from a file."""

import os

from utils.data.reading.records import iter_json_records, json_kind
from utils.errors import UserError

PROMPTS = {
    "English": [
        "Human: Please tell me about Microsoft in a few sentence? Assistant:",
        "Human: Explain the moon landing to a 6 year old in a few sentences. Assistant:",
        "Human: Write a short poem about a wise frog. Assistant:",
        "Human: Who was president of the United States in 1955? Assistant:",
        "Human: How does a telescope work? Assistant:",
        "Human: Why do birds migrate south for the winter? Assistant:",
    ],
    "Chinese": [
        "Human: 请用几句话介绍一下微软? Assistant:",
        "Human: 用几句话向6岁的孩子解释登月。 Assistant:",
        "Human: 写一首关于一只聪明的青蛙的短诗。 Assistant:",
        "Human: 谁是1955年的美国总统? Assistant:",
        "Human: 望远镜是如何工作的? Assistant:",
        "Human: 鸟类为什么要南迁过冬? Assistant:",
    ],
    "Japanese": [
        "Human: マイクロソフトについて簡単に教えてください。 Assistant:",
        "Human: 6歳児に月面着陸を短い文で説明する。 Assistant:",
        "Human: 賢いカエルについて短い詩を書いてください。 Assistant:",
        "Human: 1955年のアメリカ合衆国大統領は誰? Assistant:",
        "Human: 望遠鏡はどのように機能しますか? Assistant:",
        "Human: 鳥が冬に南に移動するのはなぜですか? Assistant:",
    ],
}


def read_prompt_file(path: str) -> list[str]:
    """Return the prompts of a file, unchanged.

    A `.txt` holds one prompt per line (blank lines are skipped), a `.json` a list of objects, a `.jsonl` one object per
    line, each with its text under `prompt`. Other keys are ignored, so files of training data work too.

    Raises:
        UserError: the file is missing, empty, of another kind, or a record has no text under `prompt`.
    """
    ending = os.path.splitext(path)[1].lower()
    if ending not in (".txt", ".json", ".jsonl"):
        raise UserError(f"--prompt_file {path}: {ending or 'no ending'} is none of .txt, .json and .jsonl")
    prompts = _lines(path) if ending == ".txt" else [_prompt_of(path, *found) for found in iter_json_records(path)]
    if not prompts:
        raise UserError(f"--prompt_file {path} is empty: write at least one prompt into it")
    return prompts


def _lines(path: str) -> list[str]:
    """Return the lines of a text file that are not blank."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            return [line.rstrip("\r\n") for line in file if line.strip()]
    except UnicodeDecodeError as err:
        raise UserError(f"--prompt_file {path} is not UTF-8 text ({err}): save it as UTF-8") from err
    except OSError as err:
        raise UserError(f"--prompt_file {path} cannot be read: {err.strerror}") from err


def _prompt_of(path: str, number: int, line: int, record: dict) -> str:
    """Return the prompt of one record; `number` and `line` say where it stands in the file."""
    prompt = record.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        found = "an empty text" if isinstance(prompt, str) else json_kind(prompt)
        reason = f"{found} under" if "prompt" in record else "no"
        raise UserError(f'--prompt_file {path}, record {number} (line {line}) has {reason} "prompt": give it a text')
    return prompt
