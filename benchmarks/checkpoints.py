"""Measure how long the training stands still for a checkpoint, written at once and in the background.

    python benchmarks/checkpoints.py --model_name_or_path FOLDER --data_path DATA --output_dir FOLDER

All arguments are main.py's. Two runs of it write a checkpoint every second step; the seconds are those of each
checkpoint until the next step, and until it counts.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def build_parser() -> argparse.ArgumentParser:
    """Return main.py's parser, to which every argument goes."""
    from utils.arguments.parser import build_parser

    return build_parser()


def train(arguments: list[str]) -> None:
    """Run main.py and print the seconds of every checkpoint."""
    import main
    from utils.checkpoint.checkpointer import Checkpointer

    begun: list[float] = []
    due, published = Checkpointer.save_due, Checkpointer._published

    def timed(self: Any, progress: Any) -> None:
        begun.append(time.perf_counter())
        due(self, progress)
        print(f"STOOD STILL {time.perf_counter() - begun[-1]:.3f}", flush=True)

    def counted(self: Any, folder: str) -> None:
        published(self, folder)
        print(f"COUNTS AFTER {time.perf_counter() - begun[-1]:.3f}", flush=True)

    Checkpointer.save_due, Checkpointer._published = timed, counted
    main.run(arguments)


def measured(arguments: list[str]) -> dict[str, list[float]]:
    """Return the seconds of each kind that a run in a process of its own printed."""
    command = [sys.executable, __file__, "--child", *arguments]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    kinds = ("STOOD STILL", "COUNTS AFTER")
    return {kind: [float(line.split()[-1]) for line in printed if line.startswith(kind)] for kind in kinds}


def run(arguments: list[str]) -> None:
    """Measure both ways, and print a table."""
    output = Path(arguments[arguments.index("--output_dir") + 1])
    print("| checkpoints | stands still, median s | counts after, median s |\n| --- | --- | --- |")
    for name, flag in (("at once", []), ("--save_in_background", ["--save_in_background"])):
        shutil.rmtree(output / "checkpoints", ignore_errors=True)
        taken = measured([*arguments, "--save_steps", "2", "--max_steps", "8", *flag])
        still, counts = (statistics.median(seconds) for seconds in taken.values())
        print(f"| {name} | {still:.2f} | {counts:.2f} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        train(sys.argv[2:])
    elif "--output_dir" not in sys.argv:
        print(__doc__)
    else:
        run(sys.argv[1:])
