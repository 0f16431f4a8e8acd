"""The GPU check: correctness, speed and memory on this machine's GPU, by one command that needs no network:

    python benchmarks/gpu/check.py --out gpu_check.json

A GPU may be at hand for minutes, so the checks come by value: a smoke test, equality with float32 on the CPU, speed of
OPT-1.3b with one profile, larger models, then the rest (ZeRO, offload, checkpoints, memory, signals). Every check runs
in separate processes with a time limit, by main.py's command line where possible, so neither a crash nor a lack of
memory stops the others; running out of memory is a result. The whole output of every process that failed is in a log
beside --out. Models have random weights. Results are written after every check, so `--minutes 9 --skip_done` can be
repeated until all checks are done. `--device cpu` runs the same checks with tiny shapes, as far as a CPU can.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu.cases import Context  # noqa: E402
from benchmarks.gpu.plan import all_checks  # noqa: E402
from benchmarks.gpu.processes import WRONG, Outcome, environment  # noqa: E402

NO_GPU = 2  # exit status
MACHINE = """
import json, os, torch
from importlib.metadata import version
gpu = torch.cuda.is_available()
print("MACHINE " + json.dumps({
    "device": torch.cuda.get_device_name(0) if gpu else "cpu",
    "memory GB": torch.cuda.get_device_properties(0).total_memory / 1e9 if gpu else None,
    "capability": torch.cuda.get_device_capability(0) if gpu else None, "cores": os.cpu_count(),
    "torch": torch.__version__, "cuda": torch.version.cuda, "deepspeed": version("deepspeed"),
    "transformers": version("transformers"),
}))
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: tiny shapes")
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"), help="results, written after every check")
    parser.add_argument("--only", default="", metavar="PATTERN", help="checks whose name has a match of this")
    parser.add_argument("--minutes", type=float, default=None, help="stop after so many minutes")
    parser.add_argument("--limit", type=float, default=400, help="seconds a check's process may take")
    parser.add_argument("--skip_done", action="store_true", help="leave out checks whose result --out already holds")
    parser.add_argument(
        "--data_path", type=Path, default=None,
        help="parquet file, or folder of train*.parquet, with columns prompt and chosen, to measure speed on (default: "
        "made-up texts)",
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="print the names of the checks and stop")
    return parser


def describe_machine(device: str) -> dict[str, Any]:
    """Return what hardware and versions this is, found by another process so that this one holds no GPU memory."""
    command = [sys.executable, "-c", MACHINE]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(device))
    found = re.search(r"^MACHINE (.*)$", done.stdout, re.MULTILINE)
    if found is None:
        raise SystemExit(f"torch, DeepSpeed and transformers can't be imported here:\n{done.stdout}{done.stderr}")
    return {**json.loads(found[1]), "commit": current_commit(), "date": time.strftime("%Y-%m-%d")}


def current_commit() -> str:
    """Return the commit that is checked; "unknown" in a copy without git."""
    try:
        command = ["git", "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.strip() or "unknown"
    except OSError:
        return "unknown"


def write_results(file: Path, results: dict[str, Any]) -> None:
    """Write the results so that the file is complete at any time: the command may be killed."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(json.dumps(results, indent=1), encoding="utf-8")
    os.replace(partial, file)


def table_row(name: str, result: dict[str, Any]) -> str:
    """Return a row of the printed table; figures that are lists, such as losses, are only in the results file."""
    shown = [f"{key} {value}" for key, value in result["figures"].items() if not isinstance(value, (list, dict))]
    words = [result["words"].replace("|", "/")] if result["words"] else []
    return f"| {name} | {result['verdict']} | {'; '.join([*words, *shown])} | {result['seconds']:.0f} |"


def run_checks(args: Namespace, results: dict[str, Any], folder: Path) -> None:
    """Run the checks that are asked for, until the time is over; print and write the result of each."""
    checks = results["checks"]
    seconds = float("inf") if args.minutes is None else 60 * args.minutes
    deadline = time.monotonic() + seconds
    log = args.out.with_suffix(".log").absolute()
    context = Context(args.device, folder, args.limit, args.data_path, checks, deadline, log)
    for name, check in all_checks(args.device).items():
        if not re.search(args.only, name) or (args.skip_done and name in checks):
            continue
        if time.monotonic() > deadline:
            print(f"\n{args.minutes:g} minutes are over: the rest is left for a call with --skip_done")
            return
        start = time.perf_counter()
        try:
            outcome = check(context)
        except Exception as err:  # a check that fails by itself must not stop the others
            outcome = Outcome(WRONG, f"the check itself failed: {type(err).__name__}: {err}")
        if outcome.verdict == WRONG and time.monotonic() >= deadline:
            print(f"\n{name} was cut short by --minutes {args.minutes:g}: it is left for a call with --skip_done")
            return
        checks[name] = {**vars(outcome), "seconds": round(time.perf_counter() - start, 1)}
        write_results(args.out, results)
        print(table_row(name, checks[name]), flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run the checks; return the exit status: 0, 1 when a result is wrong, 2 without a GPU."""
    args = build_parser().parse_args(argv)
    if args.list:
        print("\n".join(all_checks(args.device)))
        return 0
    machine = describe_machine(args.device)
    if args.device == "cuda" and machine["device"] == "cpu":
        print("No CUDA device is visible to torch here: --device cpu runs the checks on the CPU.", file=sys.stderr)
        return NO_GPU
    results: dict[str, Any] = {"machine": machine, "checks": {}}
    if args.skip_done and args.out.exists():
        results["checks"] = json.loads(args.out.read_text(encoding="utf-8"))["checks"]
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print("\n| check | result | figures | seconds |\n| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as folder:
        run_checks(args, results, Path(folder))
    verdicts = [result["verdict"] for result in results["checks"].values()]
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts))
    print(f"\n{counts}; results in {args.out}")
    return int(WRONG in verdicts)


if __name__ == "__main__":
    sys.exit(main())
