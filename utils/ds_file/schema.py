"""What DeepSpeed's configuration may hold: the names of its settings and the types of their values.

DeepSpeed passes over a name it does not know, and a value of another type fails when the model is loaded, or never. Its
blocks are pydantic models, which are asked here; settings that stand outside of them are listed below.
"""

import difflib
from collections.abc import Iterable
from typing import Any

NUMBER, WHOLE, SWITCH, TEXT = (int, float), (int,), (bool,), (str, type(None))
WORDS = {NUMBER: "a number", WHOLE: "a whole number", SWITCH: "true or false", TEXT: "a text"}
PLAIN = {
    "steps_per_print": NUMBER, "gradient_clipping": NUMBER, "gradient_predivide_factor": NUMBER,
    "prescale_gradients": SWITCH, "disable_allgather": SWITCH, "dump_state": SWITCH, "disable_python_gc": SWITCH,
    "wall_clock_breakdown": SWITCH, "memory_breakdown": SWITCH, "zero_allow_untested_optimizer": SWITCH,
    "zero_force_ds_cpu_optimizer": SWITCH, "managed_gradient_accumulation": SWITCH, "dataloader_drop_last": SWITCH,
    "use_data_before_expert_parallelism": SWITCH, "communication_data_type": TEXT,
    "seq_parallel_communication_data_type": TEXT, "gradient_allreduce_op": TEXT, "log_level": TEXT,
    "vocabulary_size": WHOLE,
}  # fmt: skip
BATCH_SIZES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
FLAGS_DECIDE = (*BATCH_SIZES, "sequence_parallel_size", "optimizer", "scheduler")
# Blocks that are no pydantic model, with their settings; DeepSpeed itself checks the values.
OPEN_BLOCKS = {
    "aio": ("block_size", "queue_depth", "intra_op_parallelism", "thread_count", "single_submit", "overlap_events",
            "use_gds"),
    "checkpoint": ("tag_validation", "load_universal", "use_node_local_storage", "parallel_write", "writer",
                   "checkpoint_serialization"),
    "data_types": ("grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules"),
    "timers": ("throughput",),
    "flops_profiler": ("enabled", "recompute_fwd_factor", "profile_step", "module_depth", "top_modules", "detailed",
                       "output_file"),
    "activation_checkpointing": ("partition_activations", "number_checkpoints", "contiguous_memory_optimization",
                                 "synchronize_checkpoint_boundary", "profile", "cpu_checkpointing"),
}  # fmt: skip
WHOLE_NUMBERS = {
    *(("aio", name) for name in ("block_size", "queue_depth", "intra_op_parallelism", "thread_count")),
    *(("flops_profiler", name) for name in ("profile_step", "top_modules")),
}  # fmt: skip
PRECISION_KEYS, DTYPE_NAMES = ("grad_accum_dtype", "param_dtype", "buffer_dtype"), ("fp32", "bf16", "fp16")
# Parts of DeepSpeed that train in another way than this program does.
OTHER_WAYS = (
    "autotuning", "data_efficiency", "datastates", "expert_parallel", "hybrid_engine", "pipeline", "tensor_parallel",
    "torch_autocast", "weight_quantization",
)  # fmt: skip


def block_models() -> dict[str, Any]:
    """Return DeepSpeed's pydantic model of each block."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.compile.config import CompileConfig
    from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return {
        "zero_optimization": DeepSpeedZeroConfig, "bf16": DeepSpeedBF16Config, "fp16": DeepSpeedFP16Config,
        "tensorboard": TensorBoardConfig, "wandb": WandbConfig, "csv_monitor": CSVConfig, "comet": CometConfig,
        "comms_logger": CommsLoggerConfig, "compile": CompileConfig,
    }  # fmt: skip


def check_settings(config: dict[str, Any]) -> list[str]:
    """List what DeepSpeed does not know, or can't take, in a configuration without "auto"."""
    problems = []
    models = block_models()
    names = (*PLAIN, *FLAGS_DECIDE, *OPEN_BLOCKS, *OTHER_WAYS, *models)
    removed = _removed_names()
    for name, value in config.items():
        if name in removed:
            problems.append(f"{name}: DeepSpeed has no such setting any more")
        elif name not in names:
            problems.append(_unknown(name, names))
        elif name in PLAIN:
            problems += _check_plain(name, value, PLAIN[name])
        elif name in BATCH_SIZES or name == "sequence_parallel_size":
            problems += _check_plain(name, value, WHOLE)
        elif not isinstance(value, dict):
            problems.append(f"{name} must be an object of settings, not {_shown(value)}")
        elif name in models:
            problems += _check_model(models[name], value, name)
        elif name in OPEN_BLOCKS:
            problems += [_unknown(key, OPEN_BLOCKS[name], name) for key in value if key not in OPEN_BLOCKS[name]]
            problems += _check_open_values(name, value)
    return problems


def _check_open_values(name: str, block: dict[str, Any]) -> list[str]:
    """List the values of a block without a model that DeepSpeed would read when the engine is made, or later."""
    problems = []
    for key, value in block.items():
        if key == "enabled":
            problems += _check_plain(f"{name}.{key}", value, SWITCH)
        elif (name, key) in WHOLE_NUMBERS:
            problems += _check_plain(f"{name}.{key}", value, WHOLE)
        elif key in PRECISION_KEYS and value not in (*DTYPE_NAMES, None):
            problems.append(f"{name}.{key} must be one of {', '.join(DTYPE_NAMES)}, not {_shown(value)}")
    return problems


def _removed_names() -> Iterable[str]:
    """Return the names of what DeepSpeed once had and now refuses."""
    from deepspeed.runtime import config

    return getattr(config, "_REMOVED_TOP_LEVEL_CONFIG_KEYS", ())


def _check_plain(name: str, value: Any, types: tuple[type, ...]) -> list[str]:
    fits = isinstance(value, types) and (types == SWITCH or not isinstance(value, bool))
    if not fits:
        return [f"{name} must be {WORDS[types]}, not {_shown(value)}"]
    if name == "gradient_predivide_factor" and not value > 0:
        return [f"{name} must be more than 0, not {value}: gradients are divided by it"]
    least = 1 if name == "steps_per_print" else 0
    return [] if types in (SWITCH, TEXT) or value >= least else [f"{name} must be at least {least}, not {value}"]


def _check_model(model: Any, block: dict[str, Any], place: str) -> list[str]:
    """List what is wrong in a block by its pydantic model; blocks within it are looked at first."""
    problems, fields = [], _fields(model)
    for key, value in block.items():
        field = fields.get(key)
        if field is None:
            problems.append(_unknown(key, fields, place))
        elif (field.json_schema_extra or {}).get("deprecated"):
            problems.append(f"{place}.{key} is out of use: write {field.json_schema_extra.get('new_param')} instead")
        elif inner := _inner_model(field):
            if isinstance(value, dict):
                problems += _check_model(inner, value, f"{place}.{key}")
            else:
                problems.append(f"{place}.{key} must be an object of settings, not {_shown(value)}")
    return problems or _check_values(model, block, place)


def _fields(model: Any) -> dict[str, Any]:
    """Return the fields of a pydantic model by the names under which a file may give them."""
    return {key: field for name, field in model.model_fields.items() for key in (field.alias or name, name)}


def _inner_model(field: Any) -> Any:
    """Return the pydantic model of a field that is a block itself; None for a value."""
    from pydantic import BaseModel

    kinds = getattr(field.annotation, "__args__", None) or (field.annotation,)
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _check_values(model: Any, block: dict[str, Any], place: str) -> list[str]:
    """List the values that a pydantic model does not take, or takes by reading a text as a number or a switch."""
    from pydantic import ValidationError

    try:
        read = model(**block)
    except ValidationError as err:
        found = {}
        for problem in err.errors():
            where = ".".join([place, *(str(part) for part in problem["loc"] if not str(part).startswith("function"))])
            words = problem["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
            shown = "" if isinstance(problem["input"], dict) else f", not {_shown(problem['input'])}"
            found[where] = f"{where}: {words[:1].lower()}{words[1:]}{shown}"
        return list(found.values())
    problems = []
    for key, field in _fields(model).items():
        value = block.get(key)
        name = next(name for name, own in model.model_fields.items() if own is field)
        taken = getattr(read, name, value)
        if isinstance(taken, bool) and not isinstance(value, bool) and key in block:
            problems.append(f"{place}.{key} must be true or false, not {_shown(value)}")
        elif isinstance(taken, (int, float)) and isinstance(value, (str, bool)) and not isinstance(taken, bool):
            problems.append(f"{place}.{key} must be a number, not {_shown(value)}")
    return problems


def _unknown(name: str, known: Iterable[str], place: str = "") -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    where = f"{place}.{name}" if place else name
    return f"{where} is no setting of DeepSpeed's" + (f" (do you mean {near[0]}?)" if near else "")


def _shown(value: Any) -> str:
    """Return a value as a JSON file shows it, shortened."""
    import json

    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
