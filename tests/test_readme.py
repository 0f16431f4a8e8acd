"""The documents: their commands exist, parse and, for the demo, run; their links, paths and tables are right."""

import glob
import importlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from conftest import ROOT, make_json_data

PAGES = tuple(f"docs/{path.name}" for path in sorted(ROOT.glob("docs/*.md")))
RESULTS = tuple(f"benchmarks/results/{path.name}" for path in sorted(ROOT.glob("benchmarks/results/*.md")))
DOCUMENTS = ("README.md", "CONTRIBUTING.md", *PAGES, "benchmarks/RESULTS.md", *RESULTS)
REAL = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def load(path: str):
    """A module by its file."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def without_blocks(text: str) -> str:
    """The text without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def block_commands(documents: tuple[str, ...] = DOCUMENTS) -> Iterator[str]:
    """Every command in a bash block of the documents."""
    for name in documents:
        for block in re.findall(r"```bash\n(.*?)```", text_of(name), re.DOTALL):
            for line in block.splitlines():
                yield from (part.strip() for part in line.split("&&"))


def table_commands(documents: tuple[str, ...] = DOCUMENTS) -> Iterator[str]:
    """Every command in back quotes."""
    for name in documents:
        text = without_blocks(text_of(name))
        for quoted in re.findall(r"`((?:\w+=\S+ )?(?:make|bash|sbatch|python|deepspeed)\s[^`]+)`", text):
            yield from (part.strip() for part in " ".join(quoted.split()).split("&&"))


def expanded(pattern: str) -> list[str]:
    """The paths `a/{b,c}*` stands for; fails when an alternative stands for nothing."""
    match = re.search(r"\{([^}]*)\}", pattern)
    if match:
        return [
            path
            for choice in match[1].split(",")
            for path in expanded(pattern[: match.start()] + choice + pattern[match.end() :])
        ]
    found = glob.glob(pattern, root_dir=ROOT)
    assert found, f"{pattern} stands for nothing"
    return found


def check_measurement(script: str, arguments: list[str]) -> None:
    """The script exists and takes these arguments."""
    source = text_of(script)
    if "\ndef build_parser" in source:
        load(script).build_parser().parse_args(arguments)
        return
    flags = [word for word in arguments if word.startswith("--")]
    assert all(f'"{flag}"' in source for flag in flags), f"{script} has not all of {flags}"


def check(command: str) -> None:
    """Paths, targets and arguments of one command are right."""
    from utils.arguments.parser import build_parser

    words = shlex.split(command)
    words = words[1:] if re.match(r"[A-Z_]+=", words[0]) else words  # a variable set for this command
    program = Path(words[0]).name
    if program == "make":
        subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
    elif program in ("bash", "sbatch"):
        expanded(words[1])
        flags = [word.startswith("--") for word in words]
        further = words[flags.index(True) :] if True in flags else []
        if words[1] == "evaluation_scripts/run_lm_eval.sh":
            assert set(further[::2]) <= {"--tasks", "--limit", "--apply_chat_template", "--output_path"}
        elif words[1].startswith("evaluation_scripts/"):
            from utils.prompt_eval.arguments import build_parser as evaluation_parser

            evaluation_parser().parse_args(further)
        else:
            build_parser().parse_args(["--model_name_or_path", "a", *further])
    elif "main.py" in words:
        assert program in ("python", "deepspeed", "torchrun", "srun")
        rest = words[words.index("main.py") + 1 :]
        if {"--config", "--like"} & set(rest):  # the model stands in a file
            build_parser().parse_args(["--model_name_or_path", "a", *rest])
        elif rest not in ([], ["…"], ["..."]):
            build_parser().parse_args(rest)
    elif words[1:3] in (["-m", "tools.inspect_data"], ["-m", "utils.data.inspect"]):
        assert importlib.util.find_spec(words[2])
        if words[3:]:  # without arguments the program is only named
            build_parser().parse_args(words[3:])
    elif words[1:3] in (["-m", "tools.memory_table"], ["-m", "utils.memory"]):
        from tools.memory_table import build_parser as memory_parser

        assert importlib.util.find_spec(words[2])
        if words[3:]:
            memory_parser().parse_args(words[3:])
    elif words[1].startswith(("benchmarks/", "tests/soak/")):
        check_measurement(words[1], words[2:])
    elif words[1] == "prompt_eval.py":
        from utils.prompt_eval.arguments import parse_args

        parse_args(words[2:])
    elif words[1:3] == ["-m", "pytest"]:
        assert all((ROOT / word).exists() for word in words[3:] if word.startswith("tests/"))
    elif words[1] == "-m" and words[2].startswith("tools."):
        assert importlib.util.find_spec(words[2]) and not words[3:], command
    elif program == "python" and words[1].startswith("tools/"):
        assert (ROOT / words[1]).is_file()
    elif program == "python" and words[1].endswith("/zero_to_fp32.py"):  # DeepSpeed's own, written into checkpoints
        from deepspeed.utils import zero_to_fp32

        assert len(words) == 4 and Path(zero_to_fp32.__file__).is_file()
    else:
        # The environment and what fetches things: nothing of ours to check but their names.
        assert program in ("git", "cd", "source", "python3", "pip", "hf"), command


@pytest.mark.parametrize("command", list(dict.fromkeys([*block_commands(), *table_commands()])))
def test_command(command):
    check(command)


def test_the_check_finds_mistakes():
    for command in (
        "bash training_scripts/none.sh", "python main.py --no_such_flag", "make nothing", "rm -r x",
        "bash evaluation_scripts/run_chat.sh out --no_such_flag", "python benchmarks/none.py",
        "python benchmarks/data_prep.py --no_such_flag", "python -m tools.inspect_data --no_such_flag",
    ):  # fmt: skip
        with pytest.raises((AssertionError, SystemExit, OSError, subprocess.CalledProcessError)):
            check(command)


def test_the_promised_commands_are_in_the_readme():
    readme = ("README.md",)
    commands = [*block_commands(readme), *table_commands(readme)]
    for promised in ("make demo", "make test", "deepspeed --num_gpus 8 main.py", "python main.py"):
        assert any(command.startswith(promised) for command in commands), promised
    scripts = [
        path for folder in ("training_scripts", "evaluation_scripts") for path in (ROOT / folder).rglob("run_*.sh")
    ]
    for script in scripts:
        if script.name in ("run_single.sh", "run_demo.sh"):  # the sweep's own, make demo's own
            continue
        relative = str(script.relative_to(ROOT))
        named = [command.split()[1] for command in commands if command.startswith(("bash ", "sbatch "))]
        assert any(relative in expanded(pattern) for pattern in named), f"{relative} is not in the README"


def test_tables_of_arguments_are_up_to_date():
    module = load("tools/argument_table.py")
    page = text_of("docs/arguments.md")
    assert module.with_tables(page) == page, "run python tools/argument_table.py"


def test_a_stale_table_of_arguments_is_found():
    module = load("tools/argument_table.py")
    page = text_of("docs/arguments.md")
    for old, new in (("`--seed N` | `1234`", "`--seed N` | `4321`"), ("`--zero_stage {", "`--zero_stages {")):
        assert old in page and module.with_tables(page.replace(old, new)) == page


PARSERS = [("utils.arguments.parser", "<!-- main.py"), ("utils.prompt_eval.arguments", "<!-- prompt_eval.py")]


@pytest.mark.parametrize(("module", "begin"), PARSERS)
def test_table_holds_every_flag_with_its_default(module, begin):
    """The same seen from the other side, without the tool's own rows."""
    part = text_of("docs/arguments.md").split(begin)[1].split("<!-- end of arguments -->")[0]
    shown = dict(re.findall(r"^\| `(--\w+)[^`]*` \| (.*?) \|", part, re.MULTILINE))
    parser = importlib.import_module(module).build_parser()
    actions = {action.option_strings[0]: action for action in parser._actions}
    assert set(shown) == set(actions) - {"-h", "--deepscale", "--deepscale_config"}
    for flag, default in shown.items():
        assert all(re.search(rf"{spelling}\b", part) for spelling in actions[flag].option_strings)
        value = actions[flag].default
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            assert float(default.strip("`")) == value, flag


def test_the_ten_arguments_of_the_readme_are_those_of_the_table():
    row = re.compile(r"^\| (`--\w+[^`]*`) \| (.*?) \|", re.MULTILINE)
    table = dict(row.findall(text_of("docs/arguments.md").split("## Arguments of prompt_eval.py")[0]))
    shown = row.findall(text_of("README.md"))
    assert len(shown) == 10 and all(table[flag] == default for flag, default in shown)


def test_documents_are_short_and_begin_with_their_question():
    lines = {name: text_of(name).splitlines() for name in DOCUMENTS}
    assert len(lines["README.md"]) <= 250 and len(lines["benchmarks/RESULTS.md"]) <= 100
    for name in PAGES:
        assert re.fullmatch(r"# [A-Z].*\?", lines[name][0]), f"{name} does not begin with a question"
        assert f"]({name})" in text_of("README.md"), f"{name} is not in the README's index"


def test_every_page_of_results_is_in_its_index():
    index = text_of("benchmarks/RESULTS.md")
    assert all(name.removeprefix("benchmarks/") in index for name in RESULTS)


def test_no_cell_of_a_table_is_cut_in_two():
    """A bar inside a cell needs a backslash, in back quotes too."""
    for name in DOCUMENTS:
        for table in re.findall(r"(?:^\|.*\n)+", text_of(name), re.MULTILINE):
            cells = {len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}
            assert len(cells) == 1, f"{name}: {table[:80]}"


def test_every_data_set_is_documented():
    from utils.data.raw_datasets import RAW_DATASETS

    missing = [name for name in RAW_DATASETS if f"`{name}`" not in text_of("docs/data.md")]
    assert not missing


def anchors(name: str) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", without_blocks(text_of(name)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_and_named_files_exist(name):
    text = text_of(name)
    for target, anchor in re.findall(r"\]\(([^)#:]*)#?([^):]*)\)", text):
        path = ((ROOT / name).parent / target).resolve() if target else ROOT / name
        assert path.exists(), f"{name}: {target}"
        assert not anchor or anchor in anchors(str(path.relative_to(ROOT))), f"{name}: {target}#{anchor}"
    for path in re.findall(r"`((?:utils|tools|tests|data|demo|docs|benchmarks|\w+_scripts)/[\w./]+)`", text):
        assert (ROOT / path).exists(), f"{name}: {path}"


def test_the_readme_names_every_folder_of_utils():
    tree = text_of("README.md").split("\nutils/\n")[1].split("```")[0]
    folders = {path.parent.name for path in ROOT.glob("utils/*/__init__.py")}
    assert folders == set(re.findall(r"^  (\w+)/", tree, re.MULTILINE))


def test_figures_of_the_demo_are_those_of_its_data():
    readme = text_of("README.md")
    for split in ("train", "eval"):
        count = len(json.loads(text_of(f"data/{split}.json")))
        assert split == "eval" or f"{count:,} question-answer pairs" in readme


def test_the_demo_runs_in_small(tmp_path):
    """The two commands of `make demo`, on fewer records and one epoch."""
    data, output = make_json_data(tmp_path, 64, 16), tmp_path / "out"
    small = ["--data_path", data, "--num_train_epochs", "2", "--data_output_path", tmp_path / "cache"]
    for command in (
        [ROOT / "training_scripts/single_cpu/run_tiny.sh", output, "0", *small],
        [ROOT / "evaluation_scripts/run_demo.sh", output, "--max_new_tokens", "8", "--data_path", data],
    ):
        done = subprocess.run(
            ["bash", *map(str, command)], cwd=tmp_path, env=REAL, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (output / "config.json").is_file() and (output / "base" / "config.json").is_file()
    page = done.stdout
    assert page.count("  question  ") == page.count("  before    ") == page.count("  after     ") == 8
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    before, *_, after = [record["perplexity"] for record in records if "perplexity" in record]
    assert after < before
    assert f"perplexity on held-out data: {before:.1f} before, {after:.2f} after 4 optimizer steps" in page
    assert f"losses: {output / 'loss.png'}" in page and f"report: {output / 'report' / 'report.html'}" in page
    html = (output / "report" / "report.html").read_text(encoding="utf-8")
    assert html.count("<article") == 8 and html.count('class="pair"') == 6 * 8 and "<svg" in html
    assert f">{before:.4g}<" in html and f">{after:.4g}<" in html, "perplexities in the report are those of the run"


def test_right_answers_are_counted(tmp_path):
    report = load("evaluation_scripts/demo_report.py")
    lines = []
    for number, record in enumerate(report.demo_records()):
        answer = record["chosen"] if number % 2 else "x " * 99
        for strategy, after in (("greedy", f" {answer}\n"), ("beam", record["chosen"])):
            lines.append({"strategy": strategy, "model": "baseline", "answer": " no"})
            lines.append({"strategy": strategy, "model": "finetuned", "answer": after})
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "results.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 0, "perplexity": 9.0}\n{"step": 1, "loss": 2.0}\n{"step": 1, "perplexity": 2.0}\n'
    )
    page = report.report(tmp_path)
    assert "4 of 8 answers are the expected ones" in page
    assert page.count("  expected  ") == 4 and "x x…" in page
    assert "9.0 before, 2.00 after 1 optimizer steps" in page


def test_make_installs_once(tmp_path):
    """A second call of make finds the stamp; changed requirements are installed again."""
    for name in ("Makefile", "requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / "python"  # "-m venv FOLDER" copies it there, "-m pip" is noted
    python.write_text(
        '#!/usr/bin/env bash\nif [[ $2 == venv ]]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; '
        'else echo "$*" >>calls; [[ ! -e offline ]]; fi\n'
    )
    python.chmod(0o755)

    def installs(target: str) -> int:
        subprocess.run(["make", f"PYTHON={python}", target], cwd=tmp_path, capture_output=True, check=False)
        return len((tmp_path / "calls").read_text().splitlines())

    (tmp_path / "offline").touch()
    assert installs(".venv/.installed") == 1
    (tmp_path / "offline").unlink()
    assert installs(".venv/.installed") == 2, "a failed install has to be tried again"
    assert installs(".venv/.installed") == 2
    assert installs(".venv/.installed-dev") == 3
    assert installs(".venv/.installed-dev") == installs(".venv/.installed") == 3
    os.utime(tmp_path / "requirements.txt", (2**31, 2**31))
    assert installs(".venv/.installed") == 4


@pytest.mark.parametrize(
    ("status", "closing"), [(0, "3 passed in 1.20s"), (1, "1 failed, 2 passed in 61.20s (0:01:01)")]
)
def test_ci_run_tells_how_it_went(tmp_path, status, closing):
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci")
    (tmp_path / "Makefile").write_text(f"test:\n\t@echo '{closing}'; echo later; exit {status}\n")
    done = subprocess.run([tmp_path / ".ci" / "run"], capture_output=True, text=True, check=False, cwd="/")
    assert (done.returncode != 0) == (status != 0)
    assert done.stdout.splitlines()[-1] == f"pytest: {closing}"


def test_requirements_are_pinned_and_hold_what_is_imported():
    """A fresh machine gets what this one has, and whatever is imported is named."""
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)", text_of("requirements.txt") + text_of("requirements-dev.txt"), re.M))
    ours = {"utils", "tools", "evaluation_scripts", "benchmarks", "demo", "tests", "main", "prompt_eval"}
    ours |= {path.stem for path in ROOT.rglob("*.py") if ".venv" not in path.parts}
    ours |= {path.name for path in (ROOT / "tests").iterdir() if path.is_dir()}
    packages = packages_distributions()  # modules go by another name than their package, or several come in one
    for folder in (".", "utils", "tools", "evaluation_scripts", "tests"):
        for path in (ROOT / folder).glob("*.py" if folder == "." else "**/*.py"):
            imports = re.findall(r"^\s*(?:import|from) (\w+)(?:[.\w]*)(?: import|$| as|,)", path.read_text(), re.M)
            for module in set(imports) - ours - set(sys.stdlib_module_names):
                named = {module, *packages.get(module, [])} & set(pinned)
                assert named, f"{path.name} imports {module}, which no requirements file names"
