"""Tokenizers: the folder's own one, its ids unchanged, BOS kept, and never the network."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import ROOT, SHARED, needs_shared

from utils.errors import UserError
from utils.model.tokenizer import load_hf_tokenizer

DEMO = ROOT / "demo" / "tiny_opt"
TEXT = "Human: Hello there"
TINY_IDS = [2, 43, 271, 29, 1335, 1464]
OPT_IDS = [2, 33837, 35, 20920, 89]


def folder_of(source: Path, target: Path, **config) -> Path:
    """A writable copy of a tokenizer, with a model configuration beside it if one is given."""
    shutil.copytree(source, target, copy_function=shutil.copyfile)
    os.chmod(target, 0o755)
    if config:
        (target / "config.json").write_text(json.dumps(config))
    return target


def bare_opt(target: Path) -> Path:
    """The shipped tokenizer as OPT's vocabulary and merges alone, without anything that says how to use them."""
    model = json.loads((DEMO / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    target.mkdir()
    (target / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    (target / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    return target


def assert_round_trip(tokenizer, folder: Path) -> None:
    tokenizer.save_pretrained(folder)
    again = load_hf_tokenizer(str(folder))
    for text in (TEXT, " Ünïcode 蜘蛛 \n tabs\tand  spaces</s>"):
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "padding_side"):
        assert getattr(again, name) == getattr(tokenizer, name)
    assert len(again) == len(tokenizer)


def test_bare_opt_vocabulary_keeps_bos(tmp_path):
    tokenizer = load_hf_tokenizer(str(bare_opt(tmp_path / "bare")))
    assert tokenizer(TEXT)["input_ids"] == TINY_IDS
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 2, 1)
    assert_round_trip(tokenizer, tmp_path / "saved")


@needs_shared
@pytest.mark.parametrize("source", ["opt_tokenizer", "tokenizers/opt-350m"])
def test_opt_golden_ids(source, tmp_path):
    tokenizer = load_hf_tokenizer(str(SHARED / source))
    assert tokenizer(TEXT)["input_ids"] == OPT_IDS
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (2, 1, 50265)
    assert_round_trip(tokenizer, tmp_path / "saved")


@needs_shared
@pytest.mark.parametrize(
    ("name", "config", "ids", "eos", "pad"),
    [
        ("gpt2", {"model_type": "gpt2", "eos_token_id": 50256}, [20490, 25, 18435, 612], 50256, 50256),
        ("gpt-neox-20b", {"model_type": "gpt_neox", "eos_token_id": 0}, [22705, 27, 24387, 627], 0, None),
    ],
)
def test_eos_comes_from_the_model_where_the_tokenizer_names_none(name, config, ids, eos, pad, tmp_path):
    tokenizer = load_hf_tokenizer(str(folder_of(SHARED / "tokenizers" / name, tmp_path / name, **config)))
    entries = len(tokenizer)
    assert tokenizer(TEXT)["input_ids"] == ids
    assert tokenizer.eos_token_id == eos
    assert tokenizer.pad_token_id == (pad if pad is not None else tokenizer.convert_tokens_to_ids("<|padding|>"))
    assert tokenizer.pad_token_id < entries
    assert_round_trip(tokenizer, tmp_path / "saved")


@pytest.mark.parametrize("name", ["llama", "my-Llama-3-finetune", "vicuna/llama-opt"])
def test_a_path_with_llama_in_it_changes_nothing(name, tmp_path):
    folder = folder_of(DEMO, tmp_path / name)
    tokenizer = load_hf_tokenizer(str(folder))
    assert tokenizer(TEXT)["input_ids"] == TINY_IDS
    assert "Llama" not in type(tokenizer).__name__
    # Nor does a Llama model with a byte-level tokenizer, as Llama 3 has.
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 2}))
    assert load_hf_tokenizer(str(folder))(TEXT)["input_ids"] == TINY_IDS


@needs_shared
def test_llama_keeps_bos_and_pads_with_eos():
    tokenizer = load_hf_tokenizer(str(SHARED / "stories260K"))
    assert tokenizer(TEXT)["input_ids"] == [1, 320, 425, 423, 303, 467, 346, 306, 414, 383]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (2, 2, 512)


@needs_shared
def test_bare_sentencepiece_model_of_a_llama(tmp_path):
    folder = tmp_path / "sp"
    folder.mkdir()
    shutil.copyfile(SHARED / "llama_tokenizer.model", folder / "tokenizer.model")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 2}))
    if find_spec("sentencepiece") is None:
        with pytest.raises(UserError, match="pip install sentencepiece"):
            load_hf_tokenizer(str(folder))
    else:
        tokenizer = load_hf_tokenizer(str(folder))
        assert tokenizer(TEXT)["input_ids"] == [1, 12968, 29901, 15043, 727]
        assert_round_trip(tokenizer, tmp_path / "saved")


def test_a_pad_token_is_made_only_if_there_is_none_to_share(tmp_path):
    own = load_hf_tokenizer(str(DEMO))
    assert own.pad_token == "<pad>" and len(own) == 1809
    settings = json.loads((DEMO / "tokenizer_config.json").read_text())

    def without(*names: str) -> Path:
        folder = folder_of(DEMO, tmp_path / "-".join(names))
        (folder / "config.json").unlink()
        (folder / "special_tokens_map.json").unlink()
        kept = {key: value for key, value in settings.items() if key not in names}
        (folder / "tokenizer_config.json").write_text(json.dumps(kept))
        return folder

    shared = load_hf_tokenizer(str(without("pad_token")))
    assert shared.pad_token == shared.eos_token == "</s>" and len(shared) == 1809
    made = load_hf_tokenizer(str(without("pad_token", "eos_token")))
    assert made.eos_token is None and made.pad_token_id == 1809 and len(made) == 1810


def test_added_end_token_survives_saving(tmp_path):
    tokenizer = load_hf_tokenizer(str(DEMO), add_special_tokens="<|done|>")
    assert tokenizer("a<|done|>")["input_ids"][-1] == 1809 == len(tokenizer) - 1
    assert_round_trip(tokenizer, tmp_path / "saved")


@pytest.mark.parametrize("files", [{}, {"config.json": "{}"}, {"vocab.json": '{"<s>": 0, "<pad>": 1, "</s>": 2}'}])
def test_a_folder_without_a_whole_tokenizer(files, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=str(tmp_path)):
        load_hf_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=str(tmp_path)):
        load_hf_tokenizer(str(tmp_path))


NO_NETWORK = """
import socket, sys
def refuse(*args, **kwargs):
    print("NETWORK", args, flush=True)
    raise OSError("no network here")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refuse
from utils.errors import UserError
from utils.utils import load_hf_tokenizer
for folder in sys.argv[1:]:
    try:
        print("IDS", load_hf_tokenizer(folder)("Human: Hello there")["input_ids"], flush=True)
    except UserError as err:
        print("UserError", flush=True)
"""


def test_a_local_folder_is_never_looked_up_elsewhere(tmp_path):
    """With the hub allowed, and a configuration that names another model, nothing connects."""
    named = folder_of(DEMO, tmp_path / "named", model_type="opt", _name_or_path="facebook/opt-1.3b", eos_token_id=2)
    settings = json.loads((named / "tokenizer_config.json").read_text())
    (named / "tokenizer_config.json").write_text(json.dumps({**settings, "name_or_path": "facebook/opt-1.3b"}))
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text((named / "config.json").read_text())
    environment = {key: value for key, value in os.environ.items() if "OFFLINE" not in key}
    run = subprocess.run(
        [sys.executable, "-c", NO_NETWORK, named, bare_opt(tmp_path / "bare"), empty],
        capture_output=True, text=True, cwd=ROOT, env={**environment, "PYTHONPATH": str(ROOT)}, timeout=120,
    )  # fmt: skip
    lines = [line for line in run.stdout.splitlines() if line.startswith(("IDS", "UserError", "NETWORK"))]
    assert lines == [f"IDS {TINY_IDS}", f"IDS {TINY_IDS}", "UserError"], run.stdout + run.stderr
