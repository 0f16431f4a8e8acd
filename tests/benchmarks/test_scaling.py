"""What a step moves between ranks: formulas against the bytes of real steps on two ranks, and arithmetic by hand."""

import pytest
from fork_runs import _context, free_port

from benchmarks.scaling import scaling
from benchmarks.scaling import tables as scaling_tables
from benchmarks.scaling.step_model import Cluster, Traffic, Work, communication_seconds, state_bytes, step, traffic

SMALL = {"hidden": 128, "layers": 2, "lengths": [8, 12], "steps": 1}
WAYS = {way.name: way for way in scaling.ways(SMALL["hidden"])}


def _rank(rank: int, port: int, folder: str) -> None:
    """One of two ranks: a step of every setting, in one process, its figures written to a file."""
    import json
    import os
    from pathlib import Path

    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", LOCAL_SIZE="2",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    from utils.distributed.process_group import start_process_group

    collectives = scaling.Collectives()
    collectives.install()
    device = start_process_group(rank, 120)
    found = {
        name: scaling.run_steps({**SMALL, "stage": way.stage, "zero": way.zero}, collectives, device)
        for name, way in WAYS.items()
    }
    (Path(folder) / f"rank_{rank}.json").write_text(json.dumps(found))
    os._exit(0)  # no thread of the process group keeps the test waiting


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    import json

    folder = tmp_path_factory.mktemp("ranks")
    port = free_port()
    processes = [_context().Process(target=_rank, args=(rank, port, str(folder)), daemon=True) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
        process.kill()
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", WAYS)
def test_a_step_on_two_ranks_moves_what_the_formula_says(name, measured):
    for found in (rank[name] for rank in measured):
        assert found["parameters"] > 1.2e6
        # Flags and norms come on top, and stage 3 leaves weights below 10,000 elements whole.
        assert scaling.agreement(found, WAYS[name], 2) == pytest.approx(1, abs=0.02)
        assert 0 < found["communication_seconds"] < found["counted_seconds"]


PSI = 1e9


@pytest.mark.parametrize(
    ("stage", "options", "multiple"),
    [
        (0, {}, 2), (1, {"as_published": True}, 2), (2, {"as_published": True}, 2), (3, {}, 3),
        (1, {}, 3), (2, {}, 3), (1, {"accumulation": 4}, 3), (2, {"accumulation": 4}, 9), (3, {"accumulation": 4}, 12),
    ],
)  # fmt: skip
def test_volumes_are_the_papers_multiples_of_the_weights(stage, options, multiple):
    moved = traffic(stage, PSI, PSI, 2, **options)
    assert moved.sent(64, 8) == pytest.approx(multiple * 2 * PSI * 63 / 64)


def test_only_trained_weights_have_gradients_and_hpz_gathers_twice_but_once_within_the_node():
    assert traffic(0, PSI, PSI / 100).sent(2, 8) == pytest.approx(2 * 2 * PSI / 100 / 2)
    lora = traffic(3, PSI, PSI / 100)
    assert (lora.reduce_scatter, lora.all_gather) == (2 * PSI / 100, 4 * PSI)
    tied = traffic(3, PSI, PSI, tied=PSI / 10)
    assert tied.all_gather == pytest.approx(2 * 2 * 1.1 * PSI)
    assert traffic(3, PSI, PSI, live=PSI, tied=PSI / 10).all_gather == 2 * PSI, "nothing is released, nor gathered anew"
    hpz = traffic(3, PSI, PSI, hpz=True)
    assert (hpz.reduce_scatter, hpz.all_gather, hpz.gather_in_node) == (2 * PSI, 2 * PSI, 2 * PSI)


def test_a_steps_time_by_hand():
    """1e9 weights all-reduced in 16 bits over 16 GPUs in two nodes: 3.75 GB at 50 GB/s are 75 ms."""
    cluster = Cluster(node=8, in_node=500e9, between=50e9, peak=1000e12, share_of_peak=0.5, overlap=0.5)
    moved = traffic(0, PSI, PSI)
    assert communication_seconds(moved, 16, cluster) == pytest.approx(0.075)
    assert communication_seconds(moved, 8, cluster) == pytest.approx(3.5e9 / 500e9)
    assert communication_seconds(moved, 1, cluster) == 0
    assert communication_seconds(Traffic(gather_in_node=8e9), 16, cluster) == pytest.approx(7e9 / 500e9)
    long = step(Work(PSI, PSI, tokens=10_000, flops_per_token=6e9), moved, 16, cluster)
    assert (long.computing, long.exposed) == (pytest.approx(0.12), pytest.approx(0.0375))
    assert long.tokens_per_second == pytest.approx(16 * 10_000 / 0.1575)
    short = step(Work(PSI, PSI, tokens=1000, flops_per_token=6e9), moved, 16, cluster)
    assert short.exposed == pytest.approx(0.075 - 0.012), "no more hides than there is computing"


def test_states_are_the_papers_16_bytes():
    sizes = [state_bytes(stage, 7.5e9, 7.5e9, 64) / 1e9 for stage in range(4)]
    assert sizes == pytest.approx([120, 31.4, 16.6, 1.88], rel=0.01), "figure 1 of the ZeRO paper"
    assert state_bytes(3, 7.5e9, 7.5e9, 64, hpz_node=8) / 1e9 == pytest.approx(1.875 + 15 / 8)


def test_the_tables_name_every_assumption_and_have_every_setting():
    import argparse

    parser = argparse.ArgumentParser()
    scaling_tables.add_arguments(parser)
    text = scaling_tables.tables(parser.parse_args(["--between", "25", "--overlap", "0"]))
    for words in ("nodes of 8 GPUs", "450 GB/s", "25 GB/s", "989 TFLOP/s", "40%", "0% of the communication hides"):
        assert words in text
    rows = [line for line in text.splitlines() if line.startswith(("| 8 |", "| 64 |", "| 512 |"))]
    assert len(rows) == 3 * 2 * 3 * 4
    size = next(line for line in text.splitlines() if line.startswith("13b, full"))
    assert size == "13b, full: 12.85B weights, 12.85B train"
