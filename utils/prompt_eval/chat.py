"""A conversation in the terminal with one or two models, each with its own memory of it."""

import sys
from argparse import Namespace
from collections.abc import Callable
from typing import Any, NamedTuple, TextIO

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from utils.errors import UserError
from utils.model.model_utils import max_positions
from utils.prompt_eval.answers import NEXT_TURN, Answer, answer_batch, decoding, encode

STREAMING = ("greedy", "multinomial")  # the others decide on a token only after later ones
HELP = "Ask something. /clear begins a new conversation, /quit (or Ctrl-D, Ctrl-C) ends."


class Speaker(NamedTuple):
    """One model of the conversation."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


class AnswerPrinter(TextStreamer):
    """Prints an answer word by word, up to the next "Human:"."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, output: TextIO) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.output = output
        self.begun, self.over = False, False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called with whole words; "Human:" is one."""
        turn = NEXT_TURN.search(text)
        if not self.over:
            text = text[: turn.start()].rstrip() if turn else text
            self.output.write(text if self.begun else text.lstrip())
            self.output.flush()
        self.begun, self.over = self.begun or bool(text.strip()), self.over or turn is not None


def next_prompt(turns: list[tuple[str, str]], question: str) -> str:
    """` Human: … Assistant: …` for every turn so far, then the new question: the form training uses."""
    past = "".join(f" Human: {asked} Assistant: {answered}" for asked, answered in turns)
    return f"{past} Human: {question} Assistant:"


def fitting_turns(speaker: Speaker, turns: list[tuple[str, str]], question: str, new_tokens: int) -> int:
    """How many of the oldest turns have to be forgotten so that question and answer fit the model's positions.

    Raises:
        UserError: the question alone is too long.
    """
    limit = max_positions(speaker.model.config.get_text_config())
    for forgotten in range(len(turns) + 1):
        tokens = len(speaker.tokenizer(next_prompt(turns[forgotten:], question))["input_ids"])
        if limit is None or tokens + new_tokens <= limit:
            return forgotten
    raise UserError(
        f"that question has {tokens} tokens; with --max_new_tokens {new_tokens} they exceed the {limit} positions of "
        f"{speaker.name}"
    )


def reply(
    speaker: Speaker, turns: list[tuple[str, str]], question: str, args: Namespace, output: TextIO
) -> Answer | None:
    """Print the model's answer, word by word where its strategy can, and add the turn; None if it is too long."""
    output.write(f"{speaker.name}: ")
    output.flush()
    try:
        forgotten = fitting_turns(speaker, turns, question, args.max_new_tokens)
    except UserError as err:
        output.write(f"[{err}]\n")
        return None
    if forgotten:
        output.write(f"[the oldest {forgotten} turn(s) no longer fit and are forgotten] ")
        del turns[:forgotten]
    strategy = args.strategies[0]
    inputs = encode(speaker.tokenizer, [next_prompt(turns, question)], speaker.model.device)
    settings: dict[str, Any] = decoding(strategy, args) | {"num_return_sequences": 1}
    if strategy in STREAMING:
        settings["streamer"] = AnswerPrinter(speaker.tokenizer, output)
    answer = answer_batch(speaker.model, speaker.tokenizer, inputs, **settings)[0]
    output.write("\n" if strategy in STREAMING else f"{answer.text.strip()}\n")
    turns.append((question, answer.text.strip()))
    return answer


def chat(
    speakers: list[Speaker], args: Namespace, ask: Callable[[str], str] = input, output: TextIO = sys.stdout
) -> None:
    """Ask until the end of input; every model answers, and remembers its own answers only."""
    output.write(f"{HELP}\n")
    memories: list[list[tuple[str, str]]] = [[] for _ in speakers]
    torch.manual_seed(args.seed)
    while True:
        try:
            question = ask("Human: ").strip()
        except (EOFError, KeyboardInterrupt):
            output.write("\n")
            return
        if question == "/quit":
            return
        if question == "/clear":
            memories = [[] for _ in speakers]
            output.write("A new conversation.\n")
        elif question.startswith("/"):
            output.write(f"{HELP}\n")
        elif question:
            for speaker, turns in zip(speakers, memories, strict=True):
                reply(speaker, turns, question, args, output)
