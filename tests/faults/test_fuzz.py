"""Arguments and data at random: a right run or a clear error, never a traceback, never something half-written."""

import json
import os
import random
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import main
from utils.data.data_utils import create_prompt_dataset
from utils.errors import UserError
from utils.model.tokenizer import load_hf_tokenizer

ONE_AFTER_THE_OTHER = settings(
    deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip

NUMBERS = ["-1", "0", "1", "2", "3", "7", "64", "1000000", "1e-3", "0.5", "1.0", "nan", "inf", "-inf", "", "many"]
FLAGS = {
    "--max_seq_len": NUMBERS, "--per_device_train_batch_size": NUMBERS, "--per_device_eval_batch_size": NUMBERS,
    "--gradient_accumulation_steps": NUMBERS, "--learning_rate": NUMBERS, "--weight_decay": NUMBERS,
    "--num_train_epochs": ["-1", "0", "1", "2", "x"], "--max_steps": ["0", "1", "3"], "--num_warmup_steps": NUMBERS,
    "--lr_scheduler_type": ["cosine", "linear", "constant", "polynomial", "sine"], "--seed": NUMBERS,
    "--dropout": NUMBERS, "--disable_dropout": None, "--dtype": ["fp32", "auto", "fp16", "int8"],
    "--padding": ["free", "longest", "max_length", "none"], "--packing": None, "--completion_only_loss": None,
    "--neftune_noise_alpha": NUMBERS, "--lora_dim": ["-1", "0", "2", "1000"], "--only_optimize_lora": None,
    "--lora_module_name": ["decoder.layers.", "auto", "fc1,fc2", "nothing", "", ","], "--save_lora_adapter": None,
    "--lora_alpha": NUMBERS, "--lora_dropout": NUMBERS, "--lora_learning_rate": NUMBERS,
    "--zero_stage": ["0", "1", "4"],
    "--gradient_checkpointing": None, "--add_eot_token": None, "--eot_token": ["", "<end>", "the"],
    "--data_split": ["10,0,0", "1,1,1", "0,1,1", "1", "a,b", "-1,2,3", "", "nan,1,1"],
    "--columns": ["prompt=q", "x", ""],
    "--chat_template": ["auto", "human_assistant", "missing.jinja", ""], "--save_steps": ["0", "1", "2"],
    "--save_strategy": ["no", "steps", "epoch"], "--save_total_limit": ["-1", "0", "1"], "--eval_steps": ["0", "2"],
    "--resume_from_checkpoint": ["latest", "nowhere", None], "--load_best_model_at_end": None,
    "--early_stopping_patience": ["0", "1"], "--max_bad_steps": ["0", "1"], "--print_loss": None,
    "--model_name_or_path": ["", "no/such/model", "."], "--data_path": ["no/such/data", ""],
    "--ddp_timeout": ["0", "60"],
    "--preprocessing_num_workers": ["0", "1"], "--deepspeed_config": ["missing.json", "README.md"], "--nonsense": None,
    "--streaming": ["0", "1", "20", "x", None],
}  # fmt: skip
FLAG = st.sampled_from(sorted(FLAGS)).flatmap(
    lambda flag: st.tuples(st.just(flag), st.sampled_from(FLAGS[flag]) if FLAGS[flag] else st.just(None))
)


def call_main(arguments: list[str]) -> tuple[int, str, str]:
    """main.py in this process: (status, stdout, stderr)."""
    out, err, environment = StringIO(), StringIO(), dict(os.environ)
    status = 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main.run(arguments)
        except SystemExit as stop:
            status = int(stop.code or 0)
    os.environ.clear()
    os.environ.update(environment)
    return status, out.getvalue(), err.getvalue()


def test_random_arguments(run_setting, tmp_path, monkeypatch):
    """200 combinations; one in twenty that is not refused is trained for up to three steps, the others prepare data."""
    counts = {"refused": 0, "prepared": 0, "trained": 0}
    # The plan's memory and time have tests of their own, and take longer than all the rest.
    monkeypatch.setattr(main, "dry_run", lambda args, *_: print("prepared"))

    @settings(ONE_AFTER_THE_OTHER, max_examples=200)
    @given(flags=st.lists(FLAG, min_size=0, max_size=4), really=st.integers(0, 19))
    def one_case(flags, really):
        output = tmp_path / f"output_{sum(counts.values())}"
        words = [word for flag, value in flags for word in ([flag] if value is None else [f"{flag}={value}"])]
        short = ["--max_steps=2"] if not any(word.startswith("--max_steps") for word in words) else []
        command = [*run_setting, f"--output_dir={output}", *short, *words, *([] if really == 0 else ["--dry_run"])]
        status, _, err = call_main(command)
        assert "Traceback" not in err, (words, err)
        assert status in (0, 2), (words, status, err)
        if status == 2:
            assert "error: " in err and len(err.split("error: ")[1].strip()) > 20, (words, err)
            files = [path for path in output.rglob("*") if path.is_file()] if output.exists() else []
            assert not files or "not finite" in err, (words, files)
            counts["refused"] += 1
        elif really == 0:
            assert (output / "config.json").exists() and (output / "metrics.jsonl").exists(), words
            counts["trained"] += 1
        else:
            assert not output.exists() or not any(output.iterdir()), words
            counts["prepared"] += 1

    one_case()
    assert counts["refused"] > 60 and counts["prepared"] > 30 and counts["trained"] > 1, counts


# ------------------------------------------------------------------------------------ mutated files

RECORD = {"prompt": "How many legs has a spider?", "chosen": "Eight.", "rejected": "Six."}
PIECES = [b"\n", b"{", b"}", b"[" * 2000, b'"', b",", b"\xef\xbb\xbf", b"\x00", b"NaN"]
VALUES = [None, 1, -0.5, True, "", " ", "é蜘蛛\u202e", "\ud800", [], ["a"], {}, {"a": 1}, "x" * 5000, float("nan")]


def mutate_records(records: list, chance: random.Random) -> list:
    """Some records lose, gain, or change a field, or stop being records."""
    for _ in range(chance.randint(0, 3)):
        place = chance.randrange(len(records))
        kind = chance.randrange(5)
        if kind == 0:
            records[place] = chance.choice(VALUES)
        elif kind == 1 and isinstance(records[place], dict):
            records[place].pop(chance.choice(["prompt", "chosen", "rejected"]), None)
        elif kind == 2 and isinstance(records[place], dict):
            records[place][chance.choice(["prompt", "chosen", "rejected", "more"])] = chance.choice(VALUES)
        elif kind == 3:
            records.insert(place, records[place])
        elif len(records) > 1:
            records.pop(place)
    return records


def mutate_bytes(content: bytes, chance: random.Random) -> bytes:
    """The file is cut, loses or gains bytes, or gets foreign ones."""
    data = bytearray(content)
    for _ in range(chance.choice([0, 0, 1, 1, 2, 5])):
        place = chance.randrange(len(data) + 1)
        kind = chance.randrange(5)
        if kind == 0:
            del data[place:]
        elif kind == 1:
            del data[place : place + chance.randint(1, 40)]
        elif kind == 2:
            data[place:place] = bytes(chance.randrange(256) for _ in range(chance.randint(1, 8)))
        elif kind == 3:
            data[place:place] = chance.choice(
                [b"\n", b"{", b"}", b"[" * 2000, b'"', b",", b"\xef\xbb\xbf", b"\x00", b"NaN"]
            )
        elif data:
            data[place % len(data)] ^= 1 << chance.randrange(8)
    return bytes(data)


def test_mutated_files(tmp_path):
    """500 files, json and jsonl, known and own format: data to train on, or words that name the place."""
    counts, tokenizer = {"read": 0, "refused": 0}, load_hf_tokenizer(str(ROOT / "demo" / "tiny_opt"))

    @settings(ONE_AFTER_THE_OTHER, max_examples=500)
    @given(seed=st.integers(0, 2**32 - 1))
    def one_case(seed):
        chance = random.Random(seed)
        known = chance.random() < 0.5
        folder = tmp_path / str(seed) / ("local/jsonfile" if known else "own")
        folder.mkdir(parents=True)
        lines = not known and chance.random() < 0.5
        records = mutate_records([dict(RECORD, prompt=f"{RECORD['prompt']} {i}") for i in range(12)], chance)
        text = "\n".join(map(json.dumps, records)) if lines else json.dumps(records)
        for part in ("train", "eval"):
            file = folder / f"{part}.{'jsonl' if lines else 'json'}"
            file.write_bytes(mutate_bytes(text.encode(), chance) if part == "train" else text.encode())
        cache = folder.parent / "cache"
        try:
            with redirect_stdout(StringIO()):
                train, _ = create_prompt_dataset(0, [str(folder)], "10,0,0", str(cache), 1, 1234, tokenizer, 64, "</s>")
            assert 0 < len(train) <= 40
            assert all(len(train[i]["input_ids"]) > 1 for i in range(len(train)))
            counts["read"] += 1
        except UserError as err:
            assert str(folder) in str(err) or "no training sample" in str(err), err
            counts["refused"] += 1
        assert not list(cache.rglob(".incomplete*")) and not list(cache.rglob("*.tmp"))

    one_case()
    assert min(counts.values()) > 90, counts
