"""`--deepspeed_config`: files as their users have them train, and what DeepSpeed would pass over is named."""

import json

import pytest
from fork_runs import finished_run, losses

from utils.arguments.parser import parse_args
from utils.arguments.values import check_values, check_zero
from utils.ds_file.read import merged_zero, read_deepspeed_file
from utils.errors import UserError
from utils.run_config import decide_dtype

OFFLOAD = {"device": "cpu", "pin_memory": True}
# The two files of transformers' documentation, as they lie in thousands of repositories.
TRAINER_FILES = {
    "zero2": {
        "fp16": {
            "enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2,
            "min_loss_scale": 1,
        },
        "optimizer": {
            "type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
        },
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
        },
        "zero_optimization": {
            "stage": 2, "offload_optimizer": OFFLOAD, "allgather_partitions": True, "allgather_bucket_size": 2e8,
            "overlap_comm": True, "reduce_scatter": True, "reduce_bucket_size": 2e8, "contiguous_gradients": True,
        },
        "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "steps_per_print": 2000,
        "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "wall_clock_breakdown": False,
    },
    "zero3": {
        "bf16": {"enabled": "auto"},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": 3, "offload_optimizer": {"device": "none"}, "offload_param": {"device": "none"},
            "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 1e9, "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto",
            "stage3_max_live_parameters": 1e9, "stage3_max_reuse_distance": 1e9,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "steps_per_print": 2000,
        "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "wall_clock_breakdown": False,
    },
}  # fmt: skip


@pytest.fixture
def arguments(tmp_path):
    """Arguments with a file of this content, and with more flags."""

    def make(content, *flags):
        file = tmp_path / "ds.json"
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        return parse_args(["--model_name_or_path", "m", "--deepspeed_config", str(file), *flags])

    return make


@pytest.mark.parametrize("name", TRAINER_FILES)
def test_files_of_transformers_trainer(name, run_arguments, tmp_path):
    """They train as the flags say, to the losses of a run with these flags alone, and the file's stage."""
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(TRAINER_FILES[name]))
    command = [*run_arguments, "--max_steps", "3", "--per_device_train_batch_size", "8"]
    finished_run([*command, "--output_dir", tmp_path / "flags"])
    printed = finished_run([*command, "--deepspeed_config", file, "--output_dir", tmp_path / "file"])
    assert "Precision: fp32 (as asked)" in printed
    assert f"ZeRO stage {name[-1]}, offload {'cpu' if name == 'zero2' else 'off'}" in printed
    assert "as the flags say: train_batch_size, train_micro_batch_size_per_gpu, gradient_accumulation_steps" in printed
    if name == "zero2":
        assert "--lr_scheduler_type cosine in place of WarmupLR (which is constant_with_warmup)" in printed
        assert "fp16's settings wait for that precision" in printed
    assert losses(tmp_path / "file") == pytest.approx(losses(tmp_path / "flags"), rel=1e-5)


@pytest.mark.parametrize(
    ("content", "flag", "expected"),
    [
        ({"bf16": {"enabled": "auto"}}, "bf16", "bf16"),
        ({"bf16": {}}, "bf16", "bf16"),
        ({"bf16": "auto"}, "bf16", "bf16"),
        ({"bf16": {"check_grad_overflow": False}}, "bf16", "bf16"),
        ({"fp16": {"enabled": False}}, "bf16", "bf16"),
        ({"fp16": {"enabled": "auto", "loss_scale": 0}}, "bf16", "bf16"),
        ({"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}, "fp32", "fp32"),
        ({"bf16": {"enabled": True}}, "fp32", "bf16"),
        ({"bfloat16": {"enabled": True}}, "fp32", "bf16"),
        ({"bf16": {"enabled": False}}, "bf16", "fp32"),
        ({}, "bf16", "bf16"),
    ],
)
def test_precision_is_the_flags_unless_the_file_says_it(arguments, content, flag, expected):
    args = arguments(content, "--dtype", flag)
    dtype, reason = decide_dtype(args, read_deepspeed_file(args, 1).settings)
    assert dtype == expected
    if dtype != flag:
        assert "DeepSpeed configuration" in reason


@pytest.mark.parametrize(
    ("content", "flags", "words"),
    [
        ({"grad_accum_dtype": "fp32"}, ["--dtype", "bf16"], "grad_accum_dtype fp32 with bf16 needs ZeRO 1 or higher"),
        ({"grad_accum_dtype": "bf16"}, ["--dtype", "fp32"], "grad_accum_dtype bf16 with fp32 needs ZeRO 1 or higher"),
        ({"param_dtype": "bf16"}, ["--dtype", "fp32"], "param_dtype bf16 contradicts the precision, fp32"),
        ({"grad_accum_dtype": "fp32"}, ["--dtype", "bf16", "--zero_stage", "1"], None),
        ({"grad_accum_dtype": "fp32"}, ["--dtype", "bf16", "--offload"], None),
        ({"grad_accum_dtype": "bf16", "param_dtype": "bf16"}, ["--dtype", "bf16"], None),
    ],
)
def test_types_that_deepspeed_would_refuse_with_the_model_loaded(arguments, content, flags, words):
    args = arguments({"data_types": content}, *flags)
    settings = read_deepspeed_file(args, 1).settings
    if words is None:
        decide_dtype(args, settings)
        return
    with pytest.raises(UserError, match=words):
        decide_dtype(args, settings)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"zero_optimisation": {"stage": 2}}, "zero_optimisation is no setting of DeepSpeed's (do you mean zero_opt"),
        ({"zero_optimization": {"stag": 2}}, "zero_optimization.stag is no setting of DeepSpeed's (do you mean stage?"),
        ({"zero_optimization": {"offload_param": {"devise": "cpu"}}}, "offload_param.devise is no"),
        ({"zero_optimization": {"offload_param": None}}, "offload_param must be an object of settings, not null"),
        ({"zero_optimization": {"offload_param": {"device": "gpu"}}}, "zero_optimization.offload_param.device: "),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage: "),
        ({"zero_optimization": {"stage": "2"}}, "zero_optimization.stage"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage must be a number, not true"),
        ({"zero_optimization": 2}, "zero_optimization must be an object of settings, not 2"),
        ({"zero_optimization": {"overlap_comm": "yes"}}, "zero_optimization.overlap_comm must be true or false, not "),
        ({"zero_optimization": {"reduce_bucket_size": -1}}, "zero_optimization.reduce_bucket_size: "),
        ({"zero_optimization": {"reduce_bucket_size": "5e8"}}, "zero_optimization.reduce_bucket_size"),
        ({"zero_optimization": {"cpu_offload": True}}, "cpu_offload is out of use: write offload_optimizer"),
        ({"zero_allow_untrusted_optimizer": True}, "(do you mean zero_allow_untested_optimizer?)"),
        ({"bf16": {"enabled": "yes"}}, 'bf16.enabled must be true or false, not "yes"'),
        ({"bf16": True}, "bf16 must be an object of settings, not true"),
        ({"bf16": {"enable": True}}, "bf16.enable is no setting of DeepSpeed's (do you mean enabled?)"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "bf16 and fp16 can't both be enabled"),
        ({"fp16": {"loss_scale_window": 0, "enabled": True}}, "loss_scale_window must be > 0"),
        ({"gradient_clipping": "1.0"}, 'gradient_clipping must be a number, not "1.0"'),
        ({"gradient_predivide_factor": 0}, "gradient_predivide_factor must be more than 0, not 0"),
        ({"data_types": {"param_dtype": "fp17"}}, "data_types.param_dtype must be one of fp32, bf16, fp16, not "),
        ({"gradient_clipping": -1}, "gradient_clipping must be at least 0"),
        ({"steps_per_print": 0}, "steps_per_print must be at least 1, not 0"),
        ({"aio": {"block_size": "big"}}, 'aio.block_size must be a whole number, not "big"'),
        ({"flops_profiler": {"enabled": "yes"}}, 'flops_profiler.enabled must be true or false, not "yes"'),
        ({"flops_profiler": {"step": 5}}, "flops_profiler.step is no setting of DeepSpeed's"),
        ({"data_types": {"grad_accum_dtype": "fp64"}}, "grad_accum_dtype must be one of fp32, bf16, fp16, not "),
        ({"wall_clock_breakdown": 1}, "wall_clock_breakdown must be true or false, not 1"),
        ({"aio": {"queue_dept": 8}}, "aio.queue_dept is no setting of DeepSpeed's (do you mean queue_depth?)"),
        ({"amp": {"enabled": "auto"}}, "amp: DeepSpeed has no such setting any more"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel is a part of DeepSpeed that this program does not"),
        ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op must be mean"),
        ({"train_batch_size": 64}, "train_batch_size 64 (use --per_device_train_batch_size and --gradient_accumulat"),
        ({"train_micro_batch_size_per_gpu": 4}, "(use --per_device_train_batch_size, which makes it 16)"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 3e-5}}}, "optimizer.params.lr 3e-05 (use --learning_rate)"),
        ({"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.999]}}}, "optimizer.params.betas"),
        ({"optimizer": {"type": "Lion"}}, "optimizer.type Lion"),
        ({"scheduler": {"type": ["WarmupLR"]}}, "scheduler.type ['WarmupLR'] (use --lr_scheduler_type"),
        ({"scheduler": {"type": "OneCycle"}}, "scheduler.type OneCycle (use --lr_scheduler_type"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 100}}}, "(use --num_warmup_steps)"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "(use --offload nvme and --nvme_path)"),
        ('{"zero_optimization": {"stage": 1, "stage": 2}}', "has stage twice in one object"),
        ("[1]", "must hold one JSON object"),
    ],
)  # fmt: skip
def test_what_can_not_be_meant_is_named(arguments, content, words):
    args = arguments(content)
    with pytest.raises(UserError) as caught:
        read_deepspeed_file(args, 1)
    assert words in str(caught.value) and args.deepspeed_config in str(caught.value)


COMMENTED = """// for our nodes
{
  "zero_optimization": {"stage": 2, /* not 3 */ "overlap_comm": false},  # faster here
  "gradient_clipping": 0.5,
}
"""


def test_comments_and_trailing_commas_are_read_as_deepspeed_reads_them(arguments):
    settings = read_deepspeed_file(arguments(COMMENTED), 1).settings
    assert settings == {"zero_optimization": {"stage": 2, "overlap_comm": False}, "gradient_clipping": 0.5}
    for other in ("zero_optimization:\n  stage: 2\n", '{"zero_optimization": {"stage": 2}', "stage=2", ""):
        with pytest.raises(UserError, match="can't be read as JSON"):
            read_deepspeed_file(arguments(other), 1)
    with pytest.raises(UserError, match="has stage twice in one object"):
        read_deepspeed_file(arguments('{"zero_optimization": {"stage": 1, "stage": 2},}'), 1)


def test_what_agrees_with_the_flags_is_taken(arguments):
    agreeing = {
        "train_batch_size": 128, "train_micro_batch_size_per_gpu": 16, "gradient_accumulation_steps": 4,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "weight_decay": 0.0, "betas": [0.9, 0.95], "eps": 1e-8}},
        "activation_checkpointing": {"partition_activations": True}, "zero_optimization": {"stage": "auto"},
    }  # fmt: skip
    file = read_deepspeed_file(arguments(agreeing, "--gradient_accumulation_steps", "4"), ranks=2)
    assert file.settings == {}
    assert "not used: activation_checkpointing (--gradient_checkpointing is this program's)" in file.notes


def test_what_has_no_effect_is_said(arguments):
    weights = {"offload_param": {"device": "cpu"}}
    file = read_deepspeed_file(arguments({"zero_optimization": weights, "compile": {"deepcompile": True}}), ranks=1)
    assert file.settings == {"zero_optimization": weights}
    assert file.notes == ["not used: compile", "offload_param has no effect below ZeRO 3, which alone divides weights"]
    assert not read_deepspeed_file(arguments({"zero_optimization": {"stage": 3, **weights}}), ranks=1).notes


@pytest.mark.parametrize(
    ("block", "flags", "words"),
    [
        ({"stage": 3}, ["--zero_hpz_partition_size", "2"], None),
        ({"stage": 3}, ["--enable_mixed_precision_lora", "--lora_dim", "4"], None),
        ({"stage": 3}, ["--offload", "nvme", "--nvme_path", "/tmp"], None),
        ({"overlap_comm": True}, ["--zero_hpz_partition_size", "2", "--zero_stage", "3"], None),
        ({"stage": 2}, ["--zero_hpz_partition_size", "2", "--zero_stage", "3"], "_stage 3, not 2, as"),
        ({"zero_hpz_partition_size": 2}, [], "--zero_hpz_partition_size needs --zero_stage 3, not 0."),
        ({"stage": 2}, ["--offload", "nvme", "--nvme_path", "/tmp", "--zero_stage", "3"], "_stage 3, not 2, as"),
        ({"stage": 1, "zero_quantized_nontrainable_weights": True}, [], "precision_lora needs --zero_stage 3, not 1"),
        (
            {"stage": 3, "offload_param": {"device": "cpu"}}, ["--offload", "nvme", "--nvme_path", "/tmp"],
            "names another device",
        ),
        ({"stage": 3, "reduce_scatter": False}, ["--sequence_parallel_size", "2"], "reduce_scatter false at ZeRO 3"),
    ],
)  # fmt: skip
def test_what_needs_a_stage_goes_by_the_stage_that_is_used(arguments, block, flags, words):
    args = arguments({"zero_optimization": block}, *flags)
    assert check_values(args) == [], "the flags alone don't decide"
    problems = check_zero(args, merged_zero(args, read_deepspeed_file(args, 2).settings))
    assert problems == [] if words is None else len(problems) == 1 and words in problems[0]


def test_a_file_that_no_run_can_use_is_refused_at_the_start(run_inside, run_arguments, tmp_path):
    """Several mistakes in one message, beside those of the flags; and what only DeepSpeed itself can tell."""
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"bf16": {"enabled": "yes"}, "zero_optimization": {"stage": 7}}))
    command = [*run_arguments, "--deepspeed_config", file, "--output_dir", tmp_path / "out"]
    status, _, error = run_inside([*command, "--max_seq_len", "999"])
    assert status == 2 and "Traceback" not in error and error.count("error:") == 1
    assert "bf16.enabled" in error and "zero_optimization.stage" in error and "256 positions" in error
    for content, words in (
        ({"fp16": {"enabled": True}}, "turns fp16 on: --dtype fp16 can't be trained on cpu"),
        ({"checkpoint": {"tag_validation": "sometimes"}}, "DeepSpeed can't use it: Checkpoint config contains"),
        ({"communication_data_type": "int8"}, "DeepSpeed can't use it: Invalid communication_data_type"),
        ({"comet": {"enabled": True}}, "turns comet on, which is not installed: pip install comet_ml"),
        (
            {"csv_monitor": {"enabled": True, "output_path": "/proc/x"}},
            "csv_monitor can't write to output_path /proc/x",
        ),
        (
            {"zero_optimization": {"zero_hpz_partition_size": 2}},
            "--zero_hpz_partition_size needs --zero_stage 3, not 0",
        ),
    ):
        file.write_text(json.dumps(content))
        status, _, error = run_inside(command)
        assert status == 2 and words in error, error
    assert not (tmp_path / "out").exists()
