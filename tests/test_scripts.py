"""Every training script: its arguments, its log, its exit status, from any folder.

`deepspeed`, `python`, `srun` and `scontrol` are stand-ins, first on PATH, that note how they were called.
A new script is found by the glob below and has to pass everything here.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "training_scripts").rglob("run_*.sh"))
SWEEP = ROOT / "training_scripts" / "single_node" / "sweep" / "run_step1_sweep.sh"
SLURM = ROOT / "training_scripts" / "multi_node" / "run_66b_slurm.sh"
SINGLE_RUNS = [script for script in SCRIPTS if script != SWEEP]
# The promised scripts, each with its default ZeRO stage.
STAGES = {
    "single_cpu/run_tiny.sh": "0",
    "single_gpu/run_1.3b.sh": "0",
    "single_gpu/run_6.7b_lora.sh": "0",
    "single_node/run_1.3b.sh": "2",
    "single_node/run_6.7b.sh": "3",
    "single_node/run_13b.sh": "3",
    "single_node/run_1.3b_lora.sh": "0",
    "single_node/run_30b_lora.sh": "3",
    "single_node/sweep/run_single.sh": "2",
    "single_node/sweep/run_step1_sweep.sh": "2",
    "multi_node/run_66b.sh": "3",
    "multi_node/run_66b_slurm.sh": "3",
    "other_language/run_chinese.sh": "2",
    "other_language/run_japanese.sh": "2",
}

# Notes the call, writes to both streams, fails for main.py when told to.
STAND_IN = """#!{python} -I
import json, os, sys
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps({{"program": {program!r}, "argv": sys.argv[1:], "cwd": os.getcwd()}}) + "\\n")
print("to stdout", flush=True)
print("to stderr", file=sys.stderr, flush=True)
is_main = any(argument.endswith("main.py") for argument in sys.argv)
unlucky = os.environ.get("FAIL_WITH", "") in sys.argv
sys.exit(int(os.environ.get("STATUS", "0")) if is_main and unlucky else 0)
"""


def name_of(script):
    return str(script.relative_to(ROOT / "training_scripts"))


every_script = pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
every_single_run = pytest.mark.parametrize("script", SINGLE_RUNS, ids=name_of)


class Call:
    """One start of main.py: launcher options before it, arguments after it."""

    def __init__(self, note):
        argv = note["argv"]
        at = next(i for i, argument in enumerate(argv) if argument.endswith("main.py"))
        self.program, self.cwd = note["program"], note["cwd"]
        self.launcher, self.main, self.arguments = argv[:at], argv[at], argv[at + 1 :]

    def value(self, name):
        """The last value given for an argument: the one that counts."""
        last = max(i for i, argument in enumerate(self.arguments) if argument == name)
        return self.arguments[last + 1]


class Runner:
    """Runs scripts with the stand-ins on PATH, in a folder of its own."""

    def __init__(self, folder):
        self.folder = folder
        self.notes = folder / "calls.jsonl"
        programs = folder / "bin"
        programs.mkdir()
        for program in ["deepspeed", "python", "srun", "scontrol"]:
            (programs / program).write_text(STAND_IN.format(python=sys.executable, program=program))
            (programs / program).chmod(0o755)
        (folder / "hostfile").write_text("worker-1 slots=8\nworker-2 slots=8\n")
        self.environment = {
            **os.environ,
            "PATH": f"{programs}:{os.environ['PATH']}",
            "CALLS": str(self.notes),
            "HOSTFILE": str(folder / "hostfile"),
        }

    def __call__(self, script, *arguments, **environment):
        self.notes.unlink(missing_ok=True)
        return subprocess.run(
            ["bash", str(script), *arguments],
            cwd=self.folder,
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )

    def calls(self):
        """The starts of main.py in the last run."""
        notes = [json.loads(line) for line in self.notes.read_text().splitlines()]
        return [Call(note) for note in notes if any(a.endswith("main.py") for a in note["argv"])]


@pytest.fixture
def run(tmp_path):
    return Runner(tmp_path)


@pytest.fixture(scope="module")
def parser():
    from utils.arguments.parser import build_parser

    return build_parser()


def test_the_promised_scripts_are_there():
    assert set(STAGES) <= set(map(name_of, SCRIPTS))
    llama = [name for name in map(name_of, SCRIPTS) if name.startswith("llama/")]
    for family in ["llama", "llama2_7b", "qwen"]:
        own = [name for name in llama if f"run_{family}" in name]
        assert {name.endswith("_lora.sh") for name in own} == {True, False}


def test_gradient_checkpointing_has_two_spellings(parser):
    for flag in ("--gradient_checkpointing", "--gradient_checkpoint"):
        assert parser.parse_args(["--model_name_or_path", "opt", flag]).gradient_checkpointing is True


@every_script
def test_strict_mode_and_executable(script):
    lines = script.read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert "set -euo pipefail" in lines
    assert os.access(script, os.X_OK)
    assert any(line.startswith("# usage: ") for line in lines)


@every_script
def test_output_stage_and_further_arguments(run, script):
    """$1 and $2 reach main.py, a relative folder stays the caller's, further arguments come last."""
    further = ["--learning_rate", "0.5", "--model_name_or_path", "some where/else"]
    done = run(script, "an out", "1", *further)
    assert done.returncode == 0, done.stdout
    assert run.calls()
    for call in run.calls():
        assert call.value("--output_dir").split("/")[0] == "an out"
        assert call.value("--zero_stage") == "1"
        assert call.arguments[-len(further) :] == further
        assert Path(call.main) == ROOT / "main.py"
        assert Path(call.cwd) == run.folder
    assert (run.folder / "an out").is_dir()


@every_script
def test_a_first_argument_with_dashes_is_a_further_argument(run, script):
    assert run(script, "--print_loss").returncode == 0
    call = run.calls()[0]
    assert call.arguments[-1] == "--print_loss"
    assert call.value("--output_dir").startswith("./output")
    assert call.value("--zero_stage") in {"0", "2", "3"}
    assert run(script, "out", "--print_loss").returncode == 0
    call = run.calls()[0]
    assert call.value("--output_dir").split("/")[0] == "out"
    assert call.arguments[-1] == "--print_loss"


@every_single_run
def test_log_is_what_the_terminal_shows(run, script):
    done = run(script, "out")
    log = (run.folder / "out" / "training.log").read_text()
    assert "to stdout" in log and "to stderr" in log
    assert log == done.stdout


@every_script
def test_exit_status_is_that_of_the_run(run, script):
    done = run(script, "out", "--print_loss", STATUS="3", FAIL_WITH="--print_loss")
    assert done.returncode == (1 if script == SWEEP else 3)


@every_script
def test_lora_scripts_state_both_rates(run, script):
    assert run(script, "out").returncode == 0
    for call in run.calls():
        has_lora = "--lora_dim" in call.arguments
        assert has_lora or not script.stem.endswith("_lora")
        if has_lora:
            assert {"--learning_rate", "--lora_learning_rate", "--lora_module_name"} <= set(call.arguments)
            assert float(call.value("--lora_learning_rate")) >= float(call.value("--learning_rate")) / 2
            prefix = "model.layers." if "llama/" in name_of(script) else "decoder.layers."
            assert call.value("--lora_module_name") == prefix


@every_script
def test_known_arguments(run, parser, script):
    """main.py's own parser takes every script's arguments, and the well-known values are in them."""
    assert run(script, "out").returncode == 0
    for call in run.calls():
        args = parser.parse_args(call.arguments)
        assert args.deepspeed
        assert args.seed == 1234
        assert args.lr_scheduler_type in ("cosine", getattr(args.lr_scheduler_type, "COSINE", None))
        assert args.data_split == ("10,0,0" if "10,0,0" in script.read_text() else "2,4,4")


@pytest.mark.parametrize("name", STAGES)
def test_default_zero_stage(run, name):
    assert run(ROOT / "training_scripts" / name).returncode == 0
    assert run.calls()[0].value("--zero_stage") == STAGES[name]


def test_launchers(run):
    for script in SINGLE_RUNS:
        assert run(script, "out").returncode == 0
        [call] = run.calls()
        folder = name_of(script).split("/")[0]
        expected = {
            "single_gpu": ["--num_gpus", "1"],
            "multi_node": ["--hostfile", str(run.folder / "hostfile")],
        }
        if script == SLURM:
            assert call.program == "srun" and call.launcher[-1] == "python"
            continue
        assert call.launcher == expected.get(folder, [])
        assert call.program == ("python" if folder == "single_cpu" else "deepspeed")


def test_tiny_run_makes_its_base_model_first(run):
    assert run(ROOT / "training_scripts/single_cpu/run_tiny.sh", "out").returncode == 0
    first, second = (json.loads(line)["argv"] for line in run.notes.read_text().splitlines())
    assert first == [str(ROOT / "demo/make_tiny_opt.py"), "out/base"]
    assert second[1:3] == ["--model_name_or_path", "out/base"]


def test_multi_node_needs_its_host_file(run):
    script = ROOT / "training_scripts/multi_node/run_66b.sh"
    done = run(script, "out", HOSTFILE=str(run.folder / "nowhere"))
    assert done.returncode == 2
    assert f"no host file at {run.folder / 'nowhere'}" in done.stdout
    assert not run.notes.exists()


def test_slurm_job_is_run_66b_that_goes_on(run):
    """The same arguments as with a host file, and checkpoints."""
    assert run(SLURM.with_name("run_66b.sh"), "out").returncode == 0
    [plain] = run.calls()
    assert run(SLURM, "out").returncode == 0
    [job] = run.calls()
    own = ["--save_steps", "500", "--resume_from_checkpoint", "latest"]
    assert job.arguments == plain.arguments + own


@pytest.mark.parametrize(("status", "state"), [(75, "RUNNING"), (75, "CANCELLED"), (3, "RUNNING")])
def test_slurm_job_goes_back_into_the_queue_when_it_was_interrupted(run, status, state):
    squeue = run.folder / "bin" / "squeue"
    squeue.write_text(f'#!/bin/sh\n[ "$*" = "--noheader --jobs 17 --format %T" ] && echo {state}\n')
    squeue.chmod(0o755)
    expected = status == 75 and state == "RUNNING"
    done = run(SLURM, "out", "--print_loss", STATUS=str(status), FAIL_WITH="--print_loss", SLURM_JOB_ID="17")
    assert done.returncode == status
    notes = [json.loads(line) for line in run.notes.read_text().splitlines()]
    requeued = [note["argv"] for note in notes if note["program"] == "scontrol"]
    assert requeued == ([["requeue", "17"]] if expected else [])
    assert ("back into the queue" in (run.folder / "out" / "training.log").read_text()) == expected


def test_slurm_copies_the_script(run):
    """Slurm runs it from its own folder; the repository is found where sbatch was called, or missed with words."""
    copy = run.folder / "slurm_script"
    copy.write_text(SLURM.read_text())
    assert run(copy, "out", SLURM_SUBMIT_DIR=str(ROOT)).returncode == 0
    assert Path(run.calls()[0].main) == ROOT / "main.py"
    done = run(copy, "out", SLURM_SUBMIT_DIR=str(run.folder))
    assert done.returncode == 2 and "call sbatch in the repository's own folder" in done.stdout


def test_log_goes_on_with_a_run_that_goes_on(run):
    script = ROOT / "training_scripts" / "single_gpu" / "run_1.3b.sh"
    assert run(script, "out").returncode == 0 and run(script, "out").returncode == 0
    log = run.folder / "out" / "training.log"
    once = log.read_text()
    assert run(script, "out", "--resume_from_checkpoint").returncode == 0
    assert log.read_text() == 2 * once


SINGLE = SWEEP.with_name("run_single.sh")
FOUR = ["Dahoas/rm-static", "Dahoas/full-hh-rlhf", "Dahoas/synthetic-instruct-gptj-pairwise"]
FOUR += ["yitingxie/rlhf-reward-datasets"]


@pytest.mark.parametrize("offload", ["true", "false"])
@pytest.mark.parametrize("lora", ["true", "false"])
def test_the_sweeps_run_by_its_four_words(run, parser, offload, lora):
    """ZERO_STAGE OFFLOAD LORA OUTPUT, then further arguments."""
    assert run(SINGLE, "3", offload, lora, "an out", "--print_loss").returncode == 0
    [call] = run.calls()
    args = parser.parse_args(call.arguments)
    assert (args.zero_stage, args.offload) == (3, "cpu" if offload == "true" else None)
    assert (args.output_dir, args.print_loss) == ("an out", True)
    assert (args.data_path, args.num_train_epochs) == (FOUR, 16)
    if lora == "true":
        assert (args.learning_rate, args.lora_learning_rate, args.weight_decay) == (1e-3, 1e-3, 0.1)
        assert (args.lora_dim, args.lora_module_name, args.only_optimize_lora) == (128, "decoder.layers.", True)
    else:
        assert (args.learning_rate, args.weight_decay, args.lora_dim) == (9.65e-6, 0, 0)
    assert (run.folder / "an out" / "training.log").exists()


def test_the_sweeps_run_by_fewer_words_and_by_wrong_ones(run):
    assert run(SINGLE, "3", "true").returncode == 0
    [call] = run.calls()
    assert (call.value("--zero_stage"), "--offload" in call.arguments) == ("3", True)
    assert "--lora_dim" not in call.arguments and call.value("--output_dir") == "./output_sweep_single"
    done = run(SINGLE, "3", "yes", "false", "out")
    assert (done.returncode, done.stdout) == (2, "OFFLOAD and LORA must be true or false, not yes and false\n")
    assert not run.notes.exists()


@pytest.mark.parametrize("name", STAGES)
def test_weight_decay_is_the_originals(run, name):
    """0.1 in the scripts that train little beside LoRA on several GPUs, 0 elsewhere."""
    assert run(ROOT / "training_scripts" / name, "out").returncode == 0
    decays = {float(call.value("--weight_decay")) for call in run.calls()}
    expected = {0.1} if name.split("/")[-1] in ("run_1.3b_lora.sh", "run_66b.sh", "run_66b_slurm.sh") else {0.0}
    assert decays == ({0.0, 0.1} if "run_step1_sweep" in name else expected)


def test_sweep_goes_on_after_a_failed_run(run):
    done = run(SWEEP, "out", STATUS="9", FAIL_WITH="--offload")
    assert done.returncode == 1
    combinations = {
        (call.value("--zero_stage"), "--offload" in call.arguments, "--lora_dim" in call.arguments)
        for call in run.calls()
    }
    assert len(run.calls()) == len(combinations) == 8
    folders = {call.value("--output_dir") for call in run.calls()}
    assert len(folders) == 8
    for folder in folders:
        assert (run.folder / folder / "training.log").read_text() == "to stdout\nto stderr\n"
    summary = (run.folder / "out" / "sweep.log").read_text()
    assert summary.count(": FAILED with status 9, see out/") == 4
    assert summary.count(": done") == 4
    assert summary.endswith("8 runs, 4 failed\n")
    assert done.stdout.endswith(summary)


def test_sweep_without_failures(run):
    assert run(SWEEP, "out", "3").returncode == 0
    assert (run.folder / "out" / "sweep.log").read_text().endswith("4 runs, 0 failed\n")


# The real main.py up to where training would begin (--dry_run). One process costs seconds, so these scripts
# stand for the others; ALL_DRY_RUNS=1 takes them all.
DRY_RUNS = ["single_gpu/run_1.3b.sh", "single_node/run_6.7b.sh", "llama/run_qwen3_8b_lora.sh"]
LAUNCH = """#!/usr/bin/env bash
while [[ $1 != *.py ]]; do shift; done
exec {python} "$@"
"""


@pytest.fixture(scope="module")
def small_world(tmp_path_factory):
    """A tiny OPT, a tiny Llama and a few records, for dry runs."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        OPTConfig,
        OPTForCausalLM,
        PreTrainedTokenizerFast,
    )

    world = tmp_path_factory.mktemp("world")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *alphabet]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    shape = {"vocab_size": 264, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **ids}
    opt = OPTForCausalLM(OPTConfig(ffn_dim=64, word_embed_proj_dim=32, **shape))
    llama = LlamaForCausalLM(LlamaConfig(intermediate_size=64, **shape))
    for name, model in [("opt", opt), ("llama", llama)]:
        model.save_pretrained(world / name)
        tokenizer.save_pretrained(world / name)
    import datasets

    rows = [
        {"prompt": f"Human: what is {i}? Assistant:", "chosen": f" It is {i}.", "rejected": " No."} for i in range(40)
    ]
    for split in ["train", "test"]:
        target = world / "Dahoas" / "rm-static" / "data" / f"{split}-00000-of-00001.parquet"
        datasets.Dataset.from_list(rows).to_parquet(str(target))
    return world


@pytest.mark.skipif(not (ROOT / "main.py").exists(), reason="main.py is not here")
@pytest.mark.parametrize(
    "script",
    [s for s in SINGLE_RUNS if name_of(s) in DRY_RUNS or os.environ.get("ALL_DRY_RUNS")],
    ids=name_of,
)
def test_dry_run_of_the_real_main(run, small_world, script):
    for program in ["deepspeed", "python"]:
        (run.folder / "bin" / program).write_text(LAUNCH.format(python=sys.executable))
    model = small_world / ("llama" if "llama/" in name_of(script) else "opt")
    data = small_world / "Dahoas" / "rm-static"
    further = ["--model_name_or_path", str(model), "--data_path", str(data), "--dtype", "fp32", "--dry_run"]
    further += ["--data_output_path", str(run.folder / "cache")]
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", str(script), "out", "0", *further],
        cwd=run.folder,
        env={**run.environment, **offline},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    assert "***** Running training *****" not in done.stdout
    assert (run.folder / "out" / "training.log").read_text() == done.stdout
