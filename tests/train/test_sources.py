"""What run.json says of model and data: commits of the hub, fingerprints of local files."""

import json
import shutil
from argparse import Namespace

from huggingface_hub import constants

from utils.train.sources import hub_revision, read_sources, say_what_differs, sources_of

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def arguments(model, *data) -> Namespace:
    names = [str(name) for name in data]
    return Namespace(model_name_or_path=str(model), data_path=names, sft_only_data_path=[], eval_data_path=[])


def test_local_files_are_known_by_their_content(tiny_opt, json_data, tmp_path):
    model, data = tmp_path / "model", tmp_path / "data"
    shutil.copytree(tiny_opt, model)
    shutil.copytree(json_data, data)
    first = sources_of(arguments(model, f"{data}:0.5"))
    assert first["model"]["name"] == str(model) and first["data"][0]["name"] == str(data)
    assert sources_of(arguments(model, data)) == first
    rows = json.loads((data / "train.json").read_text())
    rows[0]["chosen"] = rows[0]["chosen"].replace("e", "a")
    (data / "train.json").write_text(json.dumps(rows))
    second = sources_of(arguments(model, data))
    assert second["model"] == first["model"] and second["data"] != first["data"]


def test_a_hub_name_is_known_by_the_commit_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "datasets--some--set" / "refs").mkdir(parents=True)
    (tmp_path / "datasets--some--set" / "refs" / "main").write_text(COMMIT)
    assert hub_revision("some/set", "dataset") == COMMIT and hub_revision("some/set", "model") is None
    assert sources_of(arguments("no/model", "some/set"))["data"] == [{"name": "some/set", "revision": COMMIT}]


def test_what_has_changed_is_printed(tmp_path, capsys):
    now = {"model": {"name": "m", "weights": "new"}, "data": [{"name": "d", "files": "same"}]}
    then = {"model": {"name": "m", "weights": "old"}, "data": [{"name": "d", "files": "same"}]}
    say_what_differs("run", then, now)
    assert capsys.readouterr().out == "--like run: m has changed since: weights old then, weights new now\n"
    say_what_differs("run", read_sources(str(tmp_path)), now)
    assert "did not record" in capsys.readouterr().out
