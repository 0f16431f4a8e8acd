"""The conversation in the terminal with one or two models, each of which remembers its own answers."""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple, TextIO

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from utils.errors import UserError
from utils.model.config_values import max_positions
from utils.prompt_eval.answers import NEXT_TURN, Answer, answer_batch, encode
from utils.prompt_eval.config import EvalConfig
from utils.prompt_eval.forms import form_name, next_prompt, question_ids

STREAMING = ("greedy", "multinomial")  # the other strategies settle a token only after later ones
HELP = "Ask something. /clear begins a new conversation, /quit (or Ctrl-D, Ctrl-C) ends it."


class Speaker(NamedTuple):
    """One model of the conversation."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


class AnswerPrinter(TextStreamer):
    """Print an answer word by word, up to the next "Human:" unless told otherwise."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, output: TextIO, stop_at_human: bool = True) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.output, self.stop_at_human = output, stop_at_human
        self.begun, self.over = False, False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print the next whole words of the answer, of which "Human:" is one."""
        turn = NEXT_TURN.search(text) if self.stop_at_human else None
        if not self.over:
            text = text[: turn.start()].rstrip() if turn else text
            self.output.write(text if self.begun else text.lstrip())
            self.output.flush()
        self.begun, self.over = self.begun or bool(text.strip()), self.over or turn is not None


def question_inputs(speaker: Speaker, turns: list[tuple[str, str]], question: str) -> Any:
    """Return `input_ids` and `attention_mask` of turns and question, [1, length], in the form of its training."""
    if not speaker.tokenizer.chat_template:
        return encode(speaker.tokenizer, [next_prompt(turns, question)], speaker.model.device)
    ids = torch.tensor([question_ids(speaker.tokenizer, turns, question)], device=speaker.model.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def fitting_turns(speaker: Speaker, turns: list[tuple[str, str]], question: str, new_tokens: int) -> int:
    """Return how many of the oldest turns to forget so that question and answer fit the model's positions.

    Raises:
        UserError: the question alone is too long, or the chat template can't be rendered.
    """
    limit = max_positions(speaker.model.config)
    for forgotten in range(len(turns) + 1):
        tokens = len(question_ids(speaker.tokenizer, turns[forgotten:], question))
        if limit is None or tokens + new_tokens <= limit:
            return forgotten
    raise UserError(
        f"that question has {tokens} tokens; with --max_new_tokens {new_tokens} they exceed the {limit} positions of "
        f"{speaker.name}"
    )


def reply(
    speaker: Speaker, turns: list[tuple[str, str]], question: str, config: EvalConfig, output: TextIO
) -> Answer | None:
    """Print the model's answer, word by word if the strategy allows, and add it to `turns`.

    Returns the answer; None if the question is too long.
    """
    output.write(f"{speaker.name}: ")
    output.flush()
    try:
        forgotten = fitting_turns(speaker, turns, question, config.args.max_new_tokens)
    except UserError as err:
        output.write(f"[{err}]\n")
        return None
    if forgotten:
        output.write(f"[the oldest {forgotten} turn(s) no longer fit and are forgotten] ")
        del turns[:forgotten]
    strategy = config.strategies[0]
    inputs = question_inputs(speaker, turns, question)
    settings: dict[str, Any] = config.decoding(strategy) | {"num_return_sequences": 1}
    if strategy in STREAMING:
        settings["streamer"] = AnswerPrinter(speaker.tokenizer, output, config.args.stop_at_human)
    answer = answer_batch(speaker.model, speaker.tokenizer, inputs, **settings)[0]
    output.write("\n" if strategy in STREAMING else f"{answer.text.strip()}\n")
    turns.append((question, answer.text.strip()))
    return answer


def readable(text: str) -> str:
    """Return a line of input with what is no text, a byte of another encoding, as the sign for that."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def chat(
    speakers: list[Speaker], config: EvalConfig, ask: Callable[[str], str] = input, output: TextIO = sys.stdout
) -> None:
    """Read questions until the input ends and let every model answer each of them; Ctrl-C raises KeyboardInterrupt."""
    for speaker in speakers:
        output.write(f"{speaker.name} is asked in {form_name(speaker.tokenizer)}\n")
    output.write(f"{HELP}\n")
    memories: list[list[tuple[str, str]]] = [[] for _ in speakers]
    torch.manual_seed(config.args.seed)
    while True:
        try:
            question = readable(ask("Human: ")).strip()
        except EOFError:
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
                reply(speaker, turns, question, config, output)
