"""The prompts of a comparison: built in, six per language, or read from a file."""

import os
from collections.abc import Callable
from typing import TypeVar

from utils.data.formats.conversations import Conversation
from utils.data.reading.messages import Malformed, to_messages, to_tools
from utils.data.reading.records import iter_json_records, json_kind
from utils.errors import UserError

Prompt = TypeVar("Prompt")

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
    return _prompts_of("--prompt_file", path, _prompt_of)


def read_sample_prompts(path: str) -> list[str | Conversation]:
    """Return the prompts of the file of `--sample_prompts`: texts, and conversations that wait for an answer.

    As `read_prompt_file`, but a record may hold `messages` (and `tools`) in place of a `prompt`; answers at the end of
    such a conversation are left out, so files of training data work too.

    Raises:
        UserError: see `read_prompt_file`; or `messages` hold no conversation, or none that waits for an answer.
    """
    return _prompts_of("--sample_prompts", path, _prompt_or_talk_of)


def _prompts_of(flag: str, path: str, read: Callable[[str, dict], Prompt]) -> list[str | Prompt]:
    """Return the lines of a text file, or what `read` makes of each record; `flag` names the file in messages."""
    ending = os.path.splitext(path)[1].lower()
    if ending not in (".txt", ".json", ".jsonl"):
        raise UserError(f"{flag} {path}: {ending or 'no ending'} is none of .txt, .json and .jsonl")
    if ending == ".txt":
        prompts = _lines(flag, path)
    else:
        prompts = [
            read(f"{flag} {path}, record {number} (line {line})", record)
            for number, line, record in iter_json_records(path)
        ]
    if not prompts:
        raise UserError(f"{flag} {path} is empty: write at least one prompt into it")
    return prompts


def _lines(flag: str, path: str) -> list[str]:
    """Return the lines of a text file that are not blank."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            return [line.rstrip("\r\n") for line in file if line.strip()]
    except UnicodeDecodeError as err:
        raise UserError(f"{flag} {path} is not UTF-8 text ({err}): save it as UTF-8") from err
    except OSError as err:
        raise UserError(f"{flag} {path} cannot be read: {err.strerror}") from err


def _prompt_of(where: str, record: dict) -> str:
    """Return the prompt of one record; `where` says where it stands."""
    prompt = record.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        found = "an empty text" if isinstance(prompt, str) else json_kind(prompt)
        reason = f"{found} under" if "prompt" in record else "no"
        raise UserError(f'{where} has {reason} "prompt": give it a text')
    return prompt


def _prompt_or_talk_of(where: str, record: dict) -> str | Conversation:
    """Return the prompt of one record, or its conversation up to where an answer is due."""
    if "messages" not in record:
        return _prompt_of(where, record)
    try:
        messages = to_messages(record["messages"], "messages")
        tools = to_tools(record.get("tools"), "tools")
    except Malformed as err:
        raise UserError(f"{where}: {err}") from err
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise UserError(f'{where}: "messages" hold answers alone: there is nothing to answer')
    return Conversation(messages, tools)
