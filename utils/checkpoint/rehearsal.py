"""Try before the first step what saving does after the last: what fails there would cost the whole run.

Configurations, tokenizer, chat template and card are written into a folder of their own and read back, the
names of the weights are planned, and the disk is asked for the room. What can be mended is mended, with a line.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile

import deepspeed
import torch
import transformers

from utils.checkpoint.write_checkpoint import checkpoint_bytes
from utils.distributed.ranks import answer_of_rank_0, is_rank_0, print_rank_0
from utils.errors import UserError
from utils.export.hf_model import unwrap, write_all_but_weights
from utils.export.model_card import describe_model
from utils.export.verify import compare_tokenizers
from utils.export.weights import saved_bytes
from utils.files import INCOMPLETE
from utils.logging.console import say
from utils.logging.metrics_file import METRICS_FILE
from utils.module.remote_code import is_trusted
from utils.run_config import RunConfig

EXAMPLE_RECORDS = (
    {"epoch": 0, "step": 0, "eval_loss": 2.0, "perplexity": 7.39},
    {"epoch": 1, "step": 1, "loss": 2.0, "learning_rate": 1e-3, "grad_norm": 1.0},
)


def rehearse_saving(
    config: RunConfig, engine: deepspeed.DeepSpeedEngine, tokenizer: transformers.PreTrainedTokenizerBase
) -> None:
    """Try all of saving but the weights, and mend what can be mended. Every rank must call it.

    Raises:
        UserError: what can't be saved, and why; or the disk is too small.
    """
    if config.args.output_dir is None:
        return
    model = unwrap(engine)
    mend_generation(model)  # on every rank: the objects stay the same everywhere
    problem = None
    if is_rank_0():
        try:
            _try_saving(config, model, tokenizer)
            _check_space(config, engine)
        except UserError as err:
            problem = str(err)
    problem = answer_of_rank_0(problem)
    if problem is not None:
        raise UserError(problem)


def _try_saving(
    config: RunConfig, model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase
) -> None:
    """Write all but the weights into a folder that is removed again, and read it back."""
    output_dir = config.args.output_dir
    try:
        with tempfile.TemporaryDirectory(prefix=f"{INCOMPLETE}rehearsal-", dir=output_dir) as work:
            with open(os.path.join(work, METRICS_FILE), "w", encoding="utf-8") as file:
                file.writelines(f"{json.dumps(record)}\n" for record in EXAMPLE_RECORDS)
            write_all_but_weights(model, tokenizer, work, describe_model(config, tokenizer, work, False))
            transformers.AutoConfig.from_pretrained(work, local_files_only=True, trust_remote_code=is_trusted())
            compare_tokenizers(work, tokenizer, torch.empty(0, dtype=torch.long))
    except Exception as err:  # whatever transformers or tokenizers raise would end the run later
        reason = str(err) if isinstance(err, UserError) else f"{type(err).__name__}: {' '.join(str(err).split())}"
        raise UserError(
            f"the model could not be saved after training: {reason[:500]} (tried with all but the weights). Mend the "
            f"files of {config.args.model_name_or_path}, or what the message names, first."
        ) from err


# --------------------------------------------------------------------------------------- what can be mended


def mend_generation(model: transformers.PreTrainedModel) -> None:
    """Bring the settings of generation into the form that transformers saves, and print what was changed.

    Settings in the model's configuration move to those of generation. Settings without effect (a temperature without
    sampling) are left out: transformers refuses to save them once anything else has changed, such as the end token.

    Raises:
        UserError: they contradict each other in another way.
    """
    generation = getattr(model, "generation_config", None)
    if generation is None:
        return
    moved = getattr(model.config, "_get_generation_parameters", dict)()
    for name, value in moved.items():
        if getattr(generation, name, None) == getattr(transformers.GenerationConfig(), name, None):
            setattr(generation, name, value)
        delattr(model.config, name)
    if moved:
        print_rank_0(f"Settings of generation in the model's config.json are saved in generation_config.json: {moved}")
    dropped = _drop_without_effect(generation)
    if dropped:
        words = ", ".join(f"{name} {value}" for name, value in dropped.items())
        print_rank_0(
            f"Settings of generation without effect, which transformers refuses to save, are left out: {words} "
            f"(do_sample is {generation.do_sample}, num_beams {generation.num_beams})"
        )


def _drop_without_effect(generation: transformers.GenerationConfig) -> dict[str, object]:
    """Set what keeps `generation` from being saved back to its default; returns what it was."""
    default, dropped = transformers.GenerationConfig(), {}
    while (refusal := _refusal(generation)) is not None:
        candidates = [name for name in generation.to_diff_dict() if name not in dropped and hasattr(default, name)]
        candidates.sort(key=lambda name: f"`{name}`" not in refusal)  # those it names first
        for name in candidates:
            value = getattr(generation, name)
            setattr(generation, name, getattr(default, name))
            if _refusal(generation) != refusal:
                dropped[name] = value
                break
            setattr(generation, name, value)
        else:
            raise UserError(f"the model's generation_config.json can't be saved: {' '.join(refusal.split())[:500]}")
    return dropped


def _refusal(generation: transformers.GenerationConfig) -> str | None:
    """Return why transformers would not save these settings."""
    try:
        generation.validate(strict=True)
    except ValueError as err:
        return str(err)
    return None


# ------------------------------------------------------------------------------------------------- the disk


def _check_space(config: RunConfig, engine: deepspeed.DeepSpeedEngine) -> None:
    """Compare the free disk with what the run writes at least, and print how many checkpoints fit if that is few.

    Raises:
        UserError: there is no room for the model and, where the run writes them, one checkpoint and the best model.
    """
    args = config.args
    free, model = shutil.disk_usage(args.output_dir).free, saved_bytes(unwrap(engine))
    parts = {"the saved model": model}
    if args.load_best_model_at_end:
        parts["the best model, kept until a better one is written"] = model
    checkpoint = checkpoint_bytes(engine, config.save_only_model) if args.save_strategy != "no" else 0
    if checkpoint:
        parts["a checkpoint"] = checkpoint
    needed = sum(parts.values())
    if free < needed:
        words = ", ".join(f"{what} {size / 1e9:.3g}" for what, size in parts.items())
        raise UserError(
            f"--output_dir {args.output_dir}: the disk has {free / 1e9:.3g} GB free, and the run needs about "
            f"{needed / 1e9:.3g} GB ({words}). Make room, or give a folder on another disk."
        )
    limit = args.save_total_limit
    if checkpoint and limit is not None and free < needed + limit * checkpoint:
        fit = 1 + (free - needed) // checkpoint
        say(
            f"Disk: {free / 1e9:.3g} GB free hold {fit} checkpoint(s) of {checkpoint / 1e9:.3g} GB beside the model; "
            f"--save_total_limit {limit} keeps {limit} and writes the next beside them"
        )
