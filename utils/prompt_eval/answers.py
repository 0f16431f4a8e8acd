"""The answers of a model to prompts: generated in batches padded on the left, each cut where it ends."""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from utils.distributed.zero3 import whole_shape
from utils.errors import UserError
from utils.model.config_values import max_positions
from utils.prompt_eval.search import contrastive_search, diverse_beam_search
from utils.train.perplexity import Evaluation

NEXT_TURN = re.compile(r"(?<![A-Za-z])Human:")
# "Human:" has six characters, so it lies within the last six tokens; the others show the text before it.
TAIL_TOKENS = 12


class Answer(NamedTuple):
    """One answer of a model to one prompt."""

    prompt: str  # decoded from its ids, without special tokens
    text: str
    tokens: int  # of the text, without the end token
    ended: bool  # by the end token or, unless told otherwise, the next "Human:"; not by max_new_tokens


Answers = dict[str, list[list[Answer]]]  # strategy -> prompts -> answers


class Results(NamedTuple):
    """The answers of one model, and what it is worth on the evaluation data if measured."""

    answers: Answers
    evaluation: Evaluation | None = None


class StopAtNextTurn(StoppingCriteria):
    """Stop a row as soon as its answer contains the next "Human:"."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_length: int) -> None:
        self.tokenizer = tokenizer
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Return [rows] bool: which rows stop. The prompt's own "Human:" does not count."""
        tails = input_ids[:, max(self.prompt_length, input_ids.shape[1] - TAIL_TOKENS) :]
        texts = self.tokenizer.batch_decode(tails, skip_special_tokens=True)
        return torch.tensor([bool(NEXT_TURN.search(text)) for text in texts], device=input_ids.device)


def generate_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Any,
    max_new_tokens: int,
    stop_at_human: bool = True,
    **settings: Any,
) -> torch.Tensor:
    """Generate answers; returns prompts and answers as ids, [rows * num_return_sequences, length].

    The sampling and penalty settings of a checkpoint's generation config are ignored, so that both models decode in
    the same way.

    Args:
        inputs: `input_ids` and `attention_mask`, both [rows, prompt length], padded on the left.
        stop_at_human: end a row at the next "Human:" too.
        settings: arguments of `model.generate` that differ from greedy decoding, see `EvalConfig.decoding`.

    Raises:
        UserError: prompt and answer exceed the model's positions.
    """
    prompt_length = inputs["input_ids"].shape[1]
    check_length(model.config, prompt_length, max_new_tokens)
    ends = end_token_ids(model, tokenizer)
    plain = {
        "do_sample": False, "num_beams": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 50, "repetition_penalty": 1.0,
        "length_penalty": 1.0, "no_repeat_ngram_size": 0, "early_stopping": False,
    }  # fmt: skip
    return model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=next(token for token in [tokenizer.pad_token_id, *ends, 0] if token is not None),
        suppress_tokens=unknown_token_ids(model, tokenizer) or None,
        stopping_criteria=StoppingCriteriaList([StopAtNextTurn(tokenizer, prompt_length)] * stop_at_human),
        **{**plain, **settings},
    )


def read_answer(
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[int],
    new_ids: list[int],
    ends: Sequence[int],
    stop_at_human: bool = True,
) -> Answer:
    """Return the answer in a row of generated ids: up to the end token or, with `stop_at_human`, the next "Human:"."""
    end = next((place for place, token in enumerate(new_ids) if token in ends), len(new_ids))
    new_ids, ended = new_ids[:end], end < len(new_ids)
    prompt = decode(tokenizer, prompt_ids)

    def answer_text(ids: list[int]) -> str:
        # Decoded together with its prompt: some tokenizers drop the first space of a text.
        whole = decode(tokenizer, prompt_ids + ids)
        return whole[len(prompt) :] if whole.startswith(prompt) else decode(tokenizer, ids)

    text = answer_text(new_ids)
    turn = NEXT_TURN.search(text) if stop_at_human else None
    if turn:
        text, ended = text[: turn.start()].rstrip(), True
        while new_ids and answer_text(new_ids[:-1]).startswith(text):
            new_ids = new_ids[:-1]
    return Answer(prompt, text, len(new_ids), ended)


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Return the text of the ids, without special tokens and with its spaces unchanged."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def answer_batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, inputs: Any, stop_at_human: bool = True, **settings: Any
) -> list[Answer]:
    """Return `num_return_sequences` answers for every row of `inputs`, in order.

    `stop_at_human` and `settings` as in `generate_ids`.
    """
    output = generate_ids(model, tokenizer, inputs, stop_at_human=stop_at_human, **settings)
    prompt_length, several = inputs["input_ids"].shape[1], len(output) // len(inputs["input_ids"])
    rows = zip(inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), strict=True)
    prompts = [[token for token, real in zip(ids, mask, strict=True) if real] for ids, mask in rows]
    ends = end_token_ids(model, tokenizer)
    return [
        read_answer(tokenizer, prompts[number // several], row[prompt_length:], ends, stop_at_human)
        for number, row in enumerate(output.tolist())
    ]


def answer_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    settings: dict[str, Any],
    batch_size: int,
    progress: Callable[[int], Any] = lambda prompts_done: None,
) -> list[list[Answer]]:
    """Return the answers to each prompt, in the prompts' order; prompts of similar length share a batch.

    Args:
        prompts: their ids, of `utils.prompt_eval.forms.prompt_ids`.
        progress: called with the number of prompts after each batch.

    Raises:
        UserError: memory ran out.
    """
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    answers: dict[int, list[Answer]] = {}
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        inputs = padded(tokenizer, [prompts[number] for number in numbers], model.device)
        try:
            found = answer_batch(model, tokenizer, inputs, **settings)
        except torch.OutOfMemoryError as err:
            raise UserError(f"the device ran out of memory ({err}): lower --batch_size or --num_beams") from err
        several = len(found) // len(numbers)
        for place, number in enumerate(numbers):
            answers[number] = found[place * several : (place + 1) * several]
        progress(len(numbers))
    return [answers[number] for number in range(len(prompts))]


def encode(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], device: torch.device | str) -> Any:
    """Return `input_ids` and `attention_mask` of the prompts, [prompts, longest], padded on the left."""
    return tokenizer(
        list(prompts), return_tensors="pt", return_attention_mask=True, padding=True, padding_side="left"
    ).to(device)


def padded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[Sequence[int]], device: torch.device | str) -> Any:
    """Return `input_ids` and `attention_mask` of prompts that are ids already, [prompts, longest], padded on the left.

    A single prompt needs no pad token.
    """
    if len(ids) == 1:
        row = torch.tensor([list(ids[0])], device=device)
        return {"input_ids": row, "attention_mask": torch.ones_like(row)}
    return tokenizer.pad({"input_ids": [list(row) for row in ids]}, padding_side="left", return_tensors="pt").to(device)


def unknown_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that have an embedding row but no token, such as the rows that pad the vocabulary."""
    rows = whole_shape(model.get_output_embeddings().weight)[0]
    return sorted(set(range(rows)).difference(tokenizer.get_vocab().values()))


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that end an answer: the tokenizer's, and those of the checkpoint's generation config."""
    configured = model.generation_config.eos_token_id
    ends = configured if isinstance(configured, list) else [configured]
    return sorted({end for end in [tokenizer.eos_token_id, *ends] if end is not None})


def check_length(config: Any, prompt_tokens: int, max_new_tokens: int, prompt: str = "a prompt") -> None:
    """Refuse a prompt that, with its answer, exceeds the model's positions.

    Models with learned positions would fail there with an index error.

    Args:
        prompt: name of the prompt, for the message.

    Raises:
        UserError: it is too long.
    """
    positions = max_positions(config)
    if positions is not None and prompt_tokens + max_new_tokens > positions:
        raise UserError(
            f"{prompt} of {prompt_tokens} tokens and --max_new_tokens {max_new_tokens} exceed the model's "
            f"{positions} positions: shorten one of them"
        )


# ------------------------------------------------------------------------- the functions of the original


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Any,
    num_beams: int = 1,
    num_beam_groups: int = 1,
    do_sample: bool = False,
    num_return_sequences: int = 1,
    max_new_tokens: int = 100,
    **settings: Any,
) -> list[str]:
    """Return prompt and all that the model wrote, without special tokens, for every row of `inputs`.

    Args:
        inputs: the tokenizer's result for one prompt, or for several padded on the left.
        do_sample: draw each token from the 50 likeliest, or as many as a `top_k` in `settings` says (0: from all).
        settings: further settings of `generate_ids`, such as the `diversity_penalty` of several beam groups.

    Raises:
        UserError: several answers of greedy decoding, which has one, or texts that exceed the model's positions.
    """
    if num_return_sequences > 1 and num_beams == 1 and not do_sample:
        raise UserError(f"greedy decoding has one answer, not num_return_sequences={num_return_sequences}")
    numbers = {"num_beams": num_beams, "num_return_sequences": num_return_sequences}
    settings = {"stop_at_human": False, **settings, **numbers, "do_sample": do_sample}
    if num_beam_groups > 1:
        settings |= {"num_beam_groups": num_beam_groups, "custom_generate": diverse_beam_search}
    output = generate_ids(model, tokenizer, inputs, max_new_tokens, **settings)
    return [decode(tokenizer, row) for row in output.tolist()]


def generate_constrastive_search(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Any,
    top_k: int = 4,
    penalty_alpha: float = 0.6,
    num_return_sequences: int = 1,
    max_new_tokens: int = 100,
) -> list[str]:
    """Return prompt and all that the model wrote, like `generate`, decoded by contrastive search."""
    if num_return_sequences > 1:
        raise UserError(f"contrastive search has one answer, not num_return_sequences={num_return_sequences}")
    return generate(
        model, tokenizer, inputs, max_new_tokens=max_new_tokens, top_k=top_k, penalty_alpha=penalty_alpha,
        custom_generate=contrastive_search,
    )  # fmt: skip
