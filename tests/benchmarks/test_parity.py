"""The original's loop with its switches off gives main.py's losses, step by step; each switch changes them."""

from dataclasses import replace

import pytest
from fork_runs import finished_run

from benchmarks.parity.original_loop import SWITCHES, Setting, train
from benchmarks.parity.parity import differences, main_arguments, recorded_losses

# 77 samples: 20 micro batches of 4, the last of one sample; 7 steps of 3 an epoch, the last of 2 micro batches.
SMALL = {"micro_batch": 4, "accumulation": 3, "epochs": 2}


@pytest.mark.parametrize("lora", [{}, {"lora_dim": 8, "lora_learning_rate": 5e-3}], ids=["all weights", "LoRA"])
def test_with_the_switches_off_both_train_alike(lora, tiny_opt, json_data, tmp_path):
    setting = Setting(str(tiny_opt), str(json_data), **SMALL, **lora)
    finished_run(main_arguments(setting, tmp_path / "out"))
    losses, evaluation = recorded_losses(tmp_path / "out")
    steps, held_out = train(setting)
    assert len(losses) == 14 and steps[0].real_loss - steps[-1].real_loss > 0.05, "nothing was learned"
    assert len(steps) == 14 and max(differences(losses, steps)) < 1e-5
    assert held_out == pytest.approx(evaluation, rel=1e-5)
    assert all(step.loss == pytest.approx(step.real_loss, rel=1e-6) for step in steps)


def test_each_switch_alone_makes_a_difference(tiny_opt, json_data):
    setting = Setting(str(tiny_opt), str(json_data), **SMALL)
    plain, _ = train(setting)
    runs = {switch: train(replace(setting, **{switch: True}))[0] for switch in SWITCHES}
    minimized = {switch: [round(step.loss, 5) for step in steps] for switch, steps in runs.items()}
    expected = [round(step.loss, 5) for step in plain]
    assert minimized["count_padding"][0] != expected[0] and minimized["mean_of_means"][0] != expected[0]
    # The first epoch is the same, but for the incomplete step at its end.
    assert minimized["fixed_order"][:7] == expected[:7] and minimized["fixed_order"][7] != expected[7]
    assert minimized["carry_over"][:6] == expected[:6] and minimized["carry_over"][6] != expected[6]
    assert len(runs["carry_over"]) == 13, "40 micro batches are 13 steps of 3, and one that is left"
