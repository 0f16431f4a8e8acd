"""Tokens per second of prompt_eval.py's answers: 24 prompts at once against one by one, for each strategy.

    python benchmarks/generation.py                      # the demo's tiny OPT, and a random OPT of 125m's shape
    python benchmarks/generation.py --model FOLDER ...   # your own models

Both ways run in the same process, in turns, after a warm-up of each; the best round of each counts, because other
work on the machine can only slow a round down. Random models seldom end an answer by themselves, so both ways generate
about `--max_new_tokens` per prompt; the tokens that were really generated are counted.
"""

import argparse
import json
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, OPTConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PROMPTS = 24


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", nargs="*", help="model folders; by default the demo's, and a random one of OPT-125m's shape"
    )
    parser.add_argument("--strategies", default="greedy", help="strategies to time, as in prompt_eval.py")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="maximum number of tokens in an answer")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds, of which the best counts")
    parser.add_argument("--device", default="cpu", help="device to run on: cpu, cuda, ...")
    return parser


def the_prompts() -> list[str]:
    """Return the 18 built-in prompts, and those of the first six evaluation records of the demo."""
    from utils.prompt_eval.prompts import PROMPTS as built_in

    records = json.loads((ROOT / "data" / "eval.json").read_text(encoding="utf-8"))
    built = [prompt for prompts in built_in.values() for prompt in prompts]
    return built + [record["prompt"] for record in records[: PROMPTS - len(built)]]


def make_models(folder: Path) -> list[str]:
    """Write the demo's untrained model and a random one of OPT-125m's shape; returns their folders.

    Both have the demo's tokenizer.
    """
    from demo import make_tiny_opt

    make_tiny_opt.make_model(folder / "demo")
    torch.manual_seed(0)
    config = OPTConfig(bos_token_id=2, pad_token_id=1, eos_token_id=2)  # its defaults are OPT-125m's
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "opt-125m")
    for name in make_tiny_opt.TOKENIZER_FILES:
        (folder / "opt-125m" / name).write_bytes((folder / "demo" / name).read_bytes())
    return [str(folder / "demo"), str(folder / "opt-125m")]


def measure(path: str, args: Namespace) -> None:
    """Print a row of the table for every strategy of one model."""
    from utils.prompt_eval.answers import answer_prompts
    from utils.prompt_eval.arguments import parse_args
    from utils.prompt_eval.config import STRATEGIES, EvalConfig
    from utils.prompt_eval.models import load

    model, tokenizer = load(path, args.device)
    prompts = tokenizer(the_prompts())["input_ids"]
    models = ["--model_name_or_path_baseline", path, "--model_name_or_path_finetune", path]
    flags = ["--strategies", args.strategies, "--max_new_tokens", str(args.max_new_tokens)]
    config = EvalConfig.resolve(parse_args([*models, *flags]))
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6

    for strategy in config.strategies:
        best = dict.fromkeys((1, PROMPTS), 0.0)
        texts = {}
        for number in range(args.rounds + 1):
            for batch in best:
                torch.manual_seed(0)
                start = time.perf_counter()
                answers = answer_prompts(model, tokenizer, prompts, config.decoding(strategy), batch)
                rate = sum(answer.tokens for of_one in answers for answer in of_one) / (time.perf_counter() - start)
                best[batch] = max(best[batch], rate if number else 0.0)
                texts[batch] = answers
        print(
            f"| {Path(path).name}, {size:.1f}M | {STRATEGIES[strategy]} | {best[1]:.0f} | {best[PROMPTS]:.0f} | "
            f"{best[PROMPTS] / best[1]:.1f} | {'yes' if texts[1] == texts[PROMPTS] else 'no'} |",
            flush=True,
        )


def main() -> None:
    """Print the table."""
    args = build_parser().parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = args.model or make_models(Path(folder))
        print(f"\n| model | strategy | tokens/s one by one | {PROMPTS} at once | x | same answers |")
        print("| --- | --- | --- | --- | --- | --- |")
        for path in paths:
            measure(path, args)


if __name__ == "__main__":
    main()
