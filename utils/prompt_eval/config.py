"""The configuration of a comparison: its arguments as typed, and the decisions made from them."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from utils.notation import asked_eot_token
from utils.prompt_eval.prompts import PROMPTS, read_prompt_file

# The names that --strategies takes, and the headings of their answers.
STRATEGIES = {
    "greedy": "Greedy",
    "multinomial": "Multinomial sampling",
    "beam": "Beam Search",
    "beam_multinomial": "Beam-search multinomial sampling",
    "diverse_beam": "Diverse Beam Search",
    "contrastive": "Contrastive Search",
}
# The headings of the two models, as the original prints them.
HEADINGS = {"baseline": "Baseline", "finetuned": "finetune"}
ONE_ANSWER = ("greedy", "contrastive")  # deterministic, with a single best answer
WRITTEN, CHAT = "written", "chat"  # the values of --prompt_form
SAMPLING = ("multinomial", "beam_multinomial")
BEAM_STRATEGIES = ("beam", "beam_multinomial", "diverse_beam")
USUAL_BEAMS = 4


@dataclass(frozen=True)
class EvalConfig:
    """A comparison: its arguments as typed, and the decisions made from them."""

    args: Namespace  # as typed: read, never written
    strategies: tuple[str, ...]  # keys of STRATEGIES, in the order given
    prompts: tuple[str, ...]
    num_beams: int
    num_beam_groups: int
    references: tuple[str, ...] = ()  # the data's own answer to each prompt, with `--references`
    adds_special: tuple[bool, ...] = ()  # whether each prompt gets the tokenizer's special tokens; empty: all do

    @classmethod
    def resolve(cls, args: Namespace, prompts: Sequence[str] | None = None) -> "EvalConfig":
        """Decide what the arguments leave open, and print the choice of beams.

        Args:
            args: checked, as `utils.prompt_eval.arguments.parse_args` returns them.
            prompts: prompts to ask instead of those the arguments name.
        """
        strategies = split_strategies(args.strategies)
        beams, groups = choose_beams(args, strategies)
        _print_beams(args, strategies, beams, groups)
        asked = given_prompts(args) if prompts is None and args.references is None else prompts or ()
        return cls(args, tuple(strategies), tuple(asked), beams, groups)

    @property
    def extra_token(self) -> str | None:
        """Return the end token to add to both tokenizers, as training does; None without `--add_eot_token`."""
        return asked_eot_token(self.args)

    @property
    def models(self) -> dict[str, str]:
        """Return the hub names or folders of "baseline" and "finetuned", as far as they were given."""
        args = self.args
        both = {"baseline": args.model_name_or_path_baseline, "finetuned": args.model_name_or_path_finetune}
        return {name: path for name, path in both.items() if path}

    def decoding(self, strategy: str) -> dict[str, Any]:
        """Return the settings with which `generate_ids` decodes by one of the strategies."""
        from utils.prompt_eval.search import contrastive_search, diverse_beam_search  # imports torch

        args = self.args
        common = {
            "max_new_tokens": args.max_new_tokens,
            "num_return_sequences": args.num_return_sequences,
            "repetition_penalty": args.repetition_penalty,
            "stop_at_human": args.stop_at_human,
        }
        sampling = {
            "do_sample": True, "temperature": args.temperature, "top_p": args.top_p, "top_k": args.sampling_top_k,
        }  # fmt: skip
        beams = {"num_beams": self.num_beams}
        own = {
            "greedy": {},
            "multinomial": sampling,
            "beam": beams,
            "beam_multinomial": beams | sampling,
            "diverse_beam": beams
            | {
                "num_beam_groups": self.num_beam_groups,
                "diversity_penalty": args.diversity_penalty,
                "custom_generate": diverse_beam_search,
            },
            "contrastive": {
                "top_k": args.top_k,
                "penalty_alpha": args.penalty_alpha,
                "custom_generate": contrastive_search,
            },
        }
        return common | own[strategy]

    @property
    def settings(self) -> list[str]:
        """Return the settings that the answers depend on, each in a few words."""
        args, used = self.args, set(self.strategies)
        parts = [f"{len(self.prompts)} prompts"] * (not args.interactive)
        parts += [f"at most {args.max_new_tokens} new tokens", f"seed {args.seed}"]
        parts.append('answers end at "Human:"' if args.stop_at_human else 'answers go on after "Human:"')
        if used & set(BEAM_STRATEGIES):
            parts.append(f"{self.num_beams} beams")
        if "diverse_beam" in used:
            parts.append(f"{self.num_beam_groups} groups, diversity penalty {args.diversity_penalty}")
        if used & set(SAMPLING):
            drawn = f"the {args.sampling_top_k} likeliest tokens" if args.sampling_top_k else "all tokens"
            parts.append(f"sampling from {drawn}, temperature {args.temperature}, top-p {args.top_p}")
        if "contrastive" in used:
            parts.append(f"contrastive: top-k {args.top_k}, alpha {args.penalty_alpha}")
        if args.repetition_penalty != 1:
            parts.append(f"repetition penalty {args.repetition_penalty}")
        return parts


def split_strategies(text: str) -> list[str]:
    """Return the names in `--strategies`, each once, in the order given; "all" stands for every strategy."""
    names = STRATEGIES if text.strip() == "all" else [name.strip() for name in text.split(",")]
    return list(dict.fromkeys(names))


def choose_beams(args: Namespace, strategies: Sequence[str]) -> tuple[int, int]:
    """Return (beams, groups of beams): as typed, or a choice where they are 1 and a strategy needs several."""
    beams, groups = args.num_beams, args.num_beam_groups
    if not set(strategies) & set(BEAM_STRATEGIES):
        return beams, groups
    if beams == 1:
        beams = max(USUAL_BEAMS, groups, args.num_return_sequences)
    if "diverse_beam" in strategies and groups == 1:
        groups = beams
    return beams, groups


def given_prompts(args: Namespace) -> list[str]:
    """Return the prompts of the command line, then those of the file; the built-in ones where neither is given.

    Raises:
        UserError: the file can't be used, see `read_prompt_file`.
    """
    prompts = list(args.prompt or [])
    if args.prompt_file:
        prompts += read_prompt_file(args.prompt_file)
    return prompts or PROMPTS[args.language]


def _print_beams(args: Namespace, strategies: Sequence[str], beams: int, groups: int) -> None:
    """Print the numbers that `choose_beams` chose, or which flags have no effect because no strategy uses beams."""
    if not set(strategies) & set(BEAM_STRATEGIES):
        unused = [f"--{name}" for name in ("num_beams", "num_beam_groups") if getattr(args, name) > 1]
        if unused:
            print(f"{' and '.join(unused)}: no effect, since none of the --strategies uses beams")
        return
    chosen = [f"{beams} beams"] * (beams != args.num_beams)
    chosen += [f"{groups} groups of one beam for diverse_beam"] * (groups != args.num_beam_groups)
    if chosen:
        print(f"Beams: {', '.join(chosen)} (left at 1; --num_beams and --num_beam_groups set others)")
