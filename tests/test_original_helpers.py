"""The helpers that scripts for DeepSpeed-Chat's steps 2 and 3 import from here, against their definitions."""

from argparse import Namespace
from types import SimpleNamespace

import datasets
import pytest
import torch
from conftest import ROOT, make_json_data
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch.utils.data import DataLoader

from utils.data.data_utils import (
    DataCollatorReward,
    DataCollatorRLHF,
    MiniDataset,
    create_prompt_dataset,
    get_unsupervised_data,
)
from utils.module import lora
from utils.utils import (
    ExponentialMovingAverage,
    MovingAverage,
    _z3_params_to_fetch,
    get_tokenizer,
    is_rank_0,
    load_state_dict_into_model,
    moving_average,
)


def test_a_reward_batch_is_all_chosen_then_all_rejected():
    def row(value):
        return torch.full((1, 3), value)

    batch = DataCollatorReward()([(row(1), row(10), row(2), row(20)), (row(3), row(30), row(4), row(40))])
    assert batch["input_ids"][:, 0].tolist() == [1, 3, 2, 4]
    assert batch["attention_mask"].tolist() == [[10] * 3, [30] * 3, [20] * 3, [40] * 3]


def test_prompts_are_padded_on_the_left():
    """Phase 3 gives prompts reversed: the batch has them the right way round, ending where answers begin."""
    samples = [(torch.tensor([3, 2, 1]), torch.ones(3, dtype=torch.long), 9),
               (torch.tensor([5, 4]), torch.ones(2, dtype=torch.long), 9)]  # fmt: skip
    batch = DataCollatorRLHF(max_token_len=5, inference_tp_size=1)(samples)
    assert batch["prompt"].tolist() == [[9, 9, 1, 2, 3], [9, 9, 9, 4, 5]]
    assert batch["prompt_att_mask"].tolist() == [[0, 0, 1, 1, 1], [0, 0, 0, 1, 1]]


@pytest.mark.parametrize("phase", [2, 3])
def test_collators_take_what_the_data_sets_of_their_phase_give(phase, tmp_path):
    tokenizer = get_tokenizer(str(ROOT / "demo" / "tiny_opt"))
    source, split = str(make_json_data(tmp_path, 6, 2)), {2: "0,1,0", 3: "0,0,1"}[phase]
    data, _ = create_prompt_dataset(-1, [source], split, str(tmp_path / "cache"), phase, 1, tokenizer, 48)
    collate = DataCollatorReward() if phase == 2 else DataCollatorRLHF(2, 1)  # prompts are wider than 2
    batch = next(iter(DataLoader(data, collate_fn=collate, batch_size=3)))
    if phase == 2:
        assert batch["input_ids"].shape == batch["attention_mask"].shape == (6, 48)
        assert batch["input_ids"][1].equal(data[1][0][0]) and batch["input_ids"][4].equal(data[1][2][0])
        assert batch["attention_mask"][1].equal(data[1][1][0]) and batch["attention_mask"][4].equal(data[1][3][0])
        return
    texts = [data[number][0].flip(0).tolist() for number in range(3)]
    wide = max(map(len, texts))
    assert batch["prompt"].tolist() == [[1] * (wide - len(text)) + text for text in texts]
    assert batch["prompt_att_mask"].sum(dim=1).tolist() == [len(text) for text in texts]


def test_experience_comes_back_in_small_batches():
    collected = MiniDataset(max_size=2, small_batch_size=2)
    assert collected.add({"a": torch.arange(3), "b": torch.arange(3) * 10}) is None
    small = collected.add({"a": torch.arange(3, 5), "b": torch.arange(3, 5) * 10})
    assert [part["a"].tolist() for part in small] == [[0, 1], [2], [3, 4]]
    assert [part["b"].tolist() for part in small] == [[0, 10], [20], [30, 40]]
    assert collected.dataset == [], "it can collect again"
    lists = MiniDataset(1, 2).add([torch.arange(4), torch.arange(4)])
    assert [part[0].tolist() for part in lists] == [[0, 1], [2, 3]]
    with pytest.raises(ValueError, match="free"):
        MiniDataset(0, 1).add(torch.arange(2))


def test_unsupervised_text_is_cut_into_blocks(monkeypatch):
    tokenizer = get_tokenizer(str(ROOT / "demo" / "tiny_opt"))
    texts = ["one two three four", "five six", "seven eight nine ten eleven"]
    table = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": texts, "other": [1, 2, 3]})})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: table)
    args = Namespace(
        unsupervised_dataset_name="x", unsupervised_dataset_config_name="y", preprocessing_num_workers=1,
        max_prompt_seq_len=3, max_answer_seq_len=2,
    )  # fmt: skip
    blocks = get_unsupervised_data(args, tokenizer)
    joined = [token for text in texts for token in tokenizer(text)["input_ids"]]
    whole = len(joined) // 5
    assert [block for row in blocks["input_ids"] for block in row] == joined[: whole * 5]
    assert all(len(row) == 5 for row in blocks["input_ids"]) and blocks["labels"] == blocks["input_ids"]
    assert sorted(blocks.column_names) == ["attention_mask", "input_ids", "labels"]


def test_averages():
    mean = MovingAverage()
    assert [mean.update(number) for number in (1, 3, 8)] == [1, 2, 4]
    average = ExponentialMovingAverage(alpha=0.75)
    assert average.get() == 0.0
    assert [average.update(number) for number in (4, 8)] == [4, 0.75 * 4 + 0.25 * 8] and average.get() == 5.0


def test_moving_average_of_weights():
    model, ema = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    before = [parameter.detach().clone() for parameter in ema.parameters()]
    moving_average(model, ema, beta=0.9)
    for parameter, old, new in zip(model.parameters(), before, ema.parameters(), strict=True):
        torch.testing.assert_close(new.detach(), 0.9 * old + 0.1 * parameter.detach())


def test_a_state_dict_is_copied_by_name():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    weight, mean = torch.arange(6.0).reshape(3, 2), torch.arange(3.0)
    state = {"x.0.weight": weight, "x.0.bias": torch.ones(5), "other": weight, "x.1.running_mean": mean}
    errors = load_state_dict_into_model(model, state, "x.")
    assert torch.equal(model[0].weight, weight) and torch.equal(model[1].running_mean, mean)
    assert len(errors) == 1 and "0.bias" in errors[0] and "(5,)" in errors[0] and "(3,)" in errors[0]


def test_which_parameters_are_to_be_fetched():
    here = SimpleNamespace(ds_id=1, ds_status=ZeroParamStatus.AVAILABLE)
    elsewhere = SimpleNamespace(ds_id=2, ds_status=ZeroParamStatus.NOT_AVAILABLE)
    for fetch in (_z3_params_to_fetch, lora._z3_params_to_fetch):
        assert fetch([torch.ones(1), here, elsewhere]) == [elsewhere]


def test_rank_0_without_a_process_group():
    assert is_rank_0() is True
