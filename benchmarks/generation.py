"""Answers per second: 24 prompts at once against one by one, and what each strategy costs.

    python benchmarks/generation.py                      # the demo's tiny OPT, and a random OPT of 125m's shape
    python benchmarks/generation.py --model FOLDER ...   # your own

Both ways run in the same process, taking turns, after a warm-up of each; the best round of each counts, since other
work on the machine can only slow one down. Random models seldom end by themselves, so both ways make about
`--max_new_tokens` per prompt; what is counted is what was really generated.
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


def parse_arguments() -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="*", help="folders; by default the demo's model and OPT-125m's shape")
    parser.add_argument("--strategies", default="greedy", help="as prompt_eval.py's")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def the_prompts() -> list[str]:
    """The 18 built-in prompts, and the first six of the demo's evaluation records."""
    from utils.prompt_eval.prompts import PROMPTS as built_in

    records = json.loads((ROOT / "data" / "eval.json").read_text(encoding="utf-8"))
    built = [prompt for prompts in built_in.values() for prompt in prompts]
    return built + [record["prompt"] for record in records[: PROMPTS - len(built)]]


def make_models(folder: Path) -> list[str]:
    """The demo's untrained model, and OPT-125m's shape with random weights and the demo's tokenizer."""
    from demo import make_tiny_opt

    make_tiny_opt.make_model(folder / "demo")
    torch.manual_seed(0)
    config = OPTConfig(bos_token_id=2, pad_token_id=1, eos_token_id=2)  # its defaults are OPT-125m's
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "opt-125m")
    for name in make_tiny_opt.TOKENIZER_FILES:
        (folder / "opt-125m" / name).write_bytes((folder / "demo" / name).read_bytes())
    return [str(folder / "demo"), str(folder / "opt-125m")]


def measure(path: str, args: Namespace) -> None:
    from utils.prompt_eval.answers import STRATEGIES, answer_prompts, decoding
    from utils.prompt_eval.arguments import parse_args
    from utils.prompt_eval.models import load

    model, tokenizer = load(path, args.device)
    prompts = the_prompts()
    models = ["--model_name_or_path_baseline", path, "--model_name_or_path_finetune", path]
    flags = ["--strategies", args.strategies, "--max_new_tokens", str(args.max_new_tokens)]
    settings = parse_args([*models, *flags])
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6

    for strategy in settings.strategies:
        best = dict.fromkeys((1, PROMPTS), 0.0)
        texts = {}
        for number in range(args.rounds + 1):
            for batch in best:
                torch.manual_seed(0)
                start = time.perf_counter()
                answers = answer_prompts(model, tokenizer, prompts, decoding(strategy, settings), batch)
                rate = sum(answer.tokens for of_one in answers for answer in of_one) / (time.perf_counter() - start)
                best[batch] = max(best[batch], rate if number else 0.0)
                texts[batch] = answers
        print(
            f"| {Path(path).name}, {size:.1f}M | {STRATEGIES[strategy]} | {best[1]:.0f} | {best[PROMPTS]:.0f} | "
            f"{best[PROMPTS] / best[1]:.1f} | {'yes' if texts[1] == texts[PROMPTS] else 'no'} |",
            flush=True,
        )


def main() -> None:
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        paths = args.model or make_models(Path(folder))
        print(f"\n| model | strategy | tokens/s one by one | {PROMPTS} at once | x | same answers |")
        print("| --- | --- | --- | --- | --- | --- |")
        for path in paths:
            measure(path, args)


if __name__ == "__main__":
    main()
