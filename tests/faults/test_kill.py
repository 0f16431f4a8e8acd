"""SIGKILL at random moments: the next start goes on and ends bit for bit where an undisturbed run ends."""

import pytest
from kill_rounds import kill_rounds

KILLS = {1: 8, 2: 6}  # by the number of ranks; kill_rounds.py does more


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_runs_end_as_undisturbed_ones(ranks, run_setting, tmp_path):
    hits = kill_rounds(run_setting, tmp_path, KILLS[ranks], ranks, seed=ranks)
    assert hits.total() - hits["too late"] == KILLS[ranks]
    assert len(hits) > 3, "kills hit different phases"
