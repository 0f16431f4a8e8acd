"""Losses of a blend's data sets: exact, each as if it were evaluated alone."""

import json

import numpy as np
import pytest
import torch
from fork_runs import finished_run
from transformers import AutoModelForCausalLM

from utils.data.batching.batches import collate_for, eval_batches
from utils.data.formats.custom import own_options
from utils.data.mixture import DataSources
from utils.data.prepare import Preparation, prepare_prompt_data
from utils.data.prompt_dataset import Sources
from utils.data.streaming import create_prompt_stream
from utils.data.tokenization.tokenize_rows import SampleForm
from utils.logging.metrics_file import read_metrics
from utils.model.tokenizer import load_hf_tokenizer
from utils.module.fused_loss import install_loss
from utils.run_config import BatchCut
from utils.train.perplexity import evaluate


@pytest.fixture(scope="module")
def blend(tmp_path_factory):
    """Three files: words that no other has, and answers of other lengths."""
    folder = tmp_path_factory.mktemp("blend")
    for name, rows, length in (("owls", 80, 1), ("foxes", 40, 9), ("bees", 110, 4)):
        records = [{"prompt": f"{name} {n}?", "response": f"{name} number {n}. " * length} for n in range(rows)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    return [str(folder / f"{name}.jsonl") for name in ("owls", "foxes", "bees")]


def prepared(model, cache, paths, **more):
    tokenizer = load_hf_tokenizer(str(model))
    sample = SampleForm(tokenizer, "</s>", 64)
    own, preparation = own_options(tokenizer, sample.end_id), Preparation(0, str(cache), 1, 1234)
    if more.pop("streaming", False):
        return tokenizer, create_prompt_stream(paths, sample, own, preparation, 50, **more)[1]
    return tokenizer, prepare_prompt_data(DataSources(paths, None, **more), sample, own, preparation)[1]


@pytest.mark.parametrize("streaming", [False, True])
def test_each_sample_is_of_its_data_set(blend, tiny_opt, cache_folder, streaming):
    more = {"streaming": True, "eval_data_path": blend} if streaming else {}
    tokenizer, data = prepared(tiny_opt, cache_folder, blend, **more)
    found = data.by_source()
    assert list(found) == blend and sum(map(len, found.values())) == len(data)
    for path, members in found.items():
        word = path.rsplit("/", 1)[1].removesuffix(".jsonl")
        texts = [tokenizer.decode(data[int(member)]["input_ids"]) for member in members]
        assert texts and all(word in text for text in texts)


def test_sets_used_whole_and_sets_for_evaluation(blend, tiny_opt, cache_folder):
    """A set added for this phase is mixed in by a second shuffle; with --eval_data_path the others evaluate nothing."""
    tokenizer, data = prepared(tiny_opt, cache_folder, blend[:2], sft_only=blend[2:])
    bees = data.by_source()[blend[2]]
    assert all("bees" in tokenizer.decode(data[int(member)]["input_ids"]) for member in bees) and len(bees) == 11
    _, data = prepared(tiny_opt, cache_folder, blend[:1], evaluation=blend[1:])
    assert {path: len(members) for path, members in data.by_source().items()} == {blend[1]: 40, blend[2]: 110}
    _, data = prepared(tiny_opt, cache_folder, blend[:1])
    assert list(data.by_source()) == [""]
    assert Sources.of(["a", "b", "a"], np.zeros(0)).names == ["a", "b", "a (2)"]


def test_two_ranks_measure_what_each_set_gives_alone(blend, tiny_opt, cache_folder, tmp_path):
    printed = finished_run(
        [
            "--model_name_or_path", tiny_opt, "--data_path", *blend, "--data_output_path", cache_folder,
            "--max_seq_len", "64", "--dtype", "fp32", "--per_device_eval_batch_size", "3", "--max_steps", "1",
            "--report_to", "tensorboard", "--tensorboard_path", tmp_path / "events", "--output_dir", tmp_path / "out",
        ],
        ranks=2,
    )  # fmt: skip
    record = read_metrics(str(tmp_path / "out"))[0]
    model = AutoModelForCausalLM.from_pretrained(tiny_opt, dtype=torch.float32)
    install_loss(model, fused=False)
    summed = labels = 0
    for path in blend:
        tokenizer, data = prepared(tiny_opt, cache_folder, [path])
        collate = collate_for("longest", tokenizer.pad_token_id, 64)
        alone = evaluate(model, eval_batches(data, collate, BatchCut(len(data))), torch.device("cpu"))
        assert list(record["sources"][path].values()) == pytest.approx([alone.loss, alone.perplexity, alone.accuracy])
        assert f"on {path}: perplexity {record['sources'][path]['perplexity']}, loss " in printed
        summed += alone.loss * int(data.label_counts().sum())
        labels += int(data.label_counts().sum())
    assert record["eval_loss"] == pytest.approx(summed / labels)
    means = [one["eval_loss"] for one in record["sources"].values()]
    assert record["eval_loss"] != pytest.approx(sum(means) / 3, rel=1e-5)  # a mean of means is another number
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert list(run["result"]["sources"]) == blend

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next((tmp_path / "events").rglob("events.out*")).parent))
    events.Reload()
    curve = events.Scalars(f"Eval/Samples/loss/{blend[1].strip('/')}")
    assert curve[0].value == pytest.approx(record["sources"][blend[1]]["eval_loss"])
