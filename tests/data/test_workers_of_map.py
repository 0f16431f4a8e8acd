"""Rows are mapped in several processes; an error of one of them is the run's, and none is ended by force."""

import pytest
from datasets import Dataset, Features, Value
from datasets.utils.py_utils import multiprocess

from utils.data.tokenization.workers import map_rows
from utils.errors import UserError


class Unreadable(Exception):
    """An error that can't be made again from its bytes."""

    def __init__(self, row: int, why: str) -> None:
        super().__init__(f"row {row}: {why}")


def doubled(columns: dict[str, list], bad: dict[int, str]) -> dict[str, list]:
    for row in columns["row"]:
        if row in bad:
            raise UserError(bad[row]) if bad[row] else Unreadable(row, "why")
    return {"twice": [2 * row for row in columns["row"]]}


def mapped(workers: int, bad: dict[int, str]) -> list[int]:
    table = map_rows(
        Dataset.from_dict({"row": list(range(100))}), workers, function=doubled, batched=True, batch_size=10,
        fn_kwargs={"bad": bad}, features=Features({"twice": Value("int64")}), remove_columns=["row"],
    )  # fmt: skip
    return table["twice"][:]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_errors_come_back(workers, monkeypatch):
    """From the first process and the last one, and from the first batch, which leaves no row at all."""
    assert mapped(workers, {}) == [2 * row for row in range(100)]
    forced, terminate = [], multiprocess.pool.Pool._terminate_pool.__func__

    def watched(cls, *arguments):
        forced.extend(process for process in arguments[3] if process.exitcode is None)
        terminate(cls, *arguments)

    monkeypatch.setattr(multiprocess.pool.Pool, "_terminate_pool", classmethod(watched))
    for row in (0, 55, 99):
        with pytest.raises(UserError, match=rf"^row {row} is refused$"):
            mapped(workers, {row: f"row {row} is refused"})
    with pytest.raises(UserError, match=r"^both$"):
        mapped(workers, dict.fromkeys(range(100), "both"))
    assert not forced, "no process is ended that has not ended by itself"


def test_an_error_that_can_not_be_read_back_keeps_its_words():
    with pytest.raises(RuntimeError, match=r"^Unreadable: row 3: why$"):
        mapped(2, {3: ""})
