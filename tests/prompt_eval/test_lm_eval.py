"""`run_lm_eval.sh`: what it starts and shows; with lm_eval installed, a saved model scored without a network."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import ROOT

from evaluation_scripts.lm_eval_tasks.demo_records import load

SCRIPT = ROOT / "evaluation_scripts" / "run_lm_eval.sh"


def start(*arguments, path: Path | None = None) -> tuple[int, str]:
    """(exit status, all that is printed) of the script, with the programs of `path` before all others."""
    places = [str(place) for place in (path, Path(sys.executable).parent) if place is not None]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PATH": ":".join([*places, os.environ["PATH"]])}
    environment.pop("MODEL", None)
    done = subprocess.run(
        ["bash", SCRIPT, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=300,
    )
    return done.returncode, done.stdout + done.stderr


def test_it_passes_arguments_on_shows_its_log_and_ends_as_lm_eval_does(tmp_path):
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "python"
    program.write_text('#!/usr/bin/env bash\nif [[ $1 == -c ]]; then exit 0; fi\necho "$@"; echo trouble >&2; exit 3\n')
    program.chmod(0o755)
    status, printed = start(tmp_path, "--limit", "2", "--tasks", "a b", path=tmp_path / "bin")
    assert status == 3 and printed == (tmp_path / "lm_eval.log").read_text() and "trouble" in printed
    assert printed.startswith(
        f"-m lm_eval run --model hf --model_args pretrained={tmp_path} --batch_size 8 --tasks demo_"
    )
    assert f"--include_path {ROOT}/evaluation_scripts/lm_eval_tasks --limit 2 --tasks a b\n" in printed


def test_what_is_missing_is_said(tmp_path):
    status, printed = start("--limit", "2")
    assert status == 2 and "MODEL is missing" in printed and "usage:" in printed
    program = tmp_path / "python"
    program.write_text("#!/usr/bin/env bash\nexit 1\n")
    program.chmod(0o755)
    status, printed = start(tmp_path, path=tmp_path)
    assert status == 2 and printed == "lm_eval is not installed: pip install -r requirements-eval.txt\n"


def test_the_task_s_records_are_the_demo_s():
    rows = load()["test"]
    records = json.loads((ROOT / "data" / "eval.json").read_text())
    assert len(rows) == len(records) and rows[0] == {
        "prompt": f" {records[0]['prompt']}", "answer": records[0]["chosen"],
    }  # fmt: skip


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm_eval (requirements-eval.txt)")
def test_a_saved_model_is_scored_offline(tiny_opt, tmp_path):
    status, printed = start(tiny_opt, "--limit", "2", "--output_path", tmp_path, "--log_samples")
    assert status == 0, printed
    results = json.loads(next(tmp_path.rglob("results_*.json")).read_text())
    assert results["results"]["demo_answers"]["exact_match,none"] == 0 and "|demo_answers|" in printed
    samples = [json.loads(line) for line in next(tmp_path.rglob("samples_*.jsonl")).read_text().splitlines()]
    assert [sample["target"] for sample in samples] == load()["test"]["answer"][:2]
