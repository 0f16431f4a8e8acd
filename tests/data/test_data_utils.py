"""What becomes of records: the items of each phase, the end token, truncation, splits and mixtures of data sets."""

import json
import re
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import ROOT, SHARED, needs_shared, write_json_data
from transformers import AutoTokenizer

from tests.data.prepared_data import prepare
from utils.data.batching.collate import collate_padded
from utils.data.data_utils import create_prompt_dataset
from utils.data.splits import get_shuffle_idx, split_boundaries
from utils.data.tokenization.tokenize_rows import SampleForm, end_of_conversation_token
from utils.errors import UserError
from utils.model.tokenizer import load_hf_tokenizer

SEED = 1234
LONG = 64


def record(number: int, name: str = "a", words: int = 2) -> dict:
    """One record; its number can be read in every text."""
    return {
        "prompt": f"{name} number {number}?",
        "chosen": f"good {number}" + " and so on" * (words + number % 3),
        "rejected": f"bad {number}",
    }


def texts(row: dict) -> tuple[str, str, str]:
    """Prompt, prompt + chosen, prompt + rejected of a `local/jsonfile` record, as the published scripts join them."""
    return f" {row['prompt']}", f" {row['prompt']} {row['chosen']}", f" {row['prompt']} {row['rejected']}"


@pytest.fixture(scope="module")
def plain():
    """The shipped tokenizer read by plain transformers: the independent tokenization."""
    return AutoTokenizer.from_pretrained(ROOT / "demo" / "tiny_opt")


@pytest.fixture(scope="module")
def tokenizer():
    return load_hf_tokenizer(str(ROOT / "demo" / "tiny_opt"))


@pytest.fixture
def build(tmp_path, tokenizer):
    """Build a phase's data from folders (or lists of records) with defaults for everything else."""

    def build_it(*paths: Path, **changes):
        settings = {
            "data_split": "10,0,0", "output_path": str(tmp_path / "cache"), "train_phase": 1, "seed": SEED,
            "tokenizer": tokenizer, "max_seq_len": LONG, "end_of_conversation_token": "</s>",
        }  # fmt: skip
        return create_prompt_dataset(0, [str(path) for path in paths], **{**settings, **changes})

    return build_it


def shuffled(rows: list, data_split: str = "10,0,0", part: int = 0) -> list:
    """The rows of one part, in the published order."""
    boundaries = split_boundaries(data_split, len(rows)).boundaries
    return [rows[i] for i in get_shuffle_idx(SEED, len(rows))[boundaries[part] : boundaries[part + 1]]]


def ids_of(data) -> list[list[int]]:
    return [data[i]["input_ids"].tolist() for i in range(len(data))]


def expected_ids(plain, rows: list[dict], end: int = 2) -> list[list[int]]:
    return [[*plain(texts(row)[1])["input_ids"], end] for row in rows]


# ------------------------------------------------------------------------------------------------- items


def test_phase_1_items(build, plain, tmp_path):
    rows, held_out = [record(i) for i in range(20)], [record(i, "b") for i in range(5)]
    train, evaluation = build(write_json_data(tmp_path, rows, held_out))
    assert ids_of(train) == expected_ids(plain, shuffled(rows))
    assert ids_of(evaluation) == expected_ids(plain, shuffled(held_out))
    for item in (train[0], train[len(train) - 1]):
        ids = item["input_ids"]
        assert ids[0] == 2 and ids[1] != 2, "the BOS OPT was trained with"
        assert ids[-1] == 2 and ids[-2] != 2, "one end token"
        assert ids.dtype == item["labels"].dtype == torch.int64
        assert item["labels"].equal(ids) and item["attention_mask"].equal(torch.ones_like(ids))
    assert train.lengths().tolist() == [len(ids) for ids in ids_of(train)]


def test_phase_2_items(build, plain, tmp_path):
    rows = [record(i) for i in range(12)]
    train, _ = build(write_json_data(tmp_path, rows, rows[:3]), train_phase=2, data_split="0,1,0")
    assert len(train) == 12
    for item, row in zip((train[i] for i in range(12)), shuffled(rows), strict=True):
        for ids, mask, text in ((*item[:2], texts(row)[1]), (*item[2:], texts(row)[2])):
            wanted = [*plain(text)["input_ids"], 2]
            assert ids.shape == mask.shape == (1, LONG)
            assert ids[0].tolist() == wanted + [plain.pad_token_id] * (LONG - len(wanted))
            assert mask[0].tolist() == [1] * len(wanted) + [0] * (LONG - len(wanted))


def test_phase_3_items(build, plain, tmp_path, capsys):
    rows = [record(i) for i in range(6)] + [{**record(6), "prompt": "too long " * LONG}]
    train, _ = build(write_json_data(tmp_path, rows, rows[:3]), train_phase=3, data_split="0,0,1")
    kept = [row for row in shuffled(rows) if len(plain(texts(row)[0])["input_ids"]) <= LONG]
    assert len(train) == len(kept) == 6
    for (ids, mask, pad), row in zip((train[i] for i in range(6)), kept, strict=True):
        assert ids.flip(0).tolist() == plain(texts(row)[0])["input_ids"]
        assert mask.tolist() == [1] * len(ids) and pad == plain.pad_token_id
    assert "6 samples" in capsys.readouterr().out.split("Data train")[1].splitlines()[0]


@pytest.mark.parametrize("data_split", ["2,4,4", "1,1,1", "0,5,5", "6,2,2"])
def test_the_phases_share_the_rows_without_overlap(build, plain, tmp_path, data_split):
    rows = [record(i) for i in range(23)]
    data = write_json_data(tmp_path, rows, [record(i, "b") for i in range(31)])
    numbers = {"train": [], "eval": []}
    for phase in (1, 2, 3):
        if data_split.split(",")[phase - 1] == "0":
            with pytest.raises(UserError, match="larger share"):
                build(data, train_phase=phase, data_split=data_split)
            continue
        for split, part in zip(numbers, build(data, train_phase=phase, data_split=data_split), strict=True):
            for i in range(len(part)):
                ids = part[i]["input_ids"] if phase == 1 else part[i][0].flatten()
                text = plain.decode(ids if phase < 3 else ids.flip(0))
                numbers[split].append(int(re.search(r"number (\d+)", text)[1]))
    assert sorted(numbers["train"]) == list(range(23))
    assert sorted(numbers["eval"]) == list(range(31))


# ------------------------------------------------------------------------------------------ the end token


def test_the_end_token_is_there_exactly_once(build, plain, tmp_path):
    """Also after a text that already ends in it, and after a tokenizer that appends one itself."""
    rows = [{**record(0), "chosen": "done</s>"}, {**record(1), "chosen": "done"}]
    data = write_json_data(tmp_path, rows, rows)
    ends = [ids[-3:].count(2) for ids in ids_of(build(data)[0])]
    assert ends == [1, 1]
    appending = AutoTokenizer.from_pretrained(ROOT / "demo" / "tiny_opt")
    appending.pad_token = "<pad>"
    from tokenizers.processors import TemplateProcessing

    appending.backend_tokenizer.post_processor = TemplateProcessing(
        single="</s> $A </s>", special_tokens=[("</s>", 2)]
    )  # fmt: skip
    assert appending("a")["input_ids"][-1] == 2
    ends = [
        ids[-3:].count(2) for ids in ids_of(build(write_json_data(tmp_path, rows[1:], rows), tokenizer=appending)[0])
    ]
    assert ends == [1]


def test_the_end_token_asked_for(build, tmp_path):
    rows = [record(i) for i in range(3)]
    data = write_json_data(tmp_path, rows, rows)
    extended = load_hf_tokenizer(str(ROOT / "demo" / "tiny_opt"), add_special_tokens="<|done|>")
    assert {ids[-1] for ids in ids_of(build(data, tokenizer=extended, end_of_conversation_token="<|done|>")[0])} == {
        1809
    }
    own = load_hf_tokenizer(str(ROOT / "demo" / "tiny_opt"))
    with pytest.raises(UserError, match=r"<\|done\|>.*'</s>'.*--add_eot_token"):
        end_of_conversation_token(own, "<|done|>", "tiny_opt")


@needs_shared
@pytest.mark.parametrize(
    ("source", "config", "asked", "ids"),
    [
        ("opt_tokenizer", None, "</s>", [2, 3861, 35, 20920, 89, 20920, 2]),
        ("tokenizers/gpt2", {"model_type": "gpt2", "eos_token_id": 50256}, None, [5524, 25, 18435, 612, 18435, 50256]),
        (
            "tokenizers/gpt-neox-20b",
            {"model_type": "gpt_neox", "eos_token_id": 0},
            None,
            [8801, 27, 24387, 627, 24387, 0],
        ),
        ("stories260K", None, "</s>", [1, 320, 425, 423, 303, 467, 346, 306, 414, 383, 346, 306, 414, 2]),
    ],
    ids=["opt", "gpt2", "neox", "llama"],
)
def test_every_family_ends_with_its_own_token(build, tmp_path, source, config, asked, ids):
    """Golden ids. A Llama has no `<|endoftext|>`, which would be appended as text: main.py asks for its eos."""
    folder = tmp_path / "model"
    shutil.copytree(SHARED / source, folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    own = load_hf_tokenizer(str(folder))
    row = {"prompt": "Human: Hello there", "chosen": "Hello"}
    data = write_json_data(tmp_path, [row], [row])
    train, _ = build(data, tokenizer=own, end_of_conversation_token=asked or "<|endoftext|>")
    assert ids_of(train) == [ids]
    assert ids[-1] == own.eos_token_id == SampleForm(own, own.eos_token, LONG).end_id


def test_pad_is_eos_and_the_end_is_still_learned(build, tmp_path):
    """Masks come from lengths: the first eos is a label, the same id after it is not."""
    shared = AutoTokenizer.from_pretrained(ROOT / "demo" / "tiny_opt")
    shared.pad_token = shared.eos_token
    rows = [record(0, words=1), record(1, words=6)]
    train, _ = build(write_json_data(tmp_path, rows, rows), tokenizer=shared)
    samples = sorted((train[i] for i in range(2)), key=lambda sample: len(sample["input_ids"]))
    batch = collate_padded(samples, pad_token_id=shared.pad_token_id)
    short, width = len(samples[0]["input_ids"]), len(samples[1]["input_ids"])
    assert short < width == batch["input_ids"].shape[1]
    assert batch["input_ids"][0, short - 1 :].tolist() == [2] * (width - short + 1)
    assert batch["labels"][0, short - 1 :].tolist() == [2] + [-100] * (width - short)
    assert batch["attention_mask"].sum(dim=1).tolist() == [short, width]
    assert batch["targets"].tolist().count(2) == 2


# ------------------------------------------------------------------------------- truncated, dropped, empty


def test_truncated_samples_are_counted_and_said(build, plain, tmp_path, capsys):
    rows = [record(i) for i in range(6)] + [record(i, words=40) for i in range(6, 8)]
    train, _ = build(write_json_data(tmp_path, rows, rows[:3]))
    lengths = train.lengths().tolist()
    whole = [len(ids) for ids in expected_ids(plain, shuffled(rows))]
    assert lengths == [min(length, LONG) for length in whole] and sum(length > LONG for length in whole) == 2
    assert [ids[-1] == 2 for ids in ids_of(train)] == [length <= LONG for length in whole]
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Data train"))
    assert f"8 samples, {sum(lengths)} tokens" in line
    assert "2 truncated at max_seq_len 64, so 25.0% lost their end token" in line


def test_records_without_text_or_label_are_dropped(build, tmp_path, capsys):
    folder = tmp_path / "pvduy" / "sharegpt_alpaca_oa_vicuna_format"
    rows = [{"prompt": f"USER: {i} ASSISTANT:", "label": f"answer {i}"} for i in range(8)]
    rows[2]["label"] = rows[5]["label"] = None
    rows[6]["prompt"] = ""
    for split in ("train", "test"):
        datasets.Dataset.from_list(rows).to_parquet(folder / f"{split}.parquet")
    train, _ = build(folder)
    assert len(train) == 5
    assert "5 samples" in (out := capsys.readouterr().out) and "3 dropped" in out


def test_no_sample_at_all_is_said(build, tmp_path):
    folder = tmp_path / "pvduy" / "sharegpt_alpaca_oa_vicuna_format"
    for split in ("train", "test"):
        datasets.Dataset.from_dict({"prompt": ["a"], "label": [""]}).to_parquet(folder / f"{split}.parquet")
    with pytest.raises(UserError, match="no training sample"):
        build(folder)


# ---------------------------------------------------------------------------------------------- mixtures


def test_several_data_sets_are_joined_and_shuffled(build, plain, tmp_path):
    sets = {name: [record(i, name) for i in range(size)] for name, size in (("a", 9), ("b", 5), ("c", 4))}
    folders = [write_json_data(tmp_path / name, rows, rows[:2]) for name, rows in sets.items()]
    split = "6,2,2"
    parts = [shuffled(rows, split) for rows in sets.values()]
    both = [*parts[0], *parts[1]]
    both = [both[i] for i in get_shuffle_idx(SEED, len(both))]
    assert ids_of(build(*folders[:2], data_split=split)[0]) == expected_ids(plain, both)
    # SFT-only data is used whole, added, and all is shuffled once more.
    mixed = both + shuffled(sets["c"])
    mixed = [mixed[i] for i in get_shuffle_idx(SEED, len(mixed))]
    train, _ = build(*folders[:2], data_split=split, sft_only_data_path=[str(folders[2])])
    assert ids_of(train) == expected_ids(plain, mixed)


def test_sft_only_data_is_for_phase_1_alone(build, tmp_path):
    rows = [record(i) for i in range(10)]
    folders = [write_json_data(tmp_path / name, rows, rows) for name in "ab"]
    train, _ = build(folders[0], train_phase=2, data_split="2,4,4", sft_only_data_path=[str(folders[1])])
    assert len(train) == 4


def test_the_role_of_a_data_set_is_part_of_the_cache_key(build, tmp_path):
    """The same sets in the same order, once as main and once as SFT-only data, come out in another order."""
    folders = [write_json_data(tmp_path / name, [record(i, name) for i in range(8)], [record(0)]) for name in "abc"]
    main = build(*folders[:2], sft_only_data_path=[str(folders[2])])[0]
    mostly_sft = build(folders[0], sft_only_data_path=[str(folder) for folder in folders[1:]])[0]
    assert sorted(ids_of(main)) == sorted(ids_of(mostly_sft)) and ids_of(main) != ids_of(mostly_sft)


@needs_shared
def test_real_dialogues(build, plain):
    """The whole of rm-static's phase 1 part against plain transformers."""
    folder = SHARED / "hub" / "Dahoas" / "rm-static"
    rows = datasets.load_dataset("parquet", data_files=str(next(folder.rglob("train*.parquet"))), split="train")
    train, _ = build(folder, data_split="2,4,4", max_seq_len=512)
    index = get_shuffle_idx(SEED, len(rows))[: split_boundaries("2,4,4", len(rows)).boundaries[1]]
    wanted = [[*plain(row["prompt"] + row["chosen"])["input_ids"], 2][:512] for row in rows.select(index)]
    assert ids_of(train) == wanted


def test_small_and_large_builds_agree(tokenizer, tmp_path):
    """Several processes give the same rows as one."""
    rows = [record(i) for i in range(200)]
    data = write_json_data(tmp_path, rows, rows[:5])
    one = prepare([data], tmp_path / "cache", tokenizer, LONG, num_proc=1)[0]
    two = prepare([data], tmp_path / "cache", tokenizer, LONG, num_proc=2, rebuild=True)[0]
    assert np.array_equal(one.lengths(), two.lengths()) and ids_of(one) == ids_of(two)
