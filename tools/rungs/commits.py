"""Rungs 4 to 6, where they are about a commit alone: two forked workers commit a pretend model, and something goes wrong on the way."""

import contextlib
import itertools
import random
import resource
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dstune.checkpoint import retention
from dstune.checkpoint.keeping import Rules
from dstune.checkpoint.resolve import committed
from dstune.protocols import Control
from tools.rungs import faults, pretend
from tools.rungs.board import Board
from tools.rungs.faults import Call, watched
from tools.rungs.processes import OUT_SECONDS, Work, Workers, done
from tools.rungs.tally import Tally, expect

_FULL_BYTES = 6 << 20
"""A tmpfs with room for two or three of the pretend model's checkpoints (1.8 MB)."""


def saving(checkpoints: Path, *steps: int, **more: Any) -> Work:
    """Commit these steps, one after another."""

    def work(control: Control) -> None:
        for step in steps:
            pretend.save(checkpoints, step, control, **more)

    return work


def started(board: Board, name: str) -> Path:
    """A directory of checkpoints with step 1 in it."""
    checkpoints = board.fresh(name) / "checkpoints"
    done(saving(checkpoints, 1))
    return checkpoints


def expect_goes_on(checkpoints: Path) -> None:
    """A resume finds something right, its next commit succeeds, and nothing half-made is left. Raises Failed."""
    step = pretend.newest_usable(checkpoints).step
    done(saving(checkpoints, step + 1))
    expect(pretend.newest_usable(checkpoints).step == step + 1, "the next commit is not the newest")
    left = [path.name for path in checkpoints.iterdir() if path.name not in _names(checkpoints)]
    expect(not left, f"left behind: {left}")


def _names(checkpoints: Path) -> set[str]:
    return {checkpoint.directory.name for checkpoint in committed(checkpoints)}


# --- 4: a late worker ----------------------------------------------------------------------------------------------


class _Late:
    """A worker that is late for ever: it says so, and waits, in place of its `turn`-th agreement with the others."""

    def __init__(self, control: Control, turn: int, say: Callable[[], None]) -> None:
        self._control, self._left, self._say = control, turn, say
        self.rank, self.world_size = control.rank, control.world_size

    def barrier(self) -> None:
        self._take_turn()
        self._control.barrier()

    def gather(self, value: Any) -> Any:
        self._take_turn()
        return self._control.gather(value)

    def broadcast(self, value: Any) -> Any:
        self._take_turn()
        return self._control.broadcast(value)

    def _take_turn(self) -> None:
        self._left -= 1
        if self._left == 0:
            self._say()
            threading.Event().wait()


def a_late_worker(tally: Tally, board: Board) -> None:
    """Each worker late at each agreement, then everything killed: never a half of a checkpoint, in the end the whole one."""
    for seed, late in itertools.product(board.seeds, (0, 1)):
        outcomes: list[int] = []
        for turn in itertools.count(1):
            checkpoints = started(board, "late")
            if not _late_then_killed(checkpoints, late, turn, random.Random(f"{seed} {late} {turn}")):
                break
            with tally.trial(seed, worker=late, turn=turn):
                outcomes.append(pretend.newest_usable(checkpoints).step)
                expect(
                    outcomes == sorted(outcomes), f"step {outcomes[-1]} is the newest, earlier kills left a newer one"
                )
                expect(turn > 1 or outcomes == [1], "committed without having heard a worker")
                expect_goes_on(checkpoints)


def _late_then_killed(checkpoints: Path, late: int, turn: int, draw: random.Random) -> bool:
    """False where the save has fewer turns than that."""
    mark = checkpoints.with_name("late")

    def work(control: Control) -> None:
        if control.rank == late:
            control = _Late(control, turn, mark.touch)
        pretend.save(checkpoints, 2, control)

    with Workers(work) as workers:
        workers.release()
        while not mark.exists():
            if workers.joined(late, 0.01):
                answers = workers.join()
                expect(all("value" in answer for answer in answers), f"with nobody late, workers ended with {answers}")
                return False
        workers.joined(1 - late, draw.random() / 2)  # the other one gets as far as it can, or not quite
        workers.kill()
    return True


# --- 5: killed at every call ---------------------------------------------------------------------------------------


def killed_at_every_call(tally: Tally, board: Board) -> None:
    """SIGKILL in place of each call that changes a file in a commit and the retention behind it, the other worker left or killed too."""
    tally.facts["by"] = faults.by()
    for seed, rank in itertools.product(board.seeds, (0, 1)):
        calls = recorded(board, _saving_and_pruning, rank)
        for call in board.some(calls, seed):
            both = random.Random(f"{seed} {call}").random() < 0.5
            with tally.trial(seed, worker=rank, killed_at=str(call), both=both):
                checkpoints = started(board, "killed")
                seen = watched(_saving_and_pruning(checkpoints), rank, checkpoints, call, kill_all=both)
                expect(seen.answers[rank] == {"killed": 9}, f"it was not killed: {seen.answers[rank]}")
                expect({"hung": True} not in seen.answers, f"the other worker is still there after {OUT_SECONDS:.0f} s")
                step = pretend.newest_usable(checkpoints).step
                tally.count(f"went_on_from_step_{step}")
                expect_goes_on(checkpoints)
            shutil.rmtree(checkpoints.parent)


def _saving_and_pruning(checkpoints: Path) -> Work:
    def work(control: Control) -> None:
        pretend.save(checkpoints, 2, control)
        retention.prune(checkpoints, Rules(keep=1), control)

    return work


def recorded(board: Board, work_in: Callable[[Path], Work], rank: int) -> list[Call]:
    """The calls that change files of one worker undisturbed, each kind's n-th once."""
    checkpoints = started(board, "recorded")
    seen = watched(work_in(checkpoints), rank, checkpoints)
    expect(all("value" in answer for answer in seen.answers), f"undisturbed workers ended with {seen.answers}")
    return list({(call.kind, call.nth): call for call in seen.calls}.values())


# --- 6: no space ---------------------------------------------------------------------------------------------------


def no_space_at_every_call(tally: Tally, board: Board) -> None:
    """ENOSPC in place of each call that may meet it: an error that says so, or a commit that is whole all the same; then the next save."""
    tally.facts["by"] = faults.by()
    removing = ("unlink", "unlinkat", "rmdir")
    for seed, rank in itertools.product(board.seeds, (0, 1)):
        calls = [call for call in recorded(board, lambda path: saving(path, 2), rank) if call.kind not in removing]
        for call in board.some(calls, seed):
            with tally.trial(seed, worker=rank, enospc_at=str(call)):
                checkpoints = started(board, "no-space")
                seen = watched(_twice(checkpoints), rank, checkpoints, call, error="ENOSPC")
                expect(all("value" in answer for answer in seen.answers), f"the workers ended with {seen.answers}")
                errors = [answer["value"] for answer in seen.answers]
                expect(errors[0] == errors[1], f"the workers say different things: {errors}")
                first, second = errors[0]
                expect(not first or "No space left on device" in first, f"the error does not say why: {first}")
                expect(not first or f"worker {rank}" in first, f"the error does not say who: {first}")
                expect(not second or "No space left on device" in second, f"the next save fails too: {second}")
                tally.count("errors" if first else "whole_all_the_same")
                expect(pretend.newest_usable(checkpoints).step == 3 or second, "the next save is not the newest")
                expect_goes_on(checkpoints)
            shutil.rmtree(checkpoints.parent)


def _twice(checkpoints: Path) -> Work:
    """Save step 2, whatever comes of it; then step 3 (a thread of its own meets strace's fault again). The result: the errors."""

    def work(control: Control) -> list[str]:
        return [_error_of(checkpoints, 2, control), _error_of(checkpoints, 3, control)]

    return work


def _error_of(checkpoints: Path, step: int, control: Control) -> str:
    try:
        pretend.save(checkpoints, step, control)
    except Exception as error:  # noqa: BLE001 - what is said is what is looked at
        return f"{type(error).__name__}: {error}"
    return ""


def full_disk(tally: Tally, board: Board) -> None:
    """Commits until there is no room: an error that says so on both workers in time, the last good one kept; with room again, on."""
    for seed in board.seeds:
        with tally.trial(seed), _small_disk(board.fresh("full"), seed) as (disk, means, make_room):
            tally.facts["full_disk_by"] = means
            checkpoints = disk / "checkpoints"
            with Workers(_until_full(checkpoints, limited=make_room is None)) as workers:
                workers.release()
                answers = workers.join()
            for answer in answers:
                expect("value" in answer, f"a worker ended with {answer}")
                said = answer["value"]
                expect("No space left" in said or "File too large" in said, f"the error does not say why: {said}")
            before = pretend.newest_usable(checkpoints).step
            expect(all(answer["value"].startswith(f"{before + 1} ") for answer in answers), f"{before} kept, {answers}")
            half_made = [path.name for path in checkpoints.iterdir() if path.name not in _names(checkpoints)]
            expect(not half_made, f"left behind: {half_made}")
            if make_room is not None:
                make_room()
            expect_goes_on(checkpoints)


def _until_full(checkpoints: Path, limited: bool) -> Work:
    """Save until it fails; the result: the step that failed, and the error."""

    def work(control: Control) -> str:
        for step in range(1, 20):
            if limited and step == 3 and control.rank == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
            if said := _error_of(checkpoints, step, control):
                return f"{step} {said}"
        return "never full"

    return work


@contextlib.contextmanager
def _small_disk(folder: Path, seed: int) -> Iterator[tuple[Path, str, Callable[[], None] | None]]:
    """A place that fills up, by which means, and what makes room on it. Without the right to mount: any place, None."""
    with mounted(folder, _FULL_BYTES) as may_mount:
        if not may_mount:
            yield folder, "RLIMIT_FSIZE (mounting is not allowed here)", None
            return
        filler = folder / "filler"
        filler.write_bytes(bytes(random.Random(seed).randrange(2 << 20)))
        yield folder, "tmpfs", lambda: remount(folder, 4 * _FULL_BYTES)


@contextlib.contextmanager
def mounted(folder: Path, size: int) -> Iterator[bool]:
    """A tmpfs of so many bytes on `folder`; False where it may not be mounted."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    allowed = subprocess.run(command, check=False, capture_output=True).returncode == 0
    try:
        yield allowed
    finally:
        if allowed:
            subprocess.run(["umount", str(folder)], check=True)


def remount(folder: Path, size: int) -> None:
    """Another size for a mounted tmpfs."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)
