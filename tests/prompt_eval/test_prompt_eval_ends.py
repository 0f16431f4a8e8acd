"""How prompt_eval.py ends that can't go on, or is stopped; and a terminal that lacks the letters of the answers."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

import prompt_eval


@pytest.fixture
def both(tiny_opt) -> list[str]:
    return [f"--model_name_or_path_{name}={tiny_opt}" for name in ("baseline", "finetune")]


def ended(arguments, capfd) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        prompt_eval.run(arguments)
    return stop.value.code, capfd.readouterr().err


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("check_checkpoints", RuntimeError("broken")), ("load", MemoryError()), ("ask", OSError("gone")),
        ("ask", KeyboardInterrupt()), ("show_answers", KeyError("name")), ("write_report", OSError("gone")),
    ],
)  # fmt: skip
def test_any_error_is_one_message(place, error, both, monkeypatch, capfd, tmp_path):
    def throw(*arguments, **named):
        raise error

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr(prompt_eval, place, throw)
    status, complaint = ended([*both, "--max_new_tokens=2", "--prompt=Hi", f"--report={tmp_path / 'page'}"], capfd)
    messages = [line for line in complaint.splitlines() if line.startswith("prompt_eval.py: ")]
    assert len(messages) == 1 and "Traceback" not in complaint
    expected = {"KeyboardInterrupt": 130, "MemoryError": 2}.get(type(error).__name__, 1)
    assert status == expected and (expected == 130 or "while " in messages[0])


def test_ctrl_c_in_a_conversation(both, monkeypatch, capfd):
    """While it waits for a question, and while a model answers."""

    def stop(*arguments, **named):
        raise KeyboardInterrupt

    arguments = ["--interactive", both[0], "--max_new_tokens=2"]
    monkeypatch.setattr(prompt_eval.chat, "__defaults__", (stop, sys.stdout))
    status, complaint = ended(arguments, capfd)
    assert status == 130 and complaint.endswith("\nprompt_eval.py: stopped\n") and "Traceback" not in complaint
    monkeypatch.setattr(prompt_eval.chat, "__defaults__", (lambda prompt: "Why?", sys.stdout))
    monkeypatch.setattr("utils.prompt_eval.chat.answer_batch", stop)
    status, complaint = ended(arguments, capfd)
    assert status == 130 and complaint.endswith("\nprompt_eval.py: stopped\n") and "Traceback" not in complaint


def test_ctrl_c_while_libraries_are_imported(both):
    # A shell's background, where tests may run, has Ctrl-C ignored.
    terminal = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    command = [sys.executable, "-c", terminal, "prompt_eval.py", *both]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    maps = f"/proc/{process.pid}/maps"
    while "libtorch" not in Path(maps).read_text(encoding="utf-8"):
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    _, complaint = process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGINT, 130) and "Traceback" not in complaint, complaint


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_a_terminal_without_these_letters(encoding, both, monkeypatch, tmp_path):
    """Chinese prompts and answers appear as question marks; the report has them."""
    output = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", output)
    report = tmp_path / "page"
    prompt_eval.run([*both, "--language=Chinese", "--max_new_tokens=2", f"--report={report}"])
    output.flush()
    assert b"Human: ????" in output.buffer.getvalue() and b"Report: " in output.buffer.getvalue()
    assert "谁是1955年的美国总统" in (report / "report.md").read_text(encoding="utf-8")
    records = [json.loads(line) for line in (report / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    assert any("望远镜" in json.dumps(record, ensure_ascii=False) for record in records)
