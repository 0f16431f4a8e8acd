"""Does a run stay the same for an hour? Memory, file handles, threads and time a step of one long run, over its length.

    OMP_NUM_THREADS=1 python tests/soak/long_run.py --minutes 60 --folder /tmp/long_run [-- further main.py arguments]

main.py trains the demo's tiny OPT on 100,000 samples an epoch, packed anew each epoch, evaluates and writes checkpoints
on the way, until the time is up; then it gets SIGTERM, as a batch system sends it. Another process reads from /proc
every few seconds what it holds. Time a step is given as seconds of the clock and as processor seconds: the second
hardly depends on what else the machine does. Checkpoints and evaluations are in both.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
EVERY_SECONDS = 10
WINDOWS = 6
EVAL_ROWS = 1000


def write_data(folder: Path, samples: int) -> Path:
    """`samples` rows, each one of the demo's pairs, and rows to evaluate on."""
    pairs = json.loads((ROOT / "data" / "train.json").read_text(encoding="utf-8"))
    draw = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train.jsonl", samples), ("eval.jsonl", EVAL_ROWS)):
        with open(folder / name, "w", encoding="utf-8") as file:
            for _ in range(rows):
                pair = draw.choice(pairs)
                file.write(json.dumps({"prompt": pair["prompt"], "response": pair["chosen"]}) + "\n")
    return folder


def holdings(process: int) -> dict[str, Any]:
    """What a process holds at this moment, from /proc: MB, counts, processor seconds."""
    base = Path(f"/proc/{process}")
    status = dict(line.split(":", 1) for line in (base / "status").read_text().splitlines())
    fields = (base / "stat").read_text().rsplit(")", 1)[1].split()
    ticks = sum(int(fields[index]) for index in (11, 12))  # utime, stime
    megabytes = {key: int(status[key].split()[0]) / 1024 for key in ("RssAnon", "RssFile", "RssShmem")}
    return {
        "anonymous": megabytes["RssAnon"], "files": megabytes["RssFile"] + megabytes["RssShmem"],
        "handles": len(list((base / "fd").iterdir())), "threads": int(status["Threads"]),
        "cpu": ticks / os.sysconf("SC_CLK_TCK"),
    }  # fmt: skip


def last_step(metrics: Path) -> int:
    """Optimizer steps of the newest complete line."""
    if not metrics.exists():
        return 0
    with open(metrics, "rb") as file:
        file.seek(max(0, metrics.stat().st_size - 4096))
        lines = file.read().decode("utf-8").split("\n")[1:-1]
    return max((json.loads(line).get("step", 0) for line in lines), default=0)


def watch(process: subprocess.Popen, output: Path, seconds: float, record: Path) -> list[dict[str, Any]]:
    """Look at the run every few seconds from its first step on, for so long; one JSON line each."""
    seen: list[dict[str, Any]] = []
    began = None
    with open(record, "w", encoding="utf-8") as file:
        while process.poll() is None and (began is None or time.time() - began < seconds):
            time.sleep(EVERY_SECONDS)
            step = last_step(output / "metrics.jsonl")
            if not step or process.poll() is not None:
                continue
            began = began or time.time()
            seen.append({"seconds": time.time() - began, "step": step, **holdings(process.pid)})
            file.write(json.dumps(seen[-1]) + "\n")
            file.flush()
    return seen


def table(seen: list[dict[str, Any]], windows: int) -> str:
    """Means over equal parts of the time; the last line is the last part over the first."""
    share = (seen[-1]["seconds"] - seen[0]["seconds"]) / windows
    rows = []
    for number in range(windows):
        part = [one for one in seen if number * share <= one["seconds"] <= (number + 1) * share]
        steps = part[-1]["step"] - part[0]["step"]
        means = [sum(one[key] for one in part) / len(part) for key in ("anonymous", "files", "handles", "threads")]
        clock, cpu = (1000 * (part[-1][key] - part[0][key]) / steps for key in ("seconds", "cpu"))
        rows.append([(number + 1) * share / 60, part[-1]["step"], *means, clock, cpu])
    lines = [
        "| up to minute | step | memory of its own MB | mapped files MB | file handles | threads | ms a step | "
        "processor ms a step |",
        "|" + " --- |" * 8,
    ]
    lines += ["| {:.0f} | {:,} | {:.0f} | {:.0f} | {:.1f} | {:.1f} | {:.1f} | {:.1f} |".format(*row) for row in rows]
    ratios = [last / first if first else 1.0 for first, last in zip(rows[0][2:], rows[-1][2:], strict=True)]
    return "\n".join([*lines, "| last / first | | " + " | ".join(f"{ratio:.3f}" for ratio in ratios) + " |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="from the first step on; 60 shows slow leaks")
    parser.add_argument("--samples", type=int, default=100_000, help="samples an epoch")
    parser.add_argument("--folder", type=Path, required=True, help="for data, model, output and observations")
    parser.add_argument("further", nargs="*", help="arguments for main.py, after --")
    args = parser.parse_args()

    from demo import make_tiny_opt

    make_tiny_opt.make_model(args.folder / "base")
    data = write_data(args.folder / "data", args.samples)
    output = args.folder / "output"
    command = [
        sys.executable, str(ROOT / "main.py"), "--model_name_or_path", str(args.folder / "base"),
        "--data_path", str(data), "--data_split", "10,0,0", "--data_output_path", str(args.folder / "cache"),
        "--max_seq_len", "128", "--packing", "--per_device_train_batch_size", "4", "--learning_rate", "1e-4",
        "--num_train_epochs", "1000", "--save_steps", "1000", "--eval_steps", "1000", "--output_dir", str(output),
        *args.further,
    ]  # fmt: skip
    with open(args.folder / "run.log", "w", encoding="utf-8") as log:
        run = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        seen = watch(run, output, 60 * args.minutes, args.folder / "observations.jsonl")
        if run.poll() is None:
            run.send_signal(signal.SIGTERM)
        status = run.wait(timeout=300)
    print(f"the run ended with status {status}; its log is {args.folder / 'run.log'}")
    if len(seen) > 2 * WINDOWS:
        print(table(seen, WINDOWS))


if __name__ == "__main__":
    main()
