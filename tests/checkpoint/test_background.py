"""Checkpoints written while the training goes on are those that would have been written at once."""

import json

import pytest
import torch
from fork_runs import checkpoint_steps, finished_run, losses


def slow_writing(argv: list[str]) -> None:
    """main.py whose background writer takes longer than several steps, and says when it begins and ends."""
    import time

    import main
    import utils.checkpoint.write_checkpoint as write_checkpoint

    write = write_checkpoint.write_files

    def slowly(files):
        print(f"WRITING {len(files)} files", flush=True)
        time.sleep(0.4)
        write(files)
        print("WRITTEN", flush=True)

    write_checkpoint.write_files = slowly
    main.run(argv)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_same_checkpoints(ranks, run_arguments, tmp_path):
    """Steps go on beside the writing; a weight that changes meanwhile changes no file; the last one counts as well."""
    command = [
        *run_arguments, "--per_device_train_batch_size", str(8 // ranks), "--zero_stage", str(ranks - 1),
        "--save_steps", "4", "--logging_steps", "1", "--save_total_limit", "0", "--num_train_epochs", "2",
        "--max_steps", "12",
    ]  # fmt: skip
    finished_run([*command, "--output_dir", tmp_path / "plain"], ranks)
    printed = finished_run(
        [*command, "--save_in_background", "--output_dir", tmp_path / "background"], ranks, program=slow_writing
    )
    of_rank_0 = printed[: printed.rindex("WRITTEN")].split("WRITING")
    assert any("Step: " in part.split("WRITTEN")[0] for part in of_rank_0[1:]), "steps while files are written"
    assert checkpoint_steps(tmp_path / "background") == checkpoint_steps(tmp_path / "plain") == [4, 8, 12]
    assert losses(tmp_path / "background") == losses(tmp_path / "plain")
    for step in (4, 12):
        folders = [tmp_path / name / "checkpoints" / f"step-{step:06d}" for name in ("plain", "background")]
        plain, background = (json.loads((folder / "complete.json").read_text()) for folder in folders)
        assert plain["files"].keys() == background["files"].keys()
        both = [{**marker["state"], "metrics_bytes": None} for marker in (plain, background)]  # with the speed in them
        assert both[0] == both[1]
        for name in plain["files"]:
            if name.endswith(".pt"):
                one, two = (torch.load(folder / name, weights_only=False, map_location="cpu") for folder in folders)
                assert equal(one, two), name


def equal(one: object, two: object) -> bool:
    """Whether two nested states hold the same numbers; other objects are compared by their words."""
    if torch.is_tensor(one):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(equal(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(equal, one, two))
    return type(one) is type(two) and (isinstance(one, (int, float, str)) is False or one == two)
