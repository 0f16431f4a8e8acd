"""Answers of the model in training to the prompts of `--sample_prompts`: at each evaluation, in samples.jsonl."""

import json
import os
from argparse import Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from deepspeed import DeepSpeedEngine
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from utils.data.formats.chat_template import ChatFormat, render_prompt
from utils.data.formats.conversations import Conversation
from utils.data.formats.rendered import begins_with, rendering_of
from utils.distributed.ranks import is_rank_0, print_rank_0, world_size
from utils.errors import UserError
from utils.files import write_aside
from utils.logging.console import phase
from utils.logging.metrics_file import SAMPLES_FILE, read_samples
from utils.logging.trackers import send_texts
from utils.machine.device import kept_random_states
from utils.model.config_values import max_positions
from utils.module.attention import own_attention
from utils.module.fused_loss import without_loss
from utils.prompt_eval.prompts import read_sample_prompts
from utils.train.state import RunState

if TYPE_CHECKING:
    from utils.prompt_eval.answers import Answer  # imports transformers' models, which other runs can wait for

NEW_TOKENS = 100  # of an answer, as prompt_eval.py's --max_new_tokens
AT_ONCE = 8  # prompts
SHOWN = 80  # characters of the answer that is printed


class Asked(NamedTuple):
    """Prompts in the form in which training asks."""

    texts: list[str]
    ids: list[list[int]]
    rendered: int  # prompts that the format of the training data was put around
    new_tokens: int  # of the longest answer


def read_asked(
    args: Namespace, chat: ChatFormat | None, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig
) -> Asked:
    """Return the prompts of `--sample_prompts` in the form in which training asks.

    A text is one user's turn in the format of the training data. It stays as it is where it is rendered already, and
    where training has no such format (`chat` None).

    Raises:
        UserError: the file can't be used, or a prompt leaves no room for an answer in the model's positions.
    """
    path = args.sample_prompts
    special = tuple(tokenizer.all_special_tokens)
    texts, adds = [], []  # adds: whether the tokenizer adds its special tokens, since a chat template writes them
    rendered = 0
    for prompt in read_sample_prompts(path):
        if isinstance(prompt, str) and (chat is None or rendering_of(prompt, tokenizer.bos_token, special)):
            texts.append(prompt)
            adds.append(not begins_with(prompt, tokenizer.bos_token))
            continue
        talk = Conversation([{"role": "user", "content": prompt}]) if isinstance(prompt, str) else prompt
        form = chat or ChatFormat()
        texts.append(render_prompt(form, *talk))
        adds.append(not form.is_template)
        rendered += 1
    ids = [tokenizer(text, add_special_tokens=added)["input_ids"] for text, added in zip(texts, adds, strict=True)]
    longest = max(map(len, ids))
    positions = max_positions(config)
    room = NEW_TOKENS if positions is None else min(NEW_TOKENS, positions - longest)
    if room < 1:
        raise UserError(
            f"--sample_prompts {path}: a prompt of {longest} tokens leaves no room for an answer in the model's "
            f"{positions} positions: shorten it."
        )
    return Asked(texts, ids, rendered, room)


def answerer(
    engine: DeepSpeedEngine,
    args: Namespace,
    chat: ChatFormat | None,
    tokenizer: PreTrainedTokenizerBase,
    state: RunState,
) -> Callable[[], None]:
    """Return a function that answers the prompts of `--sample_prompts` and records the answers at the run's position.

    Every rank must call both. The function does nothing without the flag. Of an earlier run's samples.jsonl the answers
    before the position `state` are kept: a resumed run goes on with its file.
    """
    if args.sample_prompts is None:
        return lambda: None
    asked = read_asked(args, chat, tokenizer, engine.module.config)
    path = os.path.join(args.output_dir, SAMPLES_FILE)
    if is_rank_0():
        _keep_until(path, state)
    form = _form_of(asked, chat or ChatFormat())
    print_rank_0(f"Sample prompts: {len(asked.texts)} of {args.sample_prompts}, {form}")

    def answer() -> None:
        answers = answers_of(engine, asked, tokenizer)
        if is_rank_0():
            _record(path, engine, state.step, asked.texts, answers)
        first = " ".join(answers[0].text.split())
        print_rank_0(
            f"Answers to {len(answers)} sample prompts: {path}; the first: {first[:SHOWN]}{'…' * (len(first) > SHOWN)}"
        )

    return answer


def _form_of(asked: Asked, chat: ChatFormat) -> str:
    if asked.rendered == 0:
        return "asked as they are written"
    rest = len(asked.texts) - asked.rendered
    return f"asked in {chat.origin}" + (f", {rest} of them as they are written" if rest else "")


def answers_of(engine: DeepSpeedEngine, asked: Asked, tokenizer: PreTrainedTokenizerBase) -> list["Answer"]:
    """Return the greedy answers of the model in the engine; nothing that training depends on is changed.

    Every rank asks all prompts: under ZeRO 3 each forward gathers weights from all ranks, and an answer that ends on
    one rank only must not leave the others waiting.
    """
    from utils.prompt_eval.answers import answer_prompts  # see the top

    model = engine.module
    settings: dict[str, Any] = {"max_new_tokens": asked.new_tokens, "use_cache": True}
    settings["synced_gpus"] = engine.zero_optimization_partition_weights() and world_size() > 1
    training = model.training
    model.eval()
    try:
        with phase("answering the sample prompts"), kept_random_states(), own_attention(model), without_loss(model):
            found = answer_prompts(model, tokenizer, asked.ids, settings, AT_ONCE)
    finally:
        model.train(training)
    return [answers[0] for answers in found]


def _keep_until(path: str, state: RunState) -> None:
    """Remove the answers at and after the position of a run that begins or resumes."""
    records = read_samples(os.path.dirname(path))
    done = state.step - state.evaluation_due  # the last step whose evaluation is over
    kept = [one for one in records if one["step"] <= done]
    with write_aside(path) as file:
        file.write("".join(_line(one) for one in kept).encode())


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def _record(path: str, engine: DeepSpeedEngine, step: int, prompts: list[str], answers: list["Answer"]) -> None:
    """Append the answers to samples.jsonl and send them to TensorBoard."""
    try:
        with open(path, "a", encoding="utf-8", errors="replace") as file:
            for prompt, answer in zip(prompts, answers, strict=True):
                file.write(_line({"step": step, "prompt": prompt, "answer": answer.text, "ended": answer.ended}))
    except OSError as err:
        raise UserError(f"{path} can't be written any more ({err}): is the disk full, or the folder gone?") from err
    texts = {
        f"Eval/Samples/answer {number}": f"    {prompt}\n\n{answer.text}".replace("\n", "\n    ")
        for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True), 1)
    }
    send_texts(engine, step, texts)
