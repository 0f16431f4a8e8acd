"""The split index: bit-identical to the published rule where that works, sound everywhere."""

import multiprocessing
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.data import splits
from utils.data.splits import (
    LARGEST_REMAINDER,
    PUBLISHED,
    get_raw_dataset_split_index,
    get_shuffle_idx,
    index_dtype,
    split_boundaries,
)
from utils.errors import UserError
from utils.files import write_aside
from utils.notation import parse_data_split

SHARES = st.lists(st.integers(0, 20) | st.floats(0, 10), min_size=1, max_size=5).filter(lambda s: sum(s) > 0)


def published(data_split: str, size: int) -> list[int]:
    """The published rule, step by step from its description."""
    numbers = [float(text) for text in data_split.split(",")]
    fractions = [number / sum(numbers) for number in numbers]
    marks = [0]
    for fraction in fractions:
        marks.append(marks[-1] + int(round(fraction * float(size))))  # noqa: RUF046
    excess = marks[-1] - size
    return [marks[0]] + [mark - excess for mark in marks[1:]]


def works(marks: list[int], size: int) -> bool:
    return marks[0] == 0 and marks[-1] == size and marks == sorted(marks)


def index(folder, part: int, size: int, data_split: str = "2,4,4", **more) -> np.ndarray:
    return get_raw_dataset_split_index(-1, str(folder), "Some_set", 1234, "train", data_split, part, size, **more)


def test_shuffle_is_the_published_one():
    expected = np.arange(10, dtype=np.uint32)
    np.random.RandomState(7).shuffle(expected)
    assert get_shuffle_idx(7, 10).tolist() == expected.tolist()
    # Written down, so that a change in numpy would show as well.
    assert get_shuffle_idx(1234, 8).tolist() == [2, 1, 6, 0, 4, 5, 3, 7]
    assert get_shuffle_idx(1234, 0).tolist() == []


def test_index_type_changes_near_the_end_of_uint32():
    assert index_dtype(2**32 - 3) is np.uint32
    assert index_dtype(2**32 - 2) is np.int64
    assert get_shuffle_idx(1, 5).dtype == np.uint32


@pytest.mark.parametrize("data_split", ["2,4,4", "10,0,0", "9,1", "0,5,5", "1,1,1", "6,2,2"])
def test_boundaries_are_the_published_ones_wherever_those_work(data_split):
    for size in range(1, 301):
        marks = published(data_split, size)
        found = split_boundaries(data_split, size)
        if works(marks, size):
            assert found == (marks, PUBLISHED)
        else:
            assert works(found.boundaries, size)
            assert found.rule == LARGEST_REMAINDER


def test_0_5_5_of_7_rows():
    assert published("0,5,5", 7) == [0, -1, 3, 7]
    assert split_boundaries("0,5,5", 7) == ([0, 0, 4, 7], LARGEST_REMAINDER)


def test_0_5_5_of_5_rows_keeps_the_published_boundaries():
    # They increase from 0 to 5, so they stay, although the first share is zero: later phases depend on them.
    assert split_boundaries("0,5,5", 5) == ([0, 1, 3, 5], PUBLISHED)


@given(shares=SHARES, size=st.integers(0, 5000))
def test_parts_are_disjoint_and_complete(shares, size):
    data_split = ",".join(map(str, shares))
    found = split_boundaries(data_split, size)
    assert works(found.boundaries, size)
    assert len(found.boundaries) == len(shares) + 1
    assert (found.rule == PUBLISHED) == works(published(data_split, size), size)


@given(shares=SHARES, size=st.integers(0, 5000))
def test_a_zero_share_stays_empty(shares, size):
    marks, rule = split_boundaries(",".join(map(str, shares)), size)
    for part, share in enumerate(shares):
        # Where the published boundaries work, rows lost in rounding go to the first part, whatever its share.
        if share == 0 and (part > 0 or rule == LARGEST_REMAINDER):
            assert marks[part] == marks[part + 1]


@given(shares=SHARES, size=st.integers(0, 5000))
def test_largest_remainder_is_within_one_row_of_the_quota(shares, size):
    marks = splits._largest_remainder_boundaries([float(share) for share in shares], size)
    assert works(marks, size)
    for part, share in enumerate(shares):
        assert abs(marks[part + 1] - marks[part] - share / sum(shares) * size) < 1 + 1e-6
        assert share > 0 or marks[part] == marks[part + 1]


def test_parse_data_split():
    assert parse_data_split("2,4,4") == [2.0, 4.0, 4.0]
    assert parse_data_split(" 0.2, 0.4 ,0.4") == [0.2, 0.4, 0.4]
    assert parse_data_split("9,1") == [9.0, 1.0]
    assert parse_data_split("5") == [5.0]
    assert parse_data_split("6,2,1,1") == [6.0, 2.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not a list of numbers"),
        ("2,4,x", "not a list of numbers"),
        ("2,4,", "not a list of numbers"),
        ("2;4;4", "not a list of numbers"),
        ("2,-4,4", "negative"),
        ("0,0,0", "gives every part nothing"),
        ("inf,1,1", "not a finite number"),
        ("nan,1,1", "not a finite number"),
        ("1e308,1e308,1e308", "not a finite number"),
    ],
)
def test_bad_data_split(text, words):
    with pytest.raises(UserError) as error:
        parse_data_split(text)
    assert words in str(error.value)
    assert f'--data_split "{text}"' in str(error.value)
    assert '"2,4,4"' in str(error.value)


def test_the_files_hold_the_parts(tmp_path):
    whole = get_shuffle_idx(1234, 103)
    parts = [index(tmp_path / "new", part, 103) for part in range(3)]
    names = [f"Some_set_seed1234_train_2,4,4_{part}.npy" for part in range(3)]
    assert sorted(os.listdir(tmp_path / "new")) == names
    for part, name in zip(parts, names, strict=True):
        stored = np.load(tmp_path / "new" / name)
        assert stored.dtype == part.dtype == np.uint32
        assert stored.tolist() == part.tolist()
    assert np.concatenate(parts).tolist() == whole.tolist()
    marks = published("2,4,4", 103)
    assert parts[1].tolist() == whole[marks[1] : marks[2]].tolist()


def test_an_unchanged_file_is_left_alone(tmp_path, capsys):
    index(tmp_path, 0, 50)
    before = {entry.name: entry.stat().st_ino for entry in os.scandir(tmp_path)}
    index(tmp_path, 0, 50)
    assert {entry.name: entry.stat().st_ino for entry in os.scandir(tmp_path)} == before
    assert capsys.readouterr().out == ""
    index(tmp_path, 0, 50, rebuild=True)
    assert all(entry.stat().st_ino != before[entry.name] for entry in os.scandir(tmp_path))


def spoil_other_size(path):
    np.save(path, get_shuffle_idx(1234, 100)[:20])


def spoil_cut_off(path):
    path.write_bytes(path.read_bytes()[:-3])


def spoil_longer(path):
    path.write_bytes(path.read_bytes() + b"more")


def spoil_garbage(path):
    path.write_bytes(b"\x80garbage")


def spoil_float(path):
    np.save(path, np.load(path).astype(np.float32))


def spoil_empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize(
    "spoil", [spoil_other_size, spoil_cut_off, spoil_longer, spoil_garbage, spoil_float, spoil_empty]
)
def test_a_file_that_does_not_fit_is_written_anew(tmp_path, capsys, spoil):
    expected = index(tmp_path, 1, 10).tolist()
    path = tmp_path / "Some_set_seed1234_train_2,4,4_1.npy"
    right = path.read_bytes()
    spoil(path)
    assert index(tmp_path, 1, 10).tolist() == expected
    assert path.read_bytes() == right
    assert f"{path} does not fit" in capsys.readouterr().out


def test_an_index_of_100_rows_is_not_used_for_10(tmp_path):
    index(tmp_path, 0, 100)
    assert sorted(np.concatenate([index(tmp_path, part, 10) for part in range(3)]).tolist()) == list(range(10))


def test_other_ranks_do_not_print(tmp_path, capsys):
    for size in (10, 20):
        get_raw_dataset_split_index(3, str(tmp_path), "Some_set", 1234, "train", "2,4,4", 0, size)
    assert capsys.readouterr().out == ""


def test_a_part_that_does_not_exist(tmp_path):
    with pytest.raises(ValueError, match="part 3"):
        index(tmp_path, 3, 10)


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be kept.*--data_output_path"):
        index(tmp_path / "file" / "below", 0, 10)


def _many(folder: str, answers) -> None:
    answers.put([index(folder, part, size).tolist() for size in (500, 500, 40) for part in range(3)])


def test_processes_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    processes = [context.Process(target=_many, args=(str(tmp_path), answers)) for _ in range(4)]
    for process in processes:
        process.start()
    found = [answers.get(timeout=30) for _ in processes]
    for process in processes:
        process.join(timeout=30)
        assert process.exitcode == 0
    assert all(answer == found[0] for answer in found)
    assert not [name for name in os.listdir(tmp_path) if not name.endswith(".npy")]


def test_write_aside_leaves_nothing_behind_after_an_error(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with pytest.raises(RuntimeError), write_aside(str(path)) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["file"]
