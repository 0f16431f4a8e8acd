"""docs/recipes.md: every row's command runs in small, and the plans of its GPU rows are those of `--dry_run`."""

import gzip
import json
import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT, SHARED, needs_shared

PAGE = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| \[(?P<name>[^]]+)\]\(#(?P<anchor>[^)]+)\) \| (?P<cells>.*) \|$", re.MULTILINE)
SMALL = ["--max_steps", "2", "--max_seq_len", "64", "--per_device_train_batch_size", "4", "--eval_steps", "9"]


def commands_of(anchor: str) -> list[str]:
    """The commands below the heading with this anchor."""
    sections = re.split(r"^#+ (.+)\n", PAGE, flags=re.MULTILINE)[1:]
    titles = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in sections[::2]]
    return re.search(r"```bash\n(.*?)```", sections[1::2][titles.index(anchor)], re.DOTALL)[1].splitlines()


ROWS = {match["anchor"]: match["cells"].split(" | ") for match in ROW.finditer(PAGE)}
MEASURED = [anchor for anchor, cells in ROWS.items() if not re.match(r"\d+ x \d+ GB", cells[0])]
PLANNED = [anchor for anchor in ROWS if anchor not in MEASURED]


def prepare(folder: Path) -> None:
    """Write the page's other files from `alpaca_data.json.gz` in `folder`, by the page's own lines."""
    lines = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1]
    exec(compile(lines.replace("/data/", f"{folder}/"), "recipes.md", "exec"), {})


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A folder in the place of the page's `/data`, with a few made rows of each form."""
    folder = tmp_path_factory.mktemp("recipes")
    story = "Once upon a time there was a dog who ran home."
    alpaca = [
        {"instruction": f"Say {n}.", "input": "", "output": f"{story} Number {n}." if n % 2 else f"It is {n}."}
        for n in range(40)
    ]
    with gzip.open(folder / "alpaca_data.json.gz", "wt") as file:
        json.dump(alpaca, file)
    questions = [{"question": f"What is {n} + 1?", "answer": f"{n} + 1 = {n + 1}\n#### {n + 1}"} for n in range(20)]
    turns = [{"from": "human", "value": "你好吗？"}, {"from": "gpt", "value": "我很好，谢谢。"}]
    for name, rows in (("gsm8k", questions), ("sharegpt_zh", [{"conversations": turns}] * 20)):
        with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    prepare(folder)
    return folder


def arguments_of(command: str, data: Path, model: Path, output: Path) -> list[str]:
    """What follows main.py, with other places."""
    words = shlex.split(command)
    words = [word.replace("/data/", f"{data}/") for word in words[words.index("main.py") + 1 :]]
    words[words.index("--model_name_or_path") + 1] = str(model)
    words[words.index("--output_dir") + 1] = str(output)
    return [*words, "--data_output_path", str(data / "cache")]


def test_the_page_has_rows_of_both_kinds():
    assert len(MEASURED) >= 8 and len(PLANNED) >= 6
    assert all(len(commands_of(anchor)) >= 1 for anchor in ROWS)
    assert all("not measured yet" in ROWS[anchor] for anchor in PLANNED)


@pytest.mark.parametrize("anchor", MEASURED)
def test_a_measured_row_runs_in_small(anchor, run_inside, places, tiny_opt, tmp_path):
    arguments = arguments_of(commands_of(anchor)[0], places, tiny_opt, tmp_path / "out")
    status, out, err = run_inside([*arguments, *SMALL])
    assert status == 0, err
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert len([record for record in records if "perplexity" in record]) == 2, "before and after"
    assert (tmp_path / "out" / "loss.png").is_file() and "verified: " in out
    assert ("LoRA: " in out) == ("--lora_dim" in arguments)


@pytest.mark.parametrize("anchor", PLANNED)
def test_a_row_for_gpus_is_planned_in_small(anchor, run_inside, places, tiny_opt, tmp_path):
    """The plan takes every argument of the row, on the row's GPUs."""
    if "--quantize_base" in commands_of(anchor)[0]:
        pytest.importorskip("bitsandbytes")
    arguments = arguments_of(commands_of(anchor)[0], places, tiny_opt, tmp_path / "out")
    count, size = re.match(r"(\d+) x (\d+) GB", ROWS[anchor][0]).groups()
    status, out, err = run_inside([*arguments, "--max_seq_len", "64", "--dry_run", f"{count}x{size}"])
    assert status == 0, err
    assert f"{count} GPU" in out and re.search(r"most at once .* fits: ", out)


@needs_shared
def test_the_figure_before_training_is_that_of_the_page(run_inside, tmp_path):
    """The perplexity of the real model on the page's stories, by the page's command; two steps lower it."""
    (tmp_path / "alpaca_data.json.gz").symlink_to(SHARED / "large" / "alpaca_data.json.gz")
    prepare(tmp_path)
    arguments = arguments_of(commands_of("stories")[0], tmp_path, SHARED / "stories260K", tmp_path / "out")
    status, out, err = run_inside([*arguments, "--max_steps", "2"])
    assert status == 0, err
    before, after = [float(found) for found in re.findall(r"^ppl: ([\d.]+)", out, re.MULTILINE)]
    stated = float(re.search(r"([\d.]+) → [\d.]+ \|", " | ".join(ROWS["stories"]))[1])
    assert before == pytest.approx(stated, rel=0.02) and after < 0.97 * before
