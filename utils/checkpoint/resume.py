"""Resume a run from a checkpoint: compare its arguments and data, and restore weights, optimizer and schedule."""

import hashlib
import os
from argparse import Namespace
from datetime import date
from typing import Any

import deepspeed
from transformers import PreTrainedTokenizerBase

from utils.checkpoint.base_identity import changed_configuration, configuration_record, vocabulary_record
from utils.checkpoint.checkpoint_folder import Checkpoint, checkpoints_folder, find_checkpoint, list_checkpoints
from utils.checkpoint.universal import load_full_states, optimizer_group_names, optimizer_parameter_names
from utils.data.cache import content_sum
from utils.data.mixture import divided_as
from utils.data.training_data import TrainingData
from utils.distributed.launchers import launched_rank, launched_ranks
from utils.distributed.ranks import answer_of_rank_0, print_rank_0, world_size
from utils.ds_file.read import read_deepspeed_file
from utils.engine.engine import recount_updates
from utils.errors import UserError
from utils.files import read_run_file
from utils.logging.console import say
from utils.model.fingerprint import base_fingerprint, files_fingerprint
from utils.notation import parse_source
from utils.run_config import RunConfig
from utils.train.plan import RunPlan
from utils.train.state import RunState

# Arguments that change the mathematics of what is still to come.
SAME_RUN = (
    "model_name_or_path", "data_path", "data_split", "sft_only_data_path", "max_seq_len", "packing", "seed",
    "completion_only_loss", "add_eot_token", "eot_token", "learning_rate", "lora_learning_rate", "weight_decay",
    "num_train_epochs", "max_steps", "lr_scheduler_type", "num_warmup_steps", "dropout", "disable_dropout",
    "neftune_noise_alpha", "lora_dim", "lora_module_name", "lora_alpha",
    "lora_rslora", "lora_plus_ratio", "lora_dropout", "only_optimize_lora", "quantize_base",
    "columns", "chat_template", "streaming", "train_turns", "overlong",
)  # fmt: skip
PATHS = ("model_name_or_path", "data_path", "sft_only_data_path")


def arguments_record(args: Namespace, ranks: int) -> dict[str, Any]:
    """Return the arguments that a run and its continuation must share, as a JSON file holds them."""
    record = {}
    for name in SAME_RUN:
        value = getattr(args, name)
        if name in PATHS:
            value = [_place(path) for path in value] if isinstance(value, list) else _place(value)
        record[name] = getattr(value, "value", value)
    record["data_split"] = divided_as(args.data_path, args.data_split)
    record["gradient_clipping"] = float(
        read_deepspeed_file(args, launched_ranks()).settings.get("gradient_clipping", 1)
    )
    record["samples per step"] = args.per_device_train_batch_size * args.gradient_accumulation_steps * ranks
    return record


def _place(path: str) -> str:
    """Return a folder's full path, the same from any working directory; a hub name stays as it is."""
    name, weight = parse_source(path)
    place = os.path.realpath(name) if os.path.exists(name) else name
    return place if weight == 1 else f"{place}:{weight:g}"


def changed_arguments(checkpoint: Checkpoint, args: Namespace, ranks: int) -> list[str]:
    """List what differs from the run that wrote the checkpoint, one "name: then, now" each."""
    now, then = arguments_record(args, ranks), checkpoint.info["arguments"]
    begun = _date_of(checkpoint)
    if begun is not None and args.template_date is not None:
        now, then = now | {"template_date": args.template_date}, then | {"template_date": begun}
    return [
        f"{name}: {then.get(name)} then, {now[name]} now" for name in now if name in then and then[name] != now[name]
    ]


def _date_of(checkpoint: Checkpoint) -> str | None:
    """Return the date that chat templates saw in the run that wrote the checkpoint."""
    of_arguments = checkpoint.info["arguments"].get("template_date")
    return checkpoint.info.get("decisions", {}).get("template_date") or of_arguments


def date_of_run(args: Namespace) -> str:
    """Return the date for a chat template that asks for it: as given, else when the run began, else today.

    Every rank must call it: all get the date of rank 0.
    """
    today = date.today().isoformat()
    begun = None
    if args.template_date is None and (checkpoint := find_checkpoint(args.output_dir, args.resume_from_checkpoint)):
        begun = _date_of(checkpoint)
    if begun not in (None, today):
        print_rank_0(f"Date, for a chat template that asks for it: {begun}, when the run that is resumed began")
    return answer_of_rank_0(args.template_date or begun or today)


def decisions_of_run(args: Namespace) -> dict[str, Any] | None:
    """Return the decisions that a run with `--fit` keeps: of the run that is resumed, else of `--like`'s; else None."""
    if args.fit is None:
        return None
    if (checkpoint := find_checkpoint(args.output_dir, args.resume_from_checkpoint)) is not None:
        return checkpoint.info.get("decisions")
    return None if args.like is None else read_run_file(args.like).get("decisions")


def newest_checkpoint(args: Namespace) -> str | None:
    """Return what `--resume_from_checkpoint` is to be after a failure: this run's last checkpoint, else as it was."""
    complete, _ = list_checkpoints(checkpoints_folder(args.output_dir)) if args.output_dir else ([], [])
    folders = [checkpoint.folder for checkpoint in complete if checkpoint.info["kind"] == "full"]
    return folders[-1] if folders else args.resume_from_checkpoint


def data_record(data: TrainingData, args: Namespace, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return what identifies the training data: its size, and hashes of every sample's length and of its content.

    And the vocabulary whose ids they are, and the content of the evaluation data.

    Of a stream only the first window is known: its files are sampled too.
    """
    lengths = data.train.lengths()
    record = {
        "samples": len(lengths),
        "lengths": hashlib.sha256(lengths.tobytes()).hexdigest()[:16],
        "content": f"{content_sum(data.train.table.with_format(None)):08x}",
        "evaluation": f"{content_sum(data.evaluation.table.with_format(None)):08x}",
        "vocabulary": vocabulary_record(tokenizer),
    }
    if args.streaming:
        names = [parse_source(name).name for name in (*args.data_path, *args.sft_only_data_path)]
        record["files"] = files_fingerprint(name for name in names if os.path.exists(name))
    return record


def base_record(args: Namespace) -> str | None:
    """Return what identifies the frozen weights, which checkpoints leave out; None where all weights train."""
    return base_fingerprint(args.model_name_or_path) if args.lora_dim > 0 else None


def layout_record(engine: deepspeed.DeepSpeedEngine) -> dict[str, Any]:
    """Return how the states are laid out; the same layout is read back bit for bit."""
    precision = "fp16" if engine.fp16_enabled() else "bf16" if engine.bfloat16_enabled() else "fp32"
    basic = engine.basic_optimizer
    return {
        "ranks": world_size(),
        "zero_stage": int(engine.zero_optimization_stage()),
        "precision": precision,
        "optimizer": type(basic).__name__,
        "offload": engine.zero_offload_param() is not None and engine.zero_offload_param().device != "none",
    }


def run_record(engine: deepspeed.DeepSpeedEngine, data: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    """Return what every checkpoint of this run records beside its position; `data` of `data_record`."""
    return {
        "arguments": arguments_record(config.args, config.batches.ranks),
        "command": config.plain_arguments,
        "decisions": config.decisions,
        "data": data,
        "base": base_record(config.args),
        "configuration": configuration_record(config.args.model_name_or_path),
        "layout": layout_record(engine),
        "optimizer_parameters": optimizer_parameter_names(engine),
        "optimizer_groups": optimizer_group_names(engine),
    }


def check_same_run(checkpoint: Checkpoint, args: Namespace, ranks: int) -> None:
    """Raise a UserError when arguments that matter or the base model have changed; `--resume_anyway` prints it."""
    changed = changed_arguments(checkpoint, args, ranks)
    if changed:
        _refuse_or_say(
            args,
            f"{checkpoint.folder} was written by a run with other arguments ({'; '.join(changed)})",
            "give the same, or --resume_anyway to go on with the new ones.",
        )
    configuration = configuration_record(args.model_name_or_path)
    if other := changed_configuration(checkpoint.info.get("configuration"), configuration):
        _refuse_or_say(
            args,
            f"config.json of {args.model_name_or_path} is not that of the run that wrote {checkpoint.folder} ({other})",
            "give the model of that run, or --resume_anyway to go on with the new one.",
        )
    then, now = checkpoint.info.get("base"), base_record(args)
    if now is not None and then is None and "base" not in checkpoint.info:
        _say_first(f"{checkpoint.folder} has no fingerprint of its base model: whether that is the same can't be told")
    elif then is not None and now is not None and then != now:
        _refuse_or_say(
            args,
            f"the weights of {args.model_name_or_path} are not those that {checkpoint.folder} was trained on: it holds "
            "LoRA's weights, and the frozen ones would come from another model",
            "give the base model of that run, or --resume_anyway to go on with the new one.",
        )


def _refuse_or_say(args: Namespace, what: str, advice: str) -> None:
    """Raise a UserError, or with `--resume_anyway` print what is different."""
    if not args.resume_anyway:
        raise UserError(f"{what}: {advice}")
    _say_first(f"Resuming anyway: {what}")


def _say_first(line: str) -> None:
    """Print a line on the first rank, also before the process group is started."""
    if launched_rank() == 0:
        say(line)


def restore(
    engine: deepspeed.DeepSpeedEngine, checkpoint: Checkpoint, data: dict[str, Any], args: Namespace
) -> RunState:
    """Bring weights, optimizer, counters and scaler to the checkpoint's state; returns its position.

    `follow_schedule` sets the learning rate: its schedule belongs to this run's arguments. Every rank must call it.
    """
    check_same_data(checkpoint, data, args)
    settings = [(group["lr"], group["weight_decay"]) for group in engine.basic_optimizer.param_groups]
    state, layout, present = checkpoint.state, checkpoint.info["layout"], layout_record(engine)
    if _reads_as_it_is(layout, present):
        root, name = os.path.split(os.path.abspath(checkpoint.folder))
        engine.load_checkpoint(root, name, load_module_strict=False, load_lr_scheduler_states=False)
    else:
        other = [f"{key} {layout[key]} then, {present[key]} now" for key in present if layout[key] != present[key]]
        print_rank_0(f"Resuming in another layout ({', '.join(other)}): full states are read, rounding may differ")
        load_full_states(engine, checkpoint)
    for group, (rate, decay) in zip(engine.basic_optimizer.param_groups, settings, strict=True):
        group["lr"], group["weight_decay"] = rate, decay
        group.pop("initial_lr", None)  # the schedule is to start from this run's rate
    recount_updates(engine.basic_optimizer, state.scheduler_steps)
    return state


def check_same_data(checkpoint: Checkpoint, now: dict[str, Any], args: Namespace) -> None:
    """Raise a UserError when the training data have changed; `--resume_anyway` prints it instead."""
    then = checkpoint.info["data"]
    if "content" not in then:
        _say_first(f"{checkpoint.folder} has no checksum of its data: only number and lengths of samples are compared")
    words = {
        "samples": f"{then['samples']} samples then, {now['samples']} now",
        "lengths": "samples of other lengths",
        "content": "other tokens in samples of the same number and lengths",
        "files": "other files of the stream",
        "vocabulary": "another tokenizer, whose tokens have other ids",
    }
    changed = [key for key in words if key in then and then[key] != now.get(key)]
    if changed:
        _refuse_or_say(
            args,
            f"the training data is not that of {checkpoint.folder} ({words[changed[0]]})",
            "give the same data, or --resume_anyway to go on with the new.",
        )
    if "evaluation" in then and then["evaluation"] != now["evaluation"]:
        what = f"the evaluation data is not that of {checkpoint.folder}: losses before and after can't be compared"
        if args.load_best_model_at_end or args.early_stopping_patience is not None:
            _refuse_or_say(
                args,
                what,
                "give the same data, since they choose the best model and the end, or --resume_anyway to go on.",
            )
        else:
            _say_first(what[:1].upper() + what[1:])


def _reads_as_it_is(then: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether DeepSpeed can read the states as written: shards in the same layout, whole states on any ranks."""
    return all(then[key] == now[key] for key in now if not (key == "ranks" and then["zero_stage"] == 0))


def describe_position(checkpoint: Checkpoint, state: RunState, plan: RunPlan) -> str:
    """Return one line on where the run resumes."""
    if plan.is_done(state):
        return f"Resuming from {checkpoint.folder}: all {plan.steps} steps are done"
    where = f"of {plan.units} of epoch {state.epoch}"
    if state.stream is not None:
        where = f"of window {state.stream['window'] + 1} of the stream"
    return (
        f"Resuming from {checkpoint.folder}: step {state.step} of {plan.steps} is done, {state.units_done} {where} "
        "are used"
    )


def follow_schedule(engine: deepspeed.DeepSpeedEngine, state: RunState) -> None:
    """Set the learning rate of the position `state`."""
    scheduler, done = engine.lr_scheduler, state.scheduler_steps
    scheduler.load_state_dict({**scheduler.state_dict(), "last_epoch": done, "_step_count": done + 1})
    for group, peak, shape in zip(
        scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
    ):
        group["lr"] = peak * shape(done)
