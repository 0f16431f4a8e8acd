"""--config and --like: arguments from a file and those of an earlier run, beside what is typed."""

import json

import pytest
import yaml
from conftest import ROOT
from fork_runs import finished_run, outcome

from utils.arguments.parser import build_parser, parse_args
from utils.errors import UserError

MODEL = ["--model_name_or_path", "a/model"]
SETTING = {
    "model_name_or_path": "a/model", "data_path": ["one", "two:0.5"], "learning_rate": 1e-5, "save_strategy": "no",
    "chat_template": "none", "data_split": "2,4,4", "disable_dropout": True, "packing": False, "zero_stage": 2,
    "streaming": True, "resume_from_checkpoint": "a/b", "max_steps": None, "report_to": "none", "columns": "prompt=a",
    "lora_alpha": -1.5,
}  # fmt: skip
TYPED = [
    *MODEL, "--data_path", "one", "two:0.5", "--learning_rate", "1e-5", "--save_strategy", "no", "--chat_template",
    "none", "--data_split", "2,4,4", "--disable_dropout", "--zero_stage", "2", "--streaming",
    "--resume_from_checkpoint", "a/b", "--report_to", "none", "--columns", "prompt=a", "--lora_alpha", "-1.5",
]  # fmt: skip


def values(argv: list) -> dict:
    """The arguments, but for the file they came from."""
    return {**vars(parse_args([str(word) for word in argv])), "config": None, "like": None}


def written(folder, content, name: str = "run.yaml") -> str:
    path = folder / name
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(yaml.safe_dump(content) if name.endswith("yaml") and not isinstance(content, str) else text)
    return str(path)


@pytest.mark.parametrize("name", ["run.yaml", "run.json", "settings"])
def test_a_file_is_what_one_would_type(tmp_path, name):
    assert values(["--config", written(tmp_path, SETTING, name)]) == values(TYPED)


def test_every_argument_can_stand_in_a_file(tmp_path):
    """Each gets another value than its default; what the parser makes of the two ways is the same."""
    for action in build_parser()._actions:
        name = action.dest
        if name in ("help", "config", "like"):
            continue
        value = next(iter(action.choices or []), 7 if action.type in (int, float) else "word")
        if action.nargs == 0:
            content, words = {name: True}, [f"--{name}"]
        elif action.nargs == "*":
            content, words = {name: [value, value]}, [f"--{name}", value, value]
        else:
            content, words = {name: value}, [f"--{name}", value]
        file = written(tmp_path, {"model_name_or_path": "a/model", **content})
        assert values(["--config", file]) == values([*MODEL, *words]), name


def test_the_documented_file_can_be_used(tmp_path):
    block = (ROOT / "docs" / "replaying.md").read_text().split("```yaml\n")[1].split("```")[0]
    args = parse_args(["--config", written(tmp_path, block)])
    assert (args.learning_rate, args.gradient_checkpointing, args.zero_stage) == (1e-5, True, 2)


def test_yaml_words_mean_what_they_mean_when_typed(tmp_path):
    """YAML 1.1 would read no as false, 1e-5 as text, and 0x10 as 16."""
    text = "save_strategy: no\nlearning-rate: 1e-5\n--model_name_or_path: 0x10\nmax_steps: null\nadd_eot_token: off\n"
    args = parse_args(["--config", written(tmp_path, text)])
    assert (args.save_strategy, args.learning_rate, args.model_name_or_path) == ("no", 1e-5, "0x10")
    assert (args.max_steps, args.add_eot_token) == (None, False)


def test_what_is_typed_wins(tmp_path, capsys):
    file = written(tmp_path, SETTING)
    args = parse_args(["--config", file, "--learning_rate", "3e-4", "--no_disable_dropout", "--data_path", "three"])
    assert (args.learning_rate, args.disable_dropout, args.data_path) == (3e-4, False, ["three"])
    assert args.zero_stage == 2
    printed = capsys.readouterr().out
    assert printed.startswith(f"--config {file}: ") and printed.count("\n") == 1
    assert "data_path one two:0.5" in printed and "disable_dropout" not in printed


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("learning_rte: 1\n", ["learning_rte", "is --learning_rate meant?"]),
        ("training:\n  zero_stage: 1\n", ["no argument 'training'"]),
        ("zero_stage: 5\n", ["zero_stage", "invalid choice"]),
        ("max_seq_len: many\n", ["max_seq_len", "many"]),
        ("packing: 2\n", ["packing is a switch"]),
        ("seed: 1\nseed: 2\n", ["seed stands there twice"]),
        ("seed: [1, 2]\n", ["seed takes one value"]),
        ("data_path:\n  a: 1\n", ["data_path must be one value or a list"]),
        ("- a\n- b\n", ["must hold a mapping"]),
        ("like: somewhere\n", ["no argument 'like'"]),
        ("a: [\n", ["can't be read"]),
    ],
)
def test_a_wrong_file_is_named_with_what_is_wrong(tmp_path, content, words):
    file = written(tmp_path, content)
    with pytest.raises(UserError) as error:
        parse_args([*MODEL, "--config", file])
    assert all(word in str(error.value) for word in [f"--config {file}", *words]), error.value


def test_a_json_file_may_not_name_an_argument_twice_and_takes_no_truth_for_a_value(tmp_path):
    for content, words in (('{"seed": 1, "seed": 2}', "stands there twice"), ('{"seed": true}', "takes a value")):
        with pytest.raises(UserError, match=words):
            parse_args([*MODEL, "--config", written(tmp_path, content, "run.json")])


def test_a_missing_file_and_a_folder_without_a_run(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.yaml can't be read"):
        parse_args([*MODEL, "--config", "nowhere.yaml"])
    with pytest.raises(UserError, match="give the --output_dir of a run"):
        parse_args([*MODEL, "--like", str(tmp_path)])


def test_no_before_something_that_is_no_switch_is_unknown():
    with pytest.raises(SystemExit):
        parse_args([*MODEL, "--no_learning_rate"])


def test_a_run_like_another_computes_the_same(tmp_path, run_arguments):
    first, second = tmp_path / "first", tmp_path / "second"
    setting = ["--per_device_train_batch_size", "8", "--learning_rate", "2e-3", "--seed", "7"]
    finished_run([*run_arguments, *setting, "--output_dir", first])
    printed = finished_run(["--like", first, "--output_dir", second])
    assert outcome(second) == outcome(first)
    assert f"--like {first}: " in printed and "learning_rate 0.002" in printed and "not taken: output_dir" in printed
    record = json.loads((second / "run.json").read_text())
    assert record["arguments"]["like"] == str(first) and record["arguments"]["seed"] == 7
    assert record["sources"]["model"]["weights"] and record["sources"]["data"][0]["files"]
    assert "has changed since" not in printed
    # The second run can be the model of a third, with another rate.
    args = parse_args(["--like", str(second), "--learning_rate", "1e-4"])
    assert (args.learning_rate, args.seed, args.output_dir, args.like) == (1e-4, 7, None, str(second))


def test_an_argument_of_another_version_is_refused(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"arguments": {"model_name_or_path": "a", "unroll": 3}}))
    with pytest.raises(UserError, match="no argument 'unroll'"):
        parse_args(["--like", str(tmp_path)])
