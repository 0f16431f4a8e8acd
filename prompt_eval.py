"""Answers of a baseline and of its fine-tuned model to the same prompts, one under the other.

Both models decode greedily, each with its own tokenizer.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from utils.errors import UserError
from utils.model.model_utils import create_hf_model
from utils.utils import load_hf_tokenizer

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
        "Human: 请用几句话介绍一下微软。 Assistant:",
        "Human: 请用几句话向一个六岁的孩子解释登月。 Assistant:",
        "Human: 写一首关于一只聪明的青蛙的短诗。 Assistant:",
        "Human: 1955年的美国总统是谁? Assistant:",
        "Human: 望远镜是怎样工作的? Assistant:",
        "Human: 鸟儿为什么要飞到南方过冬? Assistant:",
    ],
    "Japanese": [
        "Human: マイクロソフトについて数文で教えてください。 Assistant:",
        "Human: 6歳の子どもに月面着陸を数文で説明してください。 Assistant:",
        "Human: 賢いカエルについての短い詩を書いてください。 Assistant:",
        "Human: 1955年のアメリカ合衆国の大統領は誰でしたか? Assistant:",
        "Human: 望遠鏡はどのような仕組みですか? Assistant:",
        "Human: 鳥はなぜ冬になると南へ渡るのですか? Assistant:",
    ],
}
# What the arguments of strategies other than greedy decoding must be.
GREEDY_ONLY = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "top_k": 4,
    "penalty_alpha": 0.6,
    "num_return_sequences": 1,
}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description="Answers of two models to the same prompts, side by side.")
    models = parser.add_argument_group("models")
    models.add_argument(
        "--model_name_or_path_baseline",
        required=True,
        help="hub name or folder of the model before fine-tuning",
    )
    models.add_argument(
        "--model_name_or_path_finetune",
        required=True,
        help="folder of the fine-tuned model (its --output_dir)",
    )
    prompts = parser.add_argument_group("prompts")
    prompts.add_argument(
        "--language", choices=list(PROMPTS), default="English", help="language of the six built-in prompts"
    )
    prompts.add_argument(
        "--prompt", action="append", help="a prompt in place of the built-in ones; may be given several times"
    )
    decoding = parser.add_argument_group("decoding")
    decoding.add_argument("--max_new_tokens", type=int, default=100, help="most tokens in an answer")
    decoding.add_argument("--num_beams", type=int, default=1, help="beams; 1 is greedy decoding")
    decoding.add_argument("--num_beam_groups", type=int, default=1, help="groups of beams that differ")
    decoding.add_argument("--top_k", type=int, default=4, help="candidates of contrastive search")
    decoding.add_argument(
        "--penalty_alpha",
        type=float,
        default=0.6,
        help="weight of contrastive search's penalty for repeating",
    )
    decoding.add_argument("--num_return_sequences", type=int, default=1, help="answers per prompt")
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parsed arguments; everything wrong with them is said in one `UserError`."""
    args = build_parser().parse_args(argv)
    problems = [
        f"--{name} {getattr(args, name)}: only greedy decoding is available so far, leave it at {default}"
        for name, default in GREEDY_ONLY.items()
        if getattr(args, name) != default
    ]
    if args.max_new_tokens < 1:
        problems.append(f"--max_new_tokens {args.max_new_tokens}: at least 1 is needed")
    if any(not prompt.strip() for prompt in args.prompt or []):
        problems.append("--prompt: an empty prompt cannot be answered")
    if problems:
        raise UserError("\n".join(problems))
    return args


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Any,
    num_beams: int = 1,
    num_beam_groups: int = 1,
    do_sample: bool = False,
    num_return_sequences: int = 1,
    max_new_tokens: int = 100,
) -> list[str]:
    """Prompt and answer, without special tokens, for every row of `inputs` (what `tokenizer` returned)."""
    if num_beam_groups > 1:
        raise UserError("num_beam_groups above 1: diverse beam search is not available in this transformers")
    if num_return_sequences > 1 and num_beams == 1 and not do_sample:
        raise UserError(f"greedy decoding has one answer, not num_return_sequences={num_return_sequences}")
    check_length(model, inputs["input_ids"].shape[1], max_new_tokens)
    ends = end_token_ids(model, tokenizer)
    pad = next(token for token in [tokenizer.pad_token_id, *ends, 0] if token is not None)
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        num_beams=num_beams,
        do_sample=do_sample,
        num_return_sequences=num_return_sequences,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=pad,
        suppress_tokens=unknown_token_ids(model, tokenizer) or None,
    )
    return tokenizer.batch_decode(output, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def generate_constrastive_search(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Any,
    top_k: int = 4,
    penalty_alpha: float = 0.6,
    num_return_sequences: int = 1,
    max_new_tokens: int = 100,
) -> list[str]:
    """Like `generate`, with contrastive search (which transformers 5 no longer has)."""
    raise UserError("contrastive search is not available yet in this transformers; greedy decoding is")


def unknown_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids the model has a row for and its tokenizer no token: the padding of an embedding, and holes."""
    rows = model.get_output_embeddings().weight.shape[0]
    return sorted(set(range(rows)).difference(tokenizer.get_vocab().values()))


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end an answer: the tokenizer's, and those the checkpoint's generation config adds."""
    configured = model.generation_config.eos_token_id
    ends = configured if isinstance(configured, list) else [configured]
    return sorted({end for end in [tokenizer.eos_token_id, *ends] if end is not None})


def check_length(model: PreTrainedModel, prompt_tokens: int, max_new_tokens: int) -> None:
    """Refuses what would run past the model's positions (learned ones fail there with an index error)."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and prompt_tokens + max_new_tokens > positions:
        raise UserError(
            f"a prompt of {prompt_tokens} tokens and --max_new_tokens {max_new_tokens} exceed the model's "
            f"{positions} positions: shorten one of them"
        )


def print_utils(gen_output: Sequence[str]) -> None:
    """Prints the answers, each between empty lines."""
    for text in gen_output:
        print(f"\n{text}\n")


def prompt_eval(
    args: argparse.Namespace,
    model_baseline: PreTrainedModel,
    model_fintuned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device | str,
    prompts: Sequence[str],
    tokenizer_fintuned: PreTrainedTokenizerBase | None = None,
) -> None:
    """Prints the greedy answers of both models; `tokenizer` is the baseline's, and both models' if alone."""
    sides = [
        ("Baseline", model_baseline, tokenizer),
        ("finetune", model_fintuned, tokenizer if tokenizer_fintuned is None else tokenizer_fintuned),
    ]
    for prompt in prompts:
        for name, model, own_tokenizer in sides:
            inputs = own_tokenizer(prompt, return_tensors="pt", return_attention_mask=True).to(device)
            print(f"=========={name}: Greedy=========")
            print_utils(generate(model, own_tokenizer, inputs, max_new_tokens=args.max_new_tokens))
        print("====================prompt end=============================\n\n", flush=True)


def load(path: str, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model on the device, ready to answer, and tokenizer of one checkpoint."""
    if not os.path.isdir(path) and (path.startswith(("/", ".", "~")) or path.count("/") > 1):
        raise UserError(f"{path}: there is no such folder")
    if os.path.isdir(path) and not os.path.isfile(os.path.join(path, "config.json")):
        raise UserError(f"{path}: no model here (config.json is missing); is it a run's --output_dir?")
    try:
        dtype = AutoConfig.from_pretrained(path).dtype or torch.float32
        tokenizer = load_hf_tokenizer(path, fast_tokenizer=True)
        model = create_hf_model(AutoModelForCausalLM, path, tokenizer, None)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{path}: cannot be loaded, neither as a folder nor from the hub ({reason})") from error
    if device == "cpu":
        dtype = torch.float32  # half precision is slow there, and rounds differently
    return model.to(device=device, dtype=dtype).eval(), tokenizer


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    args = parse_args(argv)
    device = get_accelerator().device_name()
    model_baseline, tokenizer_baseline = load(args.model_name_or_path_baseline, device)
    model_fintuned, tokenizer_fintuned = load(args.model_name_or_path_finetune, device)
    print(f"on {device}: baseline in {model_baseline.dtype}, fine-tuned in {model_fintuned.dtype}")
    prompts = args.prompt or PROMPTS[args.language]
    prompt_eval(args, model_baseline, model_fintuned, tokenizer_baseline, device, prompts, tokenizer_fintuned)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"prompt_eval.py: {error}", file=sys.stderr)
        sys.exit(2)
