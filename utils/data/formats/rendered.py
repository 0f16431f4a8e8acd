"""Recognizes prompts that are rendered already: by a chat template, of any model, or in words such as `Assistant:`.

A row is rendered where its prompt begins as renderings begin (BOS, or the marker that opens a turn) or ends as they end
(the marker that opens the assistant's turn). A marker in the middle of a sentence says nothing.
"""

import re
from functools import lru_cache
from typing import NamedTuple

# BOS tokens that are nothing else; <s> is HTML too, and <|endoftext|> is an end.
_FOREIGN_BOS = r"<bos>|<\|begin_of_text\|>|<｜begin▁of▁sentence｜>|<\|startoftext\|>|<BOS_TOKEN>|\[gMASK\]\s*<sop>"
_ROLE = r"\s*(?:system|developer|user|assistant|model|human|tool|ipython|function|observation|documents)\s*"
_TURNS = "|".join(
    (
        rf"<\|im_start\|>{_ROLE}(?<=\n)",
        rf"<\|start_header_id\|>{_ROLE}<\|end_header_id\|>",
        rf"<\|header_start\|>{_ROLE}<\|header_end\|>",
        rf"<\|start_of_role\|>{_ROLE}<\|end_of_role\|>",
        rf"<\|start\|>{_ROLE}<\|(?:message|channel)\|>",
        rf"<start_of_turn>{_ROLE}(?<=\n)",
        rf"<\|im_(?:user|system)\|>{_ROLE}<\|im_middle\|>",
        r"<\|START_OF_TURN_TOKEN\|>",
        r"<\|(?:user|system|assistant|prompter|observation)\|>",
        r"<｜(?:User|Assistant)｜>",
        r"\[\|(?:user|system)\|\]",
        r"<extra_id_[01]>(?:System|User)",
        r"\[INST\]|\[SYSTEM_PROMPT\]|\[AVAILABLE_TOOLS\]|<<SYS>>",
    )
)
_BEGINS = re.compile(rf"\s*(?:(?:{_FOREIGN_BOS})|(?:<s>\s*|<\|endoftext\|>\s*)?(?:{_TURNS}))")
_THOUGHT = r"\s*(?:<think>\s*(?:</think>\s*)?)?$"
_ENDS = re.compile(
    r"(?:<\|im_start\|>\s*assistant|<\|start_header_id\|>\s*assistant\s*<\|end_header_id\|>"
    r"|<\|header_start\|>\s*assistant\s*<\|header_end\|>|<\|start_of_role\|>\s*assistant\s*<\|end_of_role\|>"
    r"|<\|start\|>assistant(?:<\|channel\|>\w+<\|message\|>)?|<start_of_turn>\s*model|\[/INST\]|<\|assistant\|>"
    r"|<｜Assistant｜>|<\|CHATBOT_TOKEN\|>|\[\|assistant\|\]|<\|im_assistant\|>assistant<\|im_middle\|>)" + _THOUGHT
)
_SPOKEN_END = re.compile(r"(?:(?:^|\W)assistant:|### response:)\s*$", re.IGNORECASE)
_STRUCK = re.compile(r"\s*<s>[^<]*</s>\s*[^\s<]")  # HTML: struck words, and more of the sentence after them
_TAIL = re.compile(r"\s*\w*\s*:?\s*")  # the name of a role, as it stands after the last marker of a prompt


class Rendering(NamedTuple):
    """How a rendered prompt and its answer are joined."""

    gap: str  # what stands between them where neither has white space there


MARKED = Rendering("")
SPOKEN = Rendering(" ")


def rendering_of(prompt: str, bos: str | None, special: tuple[str, ...] = ()) -> Rendering | None:
    """Return how a prompt that is rendered already meets its answer; None for a prompt that is not.

    Args:
        bos, special: the tokenizer's own tokens, as text.
    """
    has_bos = begins_with(prompt, bos) and not _STRUCK.match(prompt)
    if has_bos or _BEGINS.match(prompt) or _ENDS.search(prompt[-200:]):
        return MARKED
    if _SPOKEN_END.search(prompt[-40:]):
        return SPOKEN
    return MARKED if special and _has_own_markers(prompt, special) else None


def begins_with(text: str, bos: str | None) -> bool:
    """Whether a text begins with BOS, perhaps after white space."""
    return bool(bos) and (text.startswith(bos) or (text[:1].isspace() and text.lstrip().startswith(bos)))


def _has_own_markers(prompt: str, special: tuple[str, ...]) -> bool:
    """Whether special tokens of the tokenizer open the prompt and, with at most a role's name after it, close it."""
    text, pattern = prompt.lstrip(), pattern_of(special)
    if pattern.match(text) is None:
        return False
    *_, last = pattern.finditer(text)
    return last.start() > 0 and _TAIL.fullmatch(text, last.end()) is not None


@lru_cache(maxsize=8)
def pattern_of(tokens: tuple[str, ...]) -> re.Pattern[str]:
    """Return a pattern that matches each of these tokens, the longest first; nothing where there are none."""
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)) or r"(?!)")
