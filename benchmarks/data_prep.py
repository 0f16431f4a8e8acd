"""Data preparation: samples/s and peak memory of the cache builder and of a stream against tokenizing one by one.

    python benchmarks/data_prep.py --tokenizer FOLDER --source .../Dahoas/rm-static/.../train.parquet

Each measurement runs in a process of its own, since peak memory is measured per process. The texts are the source's
rows, repeated up to the wanted number, each with its number in front, so that no two are the same.

With `--against CHECKOUT`, the cache builders of this and of another checkout of the repository take turns on the same
rows, so that both see the same load of the machine; the ratio is that of their medians.
"""

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def parse_arguments() -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="folder of a tokenizer")
    parser.add_argument("--source", required=True, help="a parquet file with the columns prompt and chosen")
    parser.add_argument("--sizes", default="1000,10000,100000", help="numbers of samples")
    parser.add_argument(
        "--one_by_one_up_to", type=int, default=10_000, help="for more, one by one takes too much time and memory"
    )
    parser.add_argument("--against", metavar="CHECKOUT", help="measure the cache builder against this checkout's")
    parser.add_argument("--turns", type=int, default=5, help="measurements of each checkout with --against")
    parser.add_argument("--worker", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    return parser.parse_args()


def write_records(source: str, size: int, folder: Path) -> Path:
    import pyarrow.parquet as pq

    rows = pq.read_table(source, columns=["prompt", "chosen"]).to_pylist()
    data = folder / "local" / "jsonfile"
    data.mkdir(parents=True)
    for name, count in (("train", size), ("eval", 2)):
        with open(data / f"{name}.jsonl", "w", encoding="utf-8") as file:
            for number in range(count):
                row = rows[number % len(rows)]
                file.write(json.dumps({"prompt": f"{number}: {row['prompt']}", "chosen": row["chosen"]}) + "\n")
    return data


def one_by_one(tokenizer_folder: str, folder: Path) -> int:
    """Tokenize as the original scripts do: each text alone, padded to the maximum length, every tensor kept."""
    from utils.model.tokenizer import load_hf_tokenizer

    tokenizer = load_hf_tokenizer(tokenizer_folder)
    kept = []
    with open(folder / "local" / "jsonfile" / "train.jsonl", encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            text = f" {record['prompt']} {record['chosen']}{tokenizer.eos_token}"
            kept.append(tokenizer(text, max_length=512, padding="max_length", truncation=True, return_tensors="pt"))
    return len(kept)


def cached(tokenizer_folder: str, folder: Path) -> int:
    from utils.data.data_utils import create_prompt_dataset
    from utils.model.tokenizer import load_hf_tokenizer

    tokenizer = load_hf_tokenizer(tokenizer_folder)
    train, _ = create_prompt_dataset(
        1, [str(folder / "local" / "jsonfile")], "10,0,0", str(folder / "cache"), 1, 1234, tokenizer, 512,
        tokenizer.eos_token,
    )  # fmt: skip
    return len(train)


def streamed(tokenizer_folder: str, folder: Path) -> int:
    """Read all rows in windows of the default size, as a rank of `--streaming` does; nothing is written."""
    from utils.data.formats.custom import OwnOptions
    from utils.data.prepare import Preparation
    from utils.data.streaming import SFT_PHASE, create_prompt_stream
    from utils.data.tokenization.tokenize_rows import SampleForm
    from utils.model.tokenizer import load_hf_tokenizer

    tokenizer = load_hf_tokenizer(tokenizer_folder)
    sample = SampleForm(tokenizer, tokenizer.eos_token, 512)
    preparation = Preparation(1, str(folder / "unused"), SFT_PHASE, 1234)
    stream, _ = create_prompt_stream(
        [str(folder / "local" / "jsonfile")], sample, OwnOptions(), preparation, 10_000
    )  # fmt: skip
    with open(folder / "local" / "jsonfile" / "train.jsonl", encoding="utf-8") as file:
        rows = sum(1 for _ in file)
    count = len(stream)
    while count < rows:
        stream.follow(stream.after)
        count += len(stream)
    return count


def work(args: Namespace) -> None:
    """Print one measurement: without the time of imports, with the memory of worker processes."""
    import utils.data.data_utils
    import utils.data.streaming
    import utils.model.tokenizer  # noqa: F401

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    way = {"one_by_one": one_by_one, "cached": cached, "streamed": streamed}[args.worker[0]]
    count = way(args.tokenizer, Path(args.worker[1]))
    seconds = time.perf_counter() - start
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(
        json.dumps(
            {"count": count, "seconds": seconds, "peak_mb": max(own, children) / 1024, "before_mb": before / 1024}
        )
    )


def measured(root: Path, args: Namespace, way: str, folder: str) -> dict[str, float]:
    """Return one measurement, by the script of the checkout `root`."""
    command = [sys.executable, str(root / "benchmarks" / "data_prep.py"), "--tokenizer", args.tokenizer]
    command += ["--source", args.source, "--worker", way, folder]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def compare(args: Namespace) -> None:
    """Print samples per second of both checkouts, in turn, and the ratio."""
    print("| samples | this checkout, samples/s | the other, samples/s | ratio of medians |")
    print("| --- | --- | --- | --- |")
    for size in map(int, args.sizes.split(",")):
        rates: dict[Path, list[float]] = {ROOT: [], Path(args.against).resolve(): []}
        with tempfile.TemporaryDirectory() as folder:
            write_records(args.source, size, Path(folder))
            for turn in range(args.turns):
                for root in list(rates)[:: 1 if turn % 2 == 0 else -1]:
                    shutil.rmtree(Path(folder) / "cache", ignore_errors=True)
                    result = measured(root, args, "cached", folder)
                    rates[root].append(result["count"] / result["seconds"])
        shown = [f"{statistics.median(found):.0f} ({min(found):.0f} to {max(found):.0f})" for found in rates.values()]
        ratio = statistics.median(rates[ROOT]) / statistics.median(list(rates.values())[1])
        print(f"| {size} | {' | '.join(shown)} | {ratio:.2f} |", flush=True)


def main() -> None:
    args = parse_arguments()
    if args.worker:
        work(args)
        return
    if args.against:
        compare(args)
        return
    print("| samples | way | samples/s | peak memory MB (largest process) | of which before the start |")
    print("| --- | --- | --- | --- | --- |")
    for size in map(int, args.sizes.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            write_records(args.source, size, Path(folder))
            for way in ("one_by_one", "cached", "streamed"):
                if way == "one_by_one" and size > args.one_by_one_up_to:
                    continue
                result = measured(ROOT, args, way, folder)
                print(
                    f"| {size} | {way} | {result['count'] / result['seconds']:.0f} | {result['peak_mb']:.0f} | "
                    f"{result['before_mb']:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
