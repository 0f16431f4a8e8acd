"""main.py against the loop of DeepSpeed-Chat's step 1, step by step on the same samples: a table and a picture.

    python benchmarks/parity/parity.py --out parity

trains the demo's tiny OPT on the first records of data/train.json, all weights and LoRA alone, with main.py and with
`original_loop.py`: once with its four switches off, which must give main.py's losses; the same in float64, which shows
what rounding alone does to the losses; once with each switch, and once with all. Written to `--out`: parity.md with
the tables, parity.png, and the runs of main.py.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.parity.original_loop import SWITCHES, Setting, Step, train  # noqa: E402

AGREED, EXACT, ORIGINAL = "switches off", "off, float64", "all on"
TOLERANCE = 1e-3  # relative, of the losses of main.py and of the loop with its switches off
LORA = {"lora_dim": 16, "lora_learning_rate": 5e-3}
Runs = dict[str, tuple[list[Step], float]]  # by their switches


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("parity"), help="folder of the tables, the picture, the runs")
    parser.add_argument("--records", type=int, default=134, help="records of data/train.json to train on")
    parser.add_argument("--epochs", type=int, default=3, help="passes over them")
    return parser


def main_arguments(setting: Setting, output: Path) -> list[str]:
    """Return the arguments of main.py that match `setting` with its switches off."""
    arguments = [
        "--model_name_or_path", setting.model, "--data_path", setting.data, "--data_split", "10,0,0",
        "--data_output_path", output / "cache", "--output_dir", output, "--max_seq_len", setting.max_seq_len,
        "--padding", "max_length", "--disable_dropout", "--dtype", "fp32", "--zero_stage", 0,
        "--per_device_train_batch_size", setting.micro_batch, "--gradient_accumulation_steps", setting.accumulation,
        "--num_train_epochs", setting.epochs, "--learning_rate", setting.learning_rate, "--seed", setting.seed,
    ]  # fmt: skip
    if setting.lora_dim > 0:
        arguments += ["--lora_dim", setting.lora_dim, "--lora_learning_rate", setting.lora_learning_rate]
        arguments += ["--lora_module_name", "decoder.layers.", "--only_optimize_lora"]
    return [str(argument) for argument in arguments]


def recorded_losses(output: Path) -> tuple[list[float], float]:
    """Return the loss of every step of a run of main.py, and its last evaluation loss."""
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [r["loss"] for r in records if "loss" in r], [r["eval_loss"] for r in records if "eval_loss" in r][-1]


def make_data(folder: Path, records: int) -> Path:
    """Write the first records of the demo's data as a `local/jsonfile` folder; return it."""
    data = folder / "local" / "jsonfile"
    data.mkdir(parents=True, exist_ok=True)
    for split in ("train", "eval"):
        everything = json.loads((ROOT / "data" / f"{split}.json").read_text(encoding="utf-8"))
        (data / f"{split}.json").write_text(json.dumps(everything[:records]), encoding="utf-8")
    return data


def reference_runs(setting: Setting) -> Runs:
    """Run the original's loop with its switches off, so in float64, with each switch alone, and with all."""
    runs = {AGREED: train(setting), EXACT: train(replace(setting, in_float64=True))}
    runs |= {switch: train(replace(setting, **{switch: True})) for switch in SWITCHES}
    return runs | {ORIGINAL: train(replace(setting, **dict.fromkeys(SWITCHES, True)))}


def differences(losses: Sequence[float], steps: list[Step]) -> list[float]:
    """Return the relative difference of two runs' losses in each step that both have."""
    return [abs(loss - step.real_loss) / abs(loss) for loss, step in zip(losses, steps, strict=False)]


def tables(name: str, main: tuple[list[float], float], runs: Runs) -> str:
    """Return the losses of every step, and what each switch does, as markdown."""
    losses, evaluation = main
    columns = list(runs)
    rows = [["step", "main.py", *columns], ["---"] * (len(columns) + 2)]
    for number, loss in enumerate(losses):
        cells = [f"{runs[key][0][number].real_loss:.6f}" if number < len(runs[key][0]) else "" for key in columns]
        rows.append([str(number + 1), f"{loss:.6f}", *cells])
    # What rounding has done by each step, so that a switch's effect can be told from it.
    rounding = zip(differences(losses, runs[AGREED][0]), differences(losses, runs[EXACT][0]), strict=True)
    noise = list(accumulate((max(*pair, 1e-7) for pair in rounding), max))
    effects = [
        ["switches", "steps", "differs from step", "at most by", "minimized in the last step", "held-out loss"],
        ["---"] * 6,
        ["main.py", str(len(losses)), "", "", f"{losses[-1]:.4f}", f"{evaluation:.6f}"],
    ]
    for key, (steps, held_out) in runs.items():
        apart = differences(losses, steps)
        visible = [value > 10 * least for value, least in zip(apart, noise, strict=False)]
        first = str(visible.index(True) + 1) if any(visible) else "none"
        effects.append([key, str(len(steps)), first, f"{max(apart):.1e}", f"{steps[-1].loss:.4f}", f"{held_out:.6f}"])
    return "\n\n".join(
        [f"## {name}", *("\n".join(f"| {' | '.join(row)} |" for row in table) for table in (effects, rows))]
    )


def draw(results: dict[str, tuple[tuple[list[float], float], Runs]], path: Path) -> None:
    """Draw the losses of all runs, and under them the difference from main.py with the switches off."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        2, len(results), figsize=(11, 7), dpi=80, sharex="col", squeeze=False, height_ratios=(5, 3)
    )
    for (upper, lower), (name, ((losses, _), runs)) in zip(axes.T, results.items(), strict=True):
        numbers = range(1, len(losses) + 1)
        for key, (steps, _) in runs.items():
            if key not in (AGREED, EXACT):
                upper.plot(numbers[: len(steps)], [step.real_loss for step in steps], linewidth=1, label=key)
        upper.plot(numbers, losses, color="black", linewidth=1.6, label="main.py")
        upper.plot(
            numbers, [step.real_loss for step in runs[AGREED][0]], "o", color="black", fillstyle="none", markersize=6,
            label=AGREED,
        )  # fmt: skip
        loop = [step.real_loss for step in runs[AGREED][0]]
        for values, style, label in ((losses, "k.-", "main.py"), (loop, "o-", AGREED)):
            apart = [max(value, 1e-9) for value in differences(values, runs[EXACT][0])]
            lower.semilogy(numbers, apart, style, fillstyle="none", linewidth=0.8, label=label)
        upper.set_title(name)
        upper.set_ylabel("loss per real label token (nats)")
        lower.set_ylabel("relative difference\nfrom float64")
        lower.set_xlabel("optimizer step")
        for part in (upper, lower):
            part.grid(alpha=0.3)
            part.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def main(args: argparse.Namespace) -> None:
    """Run both programs in both ways, print and write the tables, and draw the picture."""
    model, data = args.out / "tiny_opt", make_data(args.out / "data", args.records)
    subprocess.run([sys.executable, ROOT / "demo" / "make_tiny_opt.py", model], check=True)
    results, texts = {}, [f"`{switch}`: {meaning}." for switch, meaning in SWITCHES.items()]
    for name, lora in (("All weights", {}), ("LoRA alone", LORA)):
        setting = Setting(str(model), str(data), epochs=args.epochs, **lora)
        output = args.out / name.replace(" ", "_").lower()
        subprocess.run([sys.executable, ROOT / "main.py", *main_arguments(setting, output)], check=True)
        results[name] = recorded_losses(output), reference_runs(setting)
        (losses, _), runs = results[name]
        texts.append(tables(name, *results[name]))
        exact = [step.real_loss for step in runs[EXACT][0]]
        apart = max(differences(losses, runs[AGREED][0]))
        texts.append(
            f"{len(losses)} steps. Largest relative difference of the losses: main.py and the loop {apart:.1e}; in "
            f"the first two steps {max(differences(losses[:2], runs[AGREED][0])):.1e}; main.py and float64 "
            f"{max(differences(losses, runs[EXACT][0])):.1e}; the loop and float64 "
            f"{max(differences(exact, runs[AGREED][0])):.1e}."
        )
        assert len(losses) == len(exact) and apart < TOLERANCE, texts[-1]
    page = "\n\n".join(texts) + "\n"
    print(page)
    (args.out / "parity.md").write_text(page, encoding="utf-8")
    draw(results, args.out / "parity.png")


if __name__ == "__main__":
    main(build_parser().parse_args())
