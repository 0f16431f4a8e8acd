"""Kill runs with SIGKILL at random moments, go on, and compare the end with an undisturbed run, bit for bit.

    python tests/faults/kill_rounds.py --kills 200 --ranks 2

The moments are spread over what a run does: reading data and building the cache, evaluating, training, writing
checkpoints (in the background in half of the rounds), saving the model. Every start after a kill uses
`--resume_from_checkpoint latest`.
"""

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from fork_runs import PATIENCE, finished_run, outcome, start_run  # noqa: E402

# What a run prints as it enters a phase, and for how long after that a kill still hits it.
PHASES = {
    "start": ("", 1.0), "cache": ("Tokenizer:", 0.5), "evaluation": ("Evaluating perplexity", 0.05),
    "training": ("Step: ", 0.3), "checkpoint": ("Checkpoint: ", 0.3), "saving": ("saving the final model", 0.2),
}  # fmt: skip


def kill_rounds(setting: list[str], folder: Path, kills: int, ranks: int, seed: int = 0) -> Counter:
    """Do so many kills; returns how many hit each phase, and how many came too late. Raises on any difference.

    Args:
        setting: arguments of main.py but for folders of output and cache.
    """
    chance, hits = random.Random(seed), Counter()
    command = [*setting, "--save_steps", "2", "--eval_steps", "4", "--load_best_model_at_end"]
    finished_run([*command, "--output_dir", folder / "whole", "--data_output_path", folder / "cache_whole"], ranks)
    expected = outcome(folder / "whole")
    while hits.total() - hits["too late"] < kills:
        output, cache = folder / "killed", folder / "cache"
        shutil.rmtree(output, ignore_errors=True)
        shutil.rmtree(cache, ignore_errors=True)
        background = chance.choice([[], ["--save_in_background"]])
        resumed = [
            *command,
            *background,
            "--output_dir",
            output,
            "--data_output_path",
            cache,
            "--resume_from_checkpoint",
            "latest",
        ]
        for _ in range(chance.randint(3, 6)):
            phase = chance.choice(list(PHASES))
            if phase == "cache":
                shutil.rmtree(cache, ignore_errors=True)
            hit = _kill_in(phase, resumed, ranks, chance)
            hits[hit] += 1
            if hit == "too late" or hits.total() - hits["too late"] == kills:
                break
        finished_run(resumed, ranks)
        assert outcome(output) == expected, f"another end after kills, seed {seed}: {hits}"
        left = [path.name for path in (output / "checkpoints").iterdir() if path.name.startswith(".")]
        assert not left, f"left behind: {left}"
    return hits


def _kill_in(phase: str, command: list, ranks: int, chance: random.Random) -> str:
    words, span = PHASES[phase]
    run = start_run(command, ranks)
    entry = chance.randint(1, 5) if phase in ("training", "checkpoint", "evaluation") else 1
    deadline = time.monotonic() + PATIENCE
    while any(process.is_alive() for process in run.processes) and run.output().count(words) < entry:
        assert time.monotonic() < deadline, f"{words!r} never came:\n{run.output()}"
        time.sleep(0.003)
    time.sleep(chance.uniform(0, span))
    alive = all(process.is_alive() for process in run.processes)
    if ranks > 1 and chance.random() < 0.5:
        run.kill(signal.SIGKILL, ranks=[chance.randrange(ranks)])
        time.sleep(0.3)  # and then the launcher ends the others
    run.kill(signal.SIGKILL)
    run.wait()
    shutil.rmtree(run.logs[0].parent)
    return phase if alive else "too late"


def main() -> None:
    """The command line."""
    from conftest import make_json_data, make_tiny_opt, tiny_setting

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="kills in all; a round goes on after each")
    parser.add_argument("--ranks", type=int, default=1, help="processes of the run")
    parser.add_argument("--seed", type=int, default=0, help="decides the moments")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        setting = tiny_setting(make_tiny_opt(folder / "tiny_opt"), make_json_data(folder), folder / "unused")
        start = time.monotonic()
        hits = kill_rounds(setting, folder, args.kills, args.ranks, args.seed)
        print(f"{args.kills} kills on {args.ranks} rank(s), seed {args.seed}, {time.monotonic() - start:.0f} s")
        print("every run ended with the records and weights of the undisturbed one; kills by phase:", dict(hits))


if __name__ == "__main__":
    main()
