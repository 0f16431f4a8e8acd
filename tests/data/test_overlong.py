"""`--overlong truncate|drop|error`: prepared and streamed, counted or refused with the first row's place and length."""

import json

import pytest
from conftest import ROOT, make_tiny_opt, write_json_data
from transformers import AutoTokenizer

from tests.data.prepared_data import SEED
from utils.data.formats.custom import own_options
from utils.data.mixture import DataSources
from utils.data.open_sets import Preparation
from utils.data.prepare import prepare_prompt_data
from utils.data.streaming import create_prompt_stream
from utils.data.tokenization.tokenize_rows import SampleForm
from utils.errors import UserError

SHORT, LONG = {"prompt": "p", "response": "r"}, {"prompt": "p", "response": "word " * 60}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "demo" / "tiny_opt")


def write(folder, name, rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def loaded(folder, tmp_path, tokenizer, overlong, split="10,0,0", stream=False, only=True):
    sample = SampleForm(tokenizer, "</s>", 32, only, overlong=overlong)
    own, preparation = own_options(tokenizer, sample.end_id), Preparation(0, str(tmp_path / "cache"), 1, SEED)
    if stream:
        return create_prompt_stream([str(folder)], sample, own, preparation, 100)
    return prepare_prompt_data(DataSources([str(folder)], split), sample, own, preparation)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("only", [False, True])
def test_long_samples_are_cut_or_left_out(tmp_path, tokenizer, stream, only, capsys):
    folder = write(tmp_path / "d", "train.jsonl", [SHORT, LONG, SHORT, LONG, SHORT])
    write(folder, "eval.jsonl", [SHORT, LONG])
    cut, of_cut = loaded(folder, tmp_path, tokenizer, "truncate", stream=stream, only=only)
    out = capsys.readouterr().out
    assert len(cut) == 5 and len(of_cut) == 2 and cut.lengths().max() == 32 and "2 truncated" in out
    kept, of_kept = loaded(folder, tmp_path, tokenizer, "drop", stream=stream, only=only)
    out = capsys.readouterr().out
    assert len(kept) == 3 and len(of_kept) == 1 and kept.lengths().max() < 32
    assert "0 truncated" in out and "2 dropped (2 longer than --max_seq_len)" in out, out
    assert cut.content.key != kept.content.key


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_names_the_first_row_and_its_length(tmp_path, tokenizer, stream):
    """In the second of two files; the tokens are those of the whole sample, its end token too."""
    folder = write(tmp_path / "d", "train-00000-of-00002.jsonl", [SHORT] * 3)
    write(folder, "train-00001-of-00002.jsonl", [SHORT, LONG, {"prompt": "p", "response": "word " * 90}])
    write(folder, "eval.jsonl", [SHORT])
    tokens = len(tokenizer(f" Human: p Assistant: {LONG['response']}")["input_ids"]) + 1
    words = rf"train-00001-of-00002\.jsonl, record 2: its sample has {tokens} tokens, more than --max_seq_len 32"
    with pytest.raises(UserError, match=words):
        loaded(folder, tmp_path, tokenizer, "error", stream=stream)
    assert not list((tmp_path / "cache").glob("prompts_*")), "nothing half-written"


def test_an_error_names_a_row_that_this_phase_reads(tmp_path, tokenizer):
    """The rows of the other phases, and those kept for evaluation, have places of their own."""
    rows = [SHORT] * 40
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train, evaluation = loaded(path, tmp_path, tokenizer, "error", split="1,1,0")
    used = len(train) + len(evaluation)
    assert used == 20
    refused = []
    for number in range(40):
        path.write_text("".join(json.dumps(LONG if at == number else row) + "\n" for at, row in enumerate(rows)))
        try:
            loaded(path, tmp_path, tokenizer, "error", split="1,1,0")
        except UserError as err:
            assert f"a.jsonl, record {number + 1}: its sample has" in str(err)
            refused.append(number)
    assert len(refused) == used


def test_known_data_sets_and_the_command_line(tmp_path, run_inside):
    records = [{"prompt": "p", "chosen": "c"}, {"prompt": "p", "chosen": "word " * 60}]
    data = write_json_data(tmp_path, records, records[:1])
    model = make_tiny_opt(tmp_path / "model")
    given = ["--model_name_or_path", model, "--data_path", data, "--data_split", "10,0,0", "--max_seq_len", "32"]
    given += ["--data_output_path", tmp_path / "cache", "--dtype", "fp32", "--dry_run", "--overlong"]
    status, out, err = run_inside([*given, "error"])
    assert status == 2 and "Traceback" not in err
    assert "record 2 of the train rows: its sample has" in " ".join(err.split()), err
    status, out, err = run_inside([*given, "drop"])
    assert status == 0 and "Data train: 1 samples" in out and "1 dropped (1 longer than --max_seq_len)" in out, err
