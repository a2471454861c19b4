"""Old checkpoints go only when a newer one was read back whole."""

import shutil
from pathlib import Path

import pytest

from dstune.checkpoint import retention
from dstune.checkpoint.keeping import Rules
from dstune.checkpoint.leftovers import left_overs
from dstune.checkpoint.resolve import newest_whole
from dstune.checkpoint.retention import plan, prune, remove
from tests.checkpoint.sample import Alone, at, commit, steps


def _damage(checkpoints: Path, step: int, file: str = "shard-*") -> None:
    path = next(at(checkpoints, step).directory.glob(file))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_the_newest_stay(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        commit(tmp_path, step)
    assert prune(tmp_path, Rules(keep=2), Alone()) == [1, 2]
    assert steps(tmp_path) == [3, 4]
    assert prune(tmp_path, Rules(keep=2), Alone()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


def test_the_best_stays_too(tmp_path: Path) -> None:
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 2.5)):
        commit(tmp_path, step, metrics={"loss": loss, "accuracy": loss})
    assert prune(tmp_path, Rules(keep=1, best="loss"), Alone()) == [1, 3]
    assert steps(tmp_path) == [2, 4]
    commit(tmp_path, 5, metrics={"loss": 0.5, "accuracy": 0.1})
    assert prune(tmp_path, Rules(keep=1, best="accuracy", best_mode="max"), Alone()) == [2]


@pytest.mark.parametrize("file", ["shard-*", "state.json", "manifest.json"])
def test_while_the_newest_is_damaged_the_last_good_one_stays(tmp_path: Path, file: str) -> None:
    for step in (1, 2, 3):
        commit(tmp_path, step)
    _damage(tmp_path, 3, file)
    assert prune(tmp_path, Rules(keep=1), Alone()) == [1]
    assert steps(tmp_path) == [2, 3]
    assert newest_whole(tmp_path)[0] == at(tmp_path, 2)


def test_nothing_goes_while_nothing_is_whole(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        commit(tmp_path, step)
        _damage(tmp_path, step)
    assert prune(tmp_path, Rules(keep=1), Alone()) == []
    assert steps(tmp_path) == [1, 2, 3]


def test_what_was_moved_aside_goes_once_a_newer_one_is_whole(tmp_path: Path) -> None:
    commit(tmp_path, 1)
    commit(tmp_path, 2)
    _damage(tmp_path, 2)
    commit(tmp_path, 2)
    assert list(tmp_path.glob("*.damaged-*"))
    commit(tmp_path, 3)
    assert prune(tmp_path, Rules(keep=2), Alone()) == [1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


def test_every_nth_stays_and_nothing_is_read_where_nothing_would_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (2, 4, 6):
        commit(tmp_path, step)
    with monkeypatch.context() as patch:
        patch.setattr(retention, "file_findings", lambda *_, **__: pytest.fail("read in vain"))
        assert prune(tmp_path, Rules(keep=1, keep_every=2), Alone()) == []
    commit(tmp_path, 7)
    commit(tmp_path, 8)
    assert prune(tmp_path, Rules(keep=1, keep_every=4), Alone()) == [2, 6, 7]
    assert steps(tmp_path) == [4, 8]


def test_what_cannot_be_deleted_ends_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2, 3):
        commit(tmp_path, step)

    def stubborn(directory: Path) -> None:
        if directory.name == "step-00000001":
            raise PermissionError(13, "Permission denied")
        shutil.rmtree(directory)

    monkeypatch.setattr(retention, "remove_directory", stubborn)
    assert prune(tmp_path, Rules(keep=1), Alone()) == [2]
    assert steps(tmp_path) == [1, 3]


def test_a_plan_reads_back_until_one_is_whole(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        commit(tmp_path, step)
    _damage(tmp_path, 4)
    planned = plan(tmp_path, Rules(keep=1))
    assert [(step, bool(findings)) for step, findings in planned.looks] == [(4, True), (3, False)]
    assert (planned.newest_whole, planned.steps) == (3, [1, 2])
    assert steps(tmp_path) == [1, 2, 3, 4], "a plan deletes nothing"
    assert plan(tmp_path, Rules(keep=4)).looks == [], "nothing to go, nothing to read"
    for step in (1, 2, 3):
        _damage(tmp_path, step)
    planned = plan(tmp_path, Rules(keep=1))
    assert (planned.newest_whole, planned.steps, len(planned.looks)) == (None, [], 4)


def test_one_without_a_shard_does_not_count_among_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        commit(tmp_path, step)
    next(at(tmp_path, 3).directory.glob("shard-*")).unlink()
    assert plan(tmp_path, Rules(keep=2)).steps == [1, 3]


def test_removing_by_hand_beside_a_run_that_removes_too(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        commit(tmp_path, step)
    (tmp_path / "step-00000004.tmp-abcd").mkdir()
    (tmp_path / "step-00000004.tmp-abcd" / "shard").write_bytes(b"12345")
    (tmp_path / "notes.txt").write_text("mine")
    planned = plan(tmp_path, Rules(keep=1))
    assert planned.steps == [1, 2] and [one.kind for one in planned.left_overs] == ["unfinished"]
    shutil.rmtree(at(tmp_path, 1).directory)
    size = sum(file.stat().st_size for file in at(tmp_path, 2).directory.iterdir())
    gone, rest, freed = remove(tmp_path, planned.steps, planned.left_overs)
    assert (gone, [one.path.name for one in rest], freed) == ([2], ["step-00000004.tmp-abcd"], size + 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "step-00000003"]


def test_damaged_ones_aside_go_by_hand_only_behind_a_whole_one(tmp_path: Path) -> None:
    commit(tmp_path, 1)
    shutil.copytree(at(tmp_path, 1).directory, tmp_path / "step-00000001.damaged-ab")
    shutil.copytree(at(tmp_path, 1).directory, tmp_path / "step-00000002.damaged-ab")
    assert [one.path.name for one in plan(tmp_path, Rules()).left_overs] == ["step-00000001.damaged-ab"]
    _damage(tmp_path, 1)
    assert plan(tmp_path, Rules()).left_overs == []


def test_left_overs_are_told_apart(tmp_path: Path) -> None:
    commit(tmp_path, 1)
    names = {
        "step-00000002.tmp-0a1b": "unfinished",
        ".step-00000001.77.deleting": "deleting",
        ".prune-12-ab": "deleting",
        "step-00000001.damaged-0a1b": "damaged",
        "step-3": "other",
        "notes.txt": "other",
    }
    for name in names:
        (tmp_path / name).write_bytes(b"1234") if name == "notes.txt" else (tmp_path / name).mkdir()
    found = left_overs(tmp_path)
    assert {one.path.name: one.kind for one in found} == names
    assert {one.path.name: one.bytes for one in found if one.bytes} == {"notes.txt": 4}
    assert {one.step for one in found} == {1, 2, None}
    assert left_overs(tmp_path / "nowhere") == []
