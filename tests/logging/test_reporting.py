"""`--report_to` Weights & Biases and Comet without a network; skipped where their packages are not installed."""

import json
import zipfile

import pytest
from conftest import launch

from utils.logging.metrics_file import read_metrics


def perplexities(folder) -> list[float]:
    return [record["perplexity"] for record in read_metrics(str(folder)) if "perplexity" in record]


def test_wandb_offline(run_arguments, tmp_path):
    pytest.importorskip("wandb")
    where = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path)}
    done = launch([], [*run_arguments, "--max_steps", "2", "--output_dir", tmp_path, "--report_to", "wandb"], env=where)
    assert done.returncode == 0, done.stdout + done.stderr
    (written,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = written.read_bytes()
    for name in ("Train/Samples/train_loss", "Train/Samples/lr", "Eval/Samples/loss"):
        assert name.encode() in content
    assert all(repr(figure).encode() in content for figure in perplexities(tmp_path))


def test_comet_offline(run_arguments, tmp_path):
    pytest.importorskip("comet_ml")
    offline = tmp_path / "offline.json"
    offline.write_text(json.dumps({"comet": {"online": False}}))
    where = {"COMET_OFFLINE_DIRECTORY": str(tmp_path / "comet")}
    report = ["--report_to", "comet", "--deepspeed_config", offline]
    done = launch([], [*run_arguments, "--max_steps", "2", "--output_dir", tmp_path, *report], env=where)
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,) = (tmp_path / "comet").glob("*.zip")
    with zipfile.ZipFile(archive) as file:
        sent = [json.loads(line)["payload"].get("metric") for line in file.read("messages.json").decode().splitlines()]
    values = [metric["metricValue"] for metric in sent if metric and metric["metricName"] == "Eval/Samples/perplexity"]
    assert [float(value) for value in values] == pytest.approx(perplexities(tmp_path))
