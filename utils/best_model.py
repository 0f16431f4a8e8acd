"""The model of the lowest evaluation loss so far, kept beside the checkpoints as a plain model folder."""

import json
import os
import shutil
from argparse import Namespace

import deepspeed
import torch
from transformers import PreTrainedTokenizerBase

from utils.checkpoint import checkpoints_folder
from utils.errors import UserError
from utils.metrics import PICTURE
from utils.model_card import describe_model
from utils.module.adapter import ADAPTER_FOLDER, save_lora_adapter
from utils.run_state import RunState
from utils.saving import live_logits, publish_model, save_model_folder, settled, unwrap, verify_saved_model
from utils.utils import answer_of_rank_0, global_rank, print_rank_0

NAME = "best_model"
RECORD = "best.json"


def _folder(args: Namespace) -> str:
    return os.path.join(checkpoints_folder(args.output_dir), NAME)


def forget_best_model(args: Namespace) -> None:
    """Remove an earlier run's; called by a run that starts anew."""
    if args.output_dir and global_rank() == 0:
        shutil.rmtree(_folder(args), ignore_errors=True)


def keep_best_model(
    engine: deepspeed.DeepSpeedEngine,
    tokenizer: PreTrainedTokenizerBase,
    sample: torch.Tensor,
    state: RunState,
    args: Namespace,
) -> None:
    """Save the model as the best so far, verified, in place of the one before. Every rank must call it."""
    folder, work = _folder(args), os.path.join(checkpoints_folder(args.output_dir), ".incomplete-" + NAME)
    if global_rank() == 0:
        shutil.rmtree(work, ignore_errors=True)
    expected = live_logits(engine.module, sample.to(engine.device))
    save_model_folder(settled(engine), tokenizer, work, describe_model(args, tokenizer), args.max_shard_size)
    if args.save_lora_adapter:
        save_lora_adapter(unwrap(engine), args.model_name_or_path, os.path.join(work, ADAPTER_FOLDER))
    if global_rank() == 0:
        verify_saved_model(work, sample, expected)
        with open(os.path.join(work, RECORD), "w", encoding="utf-8") as file:
            json.dump({"step": state.step, "eval_loss": state.best_loss}, file)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(work, folder)
    print_rank_0(f"Best model so far: step {state.step}, evaluation loss {state.best_loss:.6g}")


def publish_best_model(args: Namespace) -> bool:
    """Make the best model the final one, in `--output_dir`; False when there is none. Every rank must call it.

    Raises:
        UserError: it can't be written; the best model stays where it is.
    """
    folder = _folder(args)
    found = answer_of_rank_0(os.path.isfile(os.path.join(folder, RECORD)))
    if found and global_rank() == 0:
        try:
            publish_model(folder, args.output_dir, leave_out=(RECORD, PICTURE))
        except OSError as err:
            raise UserError(
                f"can't copy the best model to {args.output_dir} ({err}): it is whole in {folder}."
            ) from err
        with open(os.path.join(folder, RECORD), encoding="utf-8") as file:
            best = json.load(file)
        print_rank_0(
            f"Saved to {args.output_dir}: the model of step {best['step']}, evaluation loss {best['eval_loss']:.6g}, "
            "verified when it was kept"
        )
    return found
