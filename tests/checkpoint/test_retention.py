"""Old checkpoints go only when a newer one was read back whole."""

from pathlib import Path

import pytest

from dstune.checkpoint.resolve import newest_whole
from dstune.checkpoint.retention import prune, surplus
from tests.checkpoint.sample import Alone, at, commit, steps


def _damage(checkpoints: Path, step: int, file: str = "shard-*") -> None:
    path = next(at(checkpoints, step).directory.glob(file))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_the_newest_stay(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        commit(tmp_path, step)
    assert prune(tmp_path, 2, Alone()) == [1, 2]
    assert steps(tmp_path) == [3, 4]
    assert prune(tmp_path, 2, Alone()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


def test_the_best_stays_too(tmp_path: Path) -> None:
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 2.5)):
        commit(tmp_path, step, metrics={"loss": loss, "accuracy": loss})
    assert prune(tmp_path, 1, Alone(), best="loss") == [1, 3]
    assert steps(tmp_path) == [2, 4]
    commit(tmp_path, 5, metrics={"loss": 0.5, "accuracy": 0.1})
    assert prune(tmp_path, 1, Alone(), best="accuracy", mode="max") == [2]


@pytest.mark.parametrize("file", ["shard-*", "state.json", "manifest.json"])
def test_while_the_newest_is_damaged_the_last_good_one_stays(tmp_path: Path, file: str) -> None:
    for step in (1, 2, 3):
        commit(tmp_path, step)
    _damage(tmp_path, 3, file)
    assert prune(tmp_path, 1, Alone()) == [1]
    assert steps(tmp_path) == [2, 3]
    assert newest_whole(tmp_path)[0] == at(tmp_path, 2)


def test_nothing_goes_while_nothing_is_whole(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        commit(tmp_path, step)
        _damage(tmp_path, step)
    assert prune(tmp_path, 1, Alone()) == []
    assert steps(tmp_path) == [1, 2, 3]


def test_what_was_moved_aside_goes_once_a_newer_one_is_whole(tmp_path: Path) -> None:
    commit(tmp_path, 1)
    commit(tmp_path, 2)
    _damage(tmp_path, 2)
    commit(tmp_path, 2)
    assert list(tmp_path.glob("*.damaged-*"))
    commit(tmp_path, 3)
    assert prune(tmp_path, 2, Alone()) == [1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


def test_surplus_is_counted_up_to_the_newest_whole_one() -> None:
    assert surplus([1, 2, 3, 4, 5], newest_whole=3, keep=2, best=None) == [1]
    assert surplus([1, 2, 3, 4, 5], newest_whole=5, keep=2, best=1) == [2, 3]
    assert surplus([5], newest_whole=5, keep=1, best=None) == []
