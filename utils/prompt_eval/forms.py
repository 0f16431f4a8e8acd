"""The form in which a model is asked: prompts as they were written, or questions in the model's own chat template."""

import re
from collections.abc import Sequence

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from utils.errors import UserError
from utils.prompt_eval.config import CHAT, HEADINGS, EvalConfig

SPEAKER = re.compile(r"\s*(?<![A-Za-z])(Human|Assistant):\s*")
PLACE = "QUESTION"  # stands for the question while a template's words around it are found
Turns = list[tuple[str, str]]  # (question, answer)


def next_prompt(turns: Turns, question: str) -> str:
    """Return one prompt, ` Human: … Assistant: …` for every turn and the new question: the form training uses."""
    past = "".join(f" Human: {asked} Assistant: {answered}" for asked, answered in turns)
    return f"{past} Human: {question} Assistant:"


def form_name(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a few words on the form in which questions are put."""
    return "its own chat template" if tokenizer.chat_template else "the Human/Assistant form"


def question_ids(tokenizer: PreTrainedTokenizerBase, turns: Turns, question: str) -> list[int]:
    """Return the ids of turns and question by the chat template, which writes its special tokens itself.

    A tokenizer without a template has the Human/Assistant form.

    Raises:
        UserError: the template refuses them, or writes nothing.
    """
    if not tokenizer.chat_template:
        return list(tokenizer(next_prompt(turns, question))["input_ids"])
    ids = list(_rendered(tokenizer, turns, question, tokenize=True)["input_ids"])
    if not ids:
        raise UserError("the chat template writes nothing for a question: it is no template for conversations")
    return ids


def _rendered(tokenizer: PreTrainedTokenizerBase, turns: Turns, question: str, tokenize: bool) -> dict | str:
    talk = [(role, text) for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)]
    messages = [{"role": role, "content": text} for role, text in [*talk, ("user", question)]]
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=tokenize, add_generation_prompt=True, return_dict=tokenize
        )
    except (TemplateError, TypeError, ValueError, KeyError) as err:
        raise UserError(f"the chat template can't be rendered: {err}") from err


def prompt_ids(tokenizer: PreTrainedTokenizerBase, config: EvalConfig) -> list[list[int]]:
    """Return the ids of every prompt of a comparison, in the form that `--prompt_form` asks for.

    Raises:
        UserError: a chat template refuses a prompt.
    """
    if config.args.prompt_form != CHAT:
        adds = config.adds_special or [True] * len(config.prompts)
        pairs = zip(config.prompts, adds, strict=True)
        return [list(tokenizer(prompt, add_special_tokens=added)["input_ids"]) for prompt, added in pairs]
    return [question_ids(tokenizer, *turns_of(prompt)) for prompt in config.prompts]


def turns_of(prompt: str) -> tuple[Turns, str]:
    """Return earlier turns and question of a prompt in the Human/Assistant form; any other prompt is a question."""
    before, *parts = SPEAKER.split(prompt)
    names, texts = parts[::2], parts[1::2]
    if before.strip() or not names or names != ["Human", "Assistant"] * (len(names) // 2) or texts[-1]:
        return [], prompt
    return list(zip(texts[:-2:2], texts[1:-2:2], strict=True)), texts[-2]


def describe_form(config: EvalConfig, tokenizers: dict[str, PreTrainedTokenizerBase]) -> str:
    """Return a line on the form in which the prompts are asked.

    It names the models that have learned another one: whose chat template writes words that the prompts lack.
    """
    if config.args.prompt_form == CHAT:
        forms = [f"{HEADINGS[name]} in {form_name(tokenizer)}" for name, tokenizer in tokenizers.items()]
        line = f"Prompts: put as questions, {' and '.join(forms)}"
        cut = sum(turns_of(prompt)[1] != prompt for prompt in config.prompts)
        return line + f"; Human: and Assistant: in {cut} of them are read as turns" * (cut > 0)
    line = "Prompts: asked as they are written"
    bare = {HEADINGS[name]: bare_prompts(tokenizer, config.prompts) for name, tokenizer in tokenizers.items()}
    lacking = [f"{count} of {len(config.prompts)} without the chat template of {name}" for name, count in bare.items()
               if count]  # fmt: skip
    return line + f", {' and '.join(lacking)} (--prompt_form chat puts them in it)" * bool(lacking)


def bare_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> int:
    """Count the prompts that do not end as a chat template ends a question; 0 where there is no template."""
    if not tokenizer.chat_template:
        return 0
    try:
        ending = str(_rendered(tokenizer, [], PLACE, tokenize=False)).rpartition(PLACE)[2].strip()
    except UserError:  # it needs other messages than a question
        return 0
    return sum(not prompt.rstrip().endswith(ending) for prompt in prompts)
