"""The ladder's rungs in short form, on a few points each: they pass here, and they fail where dstune would be wrong."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from dstune.checkpoint import commit
from dstune.paths import step_directory
from tools.rungs import __main__ as ladder
from tools.rungs import commits, damage, faults, runs
from tools.rungs.board import Board
from tools.rungs.tally import Tally, expect

ROOT = Path(__file__).parent.parent
COMMITS = (
    commits.a_late_worker,
    commits.killed_at_every_call,
    commits.no_space_at_every_call,
    commits.full_disk,
    damage.flipped_bits,
    damage.mixed_up,
    damage.retention_beside_damage,
)


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Board:
    return Board(tmp_path_factory.mktemp("ladder"), seeds=[7], points=4)


def climbed(part: Any, board: Board) -> Tally:
    tally = Tally(0, part.__name__)
    part(tally, board)
    assert tally.tries
    return tally


@pytest.mark.parametrize("part", COMMITS, ids=lambda part: part.__name__)
def test_commits_survive(part: Any, board: Board) -> None:
    assert climbed(part, board).failures == []


@pytest.mark.dist
@pytest.mark.parametrize("part", [damage.flipped_bit_in_a_run, runs.full_disk_in_a_run], ids=lambda part: part.__name__)
def test_runs_survive(part: Any, board: Board) -> None:
    if part is runs.full_disk_in_a_run and os.geteuid() != 0:
        pytest.skip("mounting a tmpfs wants root")
    assert climbed(part, board).failures == []


def test_without_strace_the_functions_of_os_are_patched(board: Board, monkeypatch: Any) -> None:
    monkeypatch.setattr(faults, "by", lambda: "patched os functions")
    tally = climbed(commits.killed_at_every_call, board)
    assert tally.failures == [] and tally.facts["by"] == "patched os functions"


def test_a_save_that_removes_before_it_renames_falls_through(board: Board, monkeypatch: Any) -> None:
    save = commit.save

    def careless(checkpoints: Path, step: int, *arguments: Any, **more: Any) -> Any:
        shutil.rmtree(step_directory(checkpoints, step - 1), ignore_errors=True)
        return save(checkpoints, step, *arguments, **more)

    monkeypatch.setattr(commit, "save", careless)
    failures = climbed(commits.killed_at_every_call, board).failures
    assert any(failure["why"].startswith("a resume would start from step 0: ") for failure in failures)
    assert {failure["seed"] for failure in failures} == {7} and all(failure["killed_at"] for failure in failures)


def test_a_verification_that_finds_nothing_falls_through(board: Board, monkeypatch: Any) -> None:
    monkeypatch.setattr(damage, "verify", lambda checkpoint: [])
    tally = climbed(damage.flipped_bits, board)
    assert [failure["why"] for failure in tally.failures] == ["not found"] * tally.tries


def _passes(tally: Tally, board: Board) -> None:
    for seed in board.seeds:
        with tally.trial(seed):
            expect(True, "")


def _fails(tally: Tally, board: Board) -> None:
    with tally.trial(5, case="x"):
        expect(False, "it broke")
    raise OSError("no such machine")


def test_the_command_prints_a_line_a_rung_and_fails_where_one_did(capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("DSTUNE_CACHE", os.environ["DSTUNE_CACHE"])  # the command changes it
    monkeypatch.setattr(ladder, "RUNGS", (ladder.Rung(1, "good", (_passes,)), ladder.Rung(2, "bad", (_fails, _passes))))
    assert ladder.main(["1", "--seeds", "4"]) == 0
    assert ladder.main(["--seed", "3"]) == 1
    first, again, second = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (first["rung"], first["tries"], first["passed"], first["failures"]) == (1, 4, 4, [])
    assert again["tries"] == 3
    assert (second["rung"], second["tries"], second["passed"]) == (2, 5, 3)
    assert second["failures"][0] == {"seed": 5, "case": "x", "why": "it broke"}
    assert second["failures"][1]["part"] == "_fails" and "no such machine" in second["failures"][1]["why"]


def test_every_rung_is_listed_with_the_tests_that_show_it_in_short(capsys: Any) -> None:
    assert ladder.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [str(n) for n in range(1, 11)]
    assert all((ROOT / rung.short).is_file() for rung in ladder.RUNGS)
