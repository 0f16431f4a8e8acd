"""Fixtures: a tiny OPT with the shipped tokenizer, small json data, and ways to start a run."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
TRAIN_RECORDS = 77  # 9 steps of 8 and one of 5: the incomplete step matters
EVAL_RECORDS = 37  # divides by nothing in use here

sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# No port of another process, no accelerator probing, and no thread fights between ranks on two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# One ninja for runs inside pytest and in processes of their own: another version compiles DeepSpeed's kernels anew.
os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

# The longest tests begin first: begun last, one would leave a processor idle at the end. pytest-xdist gives each of two
# workers one half of the tests. Those of two hosts take turns, so they are all in the first half.
FIRST_HALF = ("tests/multi_node/", "test_the_demo_runs_in_small", "test_memory_stays_flat")
SECOND_HALF = ("zero2-offload", "faults/test_kill.py", "test_random_arguments", "launcher", "test_real_data.py")

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real data folder beside the repository")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Bring the longest tests to the beginning of each half."""

    def take(names: tuple[str, ...]) -> list[pytest.Item]:
        taken = list(dict.fromkeys(item for words in names for item in rest if words in item.nodeid))
        rest[:] = [item for item in rest if item not in taken]
        return taken

    rest = items[:]
    first, second = take(FIRST_HALF), take(SECOND_HALF)
    middle = max(0, len(items) // 2 - len(first))
    items[:] = [*first, *rest[:middle], *second, *rest[middle:]]


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """Undo what a test leaves in the environment: a process group of one rank, or a limit of a cache, say."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys() - {"PYTEST_CURRENT_TEST"}:
        del os.environ[name]
    os.environ.update({name: value for name, value in before.items() if name != "PYTEST_CURRENT_TEST"})


def make_tiny_opt(folder: Path, **changes) -> Path:
    """A random OPT of two layers with the shipped tokenizer; dropout 0.1, so that switching it off matters."""
    import torch
    from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "demo" / "tiny_opt")
    settings = {
        "vocab_size": 8 * -(-len(tokenizer) // 8), "hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 256, "dropout": 0.1,
        "bos_token_id": 2, "pad_token_id": 1, "eos_token_id": 2, "init_std": 0.05,
    }  # fmt: skip
    torch.manual_seed(0)
    OPTForCausalLM(OPTConfig(**{**settings, **changes})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_json_data(folder: Path, train: int = TRAIN_RECORDS, evaluation: int = EVAL_RECORDS) -> Path:
    """The first records of the shipped demo data as a `local/jsonfile` folder of their own."""
    data = folder / "local" / "jsonfile"
    data.mkdir(parents=True)
    for name, count in (("train", train), ("eval", evaluation)):
        records = json.loads((ROOT / "data" / f"{name}.json").read_text(encoding="utf-8"))
        # Every third answer repeated, so that lengths differ and padding is real.
        for number, record in enumerate(records):
            record["chosen"] = " ".join([record["chosen"]] * (1 + 2 * (number % 3 == 0)))
        (data / f"{name}.json").write_text(json.dumps(records[:count]), encoding="utf-8")
    return data


def write_json_data(folder: Path, train: list[dict], evaluation: list[dict]) -> Path:
    """Records of one's own as a `local/jsonfile` folder."""
    data = folder / "local" / "jsonfile"
    data.mkdir(parents=True, exist_ok=True)
    for name, records in (("train", train), ("eval", evaluation)):
        (data / f"{name}.json").write_text(json.dumps(records), encoding="utf-8")
    return data


@pytest.fixture(scope="session")
def tiny_opt(tmp_path_factory) -> Path:
    return make_tiny_opt(tmp_path_factory.mktemp("model") / "tiny_opt")


@pytest.fixture(scope="session")
def json_data(tmp_path_factory) -> Path:
    return make_json_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def run_arguments(tiny_opt, json_data, cache_folder) -> list[str]:
    """What all tiny runs share."""
    return [
        "--model_name_or_path", str(tiny_opt), "--data_path", str(json_data), "--data_split", "10,0,0",
        "--data_output_path", str(cache_folder), "--max_seq_len", "64", "--dtype", "fp32", "--disable_dropout",
        "--print_loss",
    ]  # fmt: skip


def tiny_setting(model: Path, data: Path, cache: Path) -> list[str]:
    """Two epochs over 77 samples, with the model's dropout."""
    places = ["--model_name_or_path", model, "--data_path", data, "--data_output_path", cache]
    setting = [
        "--data_split", "10,0,0", "--max_seq_len", "64", "--dtype", "fp32", "--print_loss", "--num_train_epochs", "2",
        "--per_device_train_batch_size", "8",
    ]  # fmt: skip
    return [str(argument) for argument in [*places, *setting]]


@pytest.fixture(scope="session")
def run_setting(tiny_opt, json_data, cache_folder) -> list[str]:
    """Arguments of runs that are stopped, killed and starved."""
    return tiny_setting(tiny_opt, json_data, cache_folder)


def launch(launcher: list[str], arguments: list[str], **options) -> subprocess.CompletedProcess:
    """Run main.py (or `script`) under `launcher` ([] for plain python) and return what it printed."""
    script = options.pop("script", ROOT / "main.py")
    command = [*(launcher or [sys.executable]), str(script), *map(str, arguments)]
    environment = {**os.environ, **options.pop("env", {})}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, **options)


def deepspeed_ranks(ranks: int) -> list[str]:
    """The launcher for so many ranks, on a port no other run uses."""
    from fork_runs import free_port

    return [
        str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", str(ranks), "--master_port", str(free_port()),
    ]  # fmt: skip


@pytest.fixture
def run_inside(monkeypatch, capfd) -> Callable[[list[str]], tuple[int, str, str]]:
    """Run main.py's `run` in this process: (exit status, stdout, stderr)."""

    def start(arguments: list[str]) -> tuple[int, str, str]:
        import main
        from utils.module.attention import clear_documents

        capfd.readouterr()
        status = 0
        environment = dict(os.environ)
        try:
            main.run([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = int(stop.code or 0)
        finally:
            clear_documents()  # of a run that ended in mid-step
            # A plain start makes itself rank 0 of one; processes started later must not take that for theirs.
            os.environ.clear()
            os.environ.update(environment)
        printed = capfd.readouterr()
        return status, printed.out, printed.err

    return start
