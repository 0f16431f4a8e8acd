"""Says whether perplexities can be compared: those of two models with each other, and with what training printed."""

from argparse import Namespace
from typing import Any

from utils.data.prompt_dataset import PromptDataset
from utils.files import read_run_file

# What decides the samples that are measured.
SAME_SAMPLES = (
    "sft_only_data_path", "eval_data_path", "data_split", "columns", "chat_template", "max_seq_len",
    "completion_only_loss", "train_turns", "template_date", "overlong", "add_eot_token", "eot_token", "seed",
)  # fmt: skip


def describe_samples(data: dict[str, PromptDataset | None], ends: dict[str, str]) -> str | None:
    """Return a line on whether all models are measured on the same samples; None where nothing is measured.

    Args:
        data: the evaluation data of each model.
        ends: the end token of each model's tokenizer.
    """
    measured = [samples for samples in data.values() if samples is not None]
    if not measured:
        return None
    if len({samples.content[1:] for samples in measured}) == 1:
        return f"Evaluation: {len(measured[0])} samples, the same for both models"
    reason = "their tokenizers differ"
    if len(set(ends.values())) > 1:
        reason = f"they end in {' and '.join(map(repr, ends.values()))}; --add_eot_token gives both the same end token"
    return f"Evaluation: the samples of the two models differ ({reason}), so their perplexities can't be compared"


def training_date(folder: str | None) -> str | None:
    """Return the date that chat templates saw in the training of the model in `folder`; None where it is unknown."""
    return None if folder is None else _record(folder, "decisions").get("template_date")


def describe_training(folder: str, args: Namespace) -> str | None:
    """Return a line on what differs from the samples that the training of the model in `folder` evaluated, if known."""
    then = _record(folder, "arguments")
    ignored = set() if then.get("add_eot_token") or args.add_eot_token else {"eot_token"}
    ignored |= {"template_date"} if args.template_date in (None, training_date(folder)) else set()
    changed = [
        f"{name} {then[name]} then, {getattr(args, name)} now"
        for name in SAME_SAMPLES
        if name in then and name not in ignored and then[name] != getattr(args, name)
    ]
    if not changed:
        return None
    return f"Evaluation: not as in the training of {folder} ({'; '.join(changed)}), so perplexities differ from its own"


def _record(folder: str, key: str) -> dict[str, Any]:
    """Return a part of the run.json in `folder`; nothing where there is none."""
    part = read_run_file(folder).get(key)
    return part if isinstance(part, dict) else {}
