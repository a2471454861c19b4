"""Rungs 7 to 9: files that changed, were mixed up or are gone are found before they are used, and the last good checkpoint stays."""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dstune.checkpoint import retention
from dstune.checkpoint.keeping import Rules
from dstune.checkpoint.resolve import Checkpoint, committed, newest_whole, verify
from dstune.paths import RunPaths, step_directory
from dstune.protocols import Control
from tests.runs.tiny import drive
from tests.spawn import read_lines
from tools.rungs import pretend
from tools.rungs.board import Board, expect_exact
from tools.rungs.commits import saving
from tools.rungs.processes import done
from tools.rungs.tally import Tally, expect

_POSITIONS = 300
"""Flipped bits in each file, for each seed."""


def _two_runs(board: Board) -> tuple[Path, Path]:
    """Checkpoints of steps 1 and 2 of a run, and of step 2 of another with the same shapes."""
    folder = board.fresh("damaged")
    done(saving(folder / "ours", 1, 2))
    done(saving(folder / "theirs", 2, run=1))
    return folder / "ours", folder / "theirs"


def flip(path: Path, bit: int) -> None:
    """Turn one bit of a file, counted from its beginning; again, and it is as before."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        (byte,) = os.pread(descriptor, 1, bit // 8)
        os.pwrite(descriptor, bytes([byte ^ 1 << bit % 8]), bit // 8)
    finally:
        os.close(descriptor)


def flipped_bits(tally: Tally, board: Board) -> None:
    """One bit at a time, at each file's first and last place and at hundreds between: found, the file named, the one before taken."""
    checkpoints, _ = _two_runs(board)
    newest = Checkpoint(2, step_directory(checkpoints, 2))
    for seed in board.seeds:
        for path in sorted(newest.directory.iterdir()):
            bits = path.stat().st_size * 8
            draw = random.Random(f"{seed} {path.name}")
            drawn = {draw.randrange(bits) for _ in range(_POSITIONS)}
            for number, bit in enumerate(board.some(sorted({0, bits - 1} | drawn), seed)):
                with tally.trial(seed, file=path.name, bit=bit):
                    flip(path, bit)
                    try:
                        _expect_named(newest, path.name)
                        if number % 20 == 0:
                            expect(pretend.newest_usable(checkpoints).step == 1, "it did not fall back")
                    finally:
                        flip(path, bit)
    expect(not verify(newest), "a bit that was turned back is still there")


def _expect_named(checkpoint: Checkpoint, name: str) -> None:
    problems = verify(checkpoint)
    expect(problems, "not found")
    expect(any(name in problem for problem in problems), f"found, but {name} is not named: {problems}")


Damage = Callable[[Path, Path, random.Random], str]
"""`damage(checkpoints, others, draw)` spoils step 2, and returns the name that must be told."""


def _older_shard(checkpoints: Path, others: Path, draw: random.Random) -> str:
    return _shard_from(step_directory(checkpoints, 1), checkpoints, draw)


def _foreign_shard(checkpoints: Path, others: Path, draw: random.Random) -> str:
    return _shard_from(step_directory(others, 2), checkpoints, draw)


def _shard_from(source: Path, checkpoints: Path, draw: random.Random) -> str:
    shard = draw.choice(_shards(step_directory(checkpoints, 2)))
    assert (source / shard.name).stat().st_size == shard.stat().st_size
    shutil.copy(source / shard.name, shard)
    return shard.name


def _shard_gone(checkpoints: Path, others: Path, draw: random.Random) -> str:
    shard = draw.choice(_shards(step_directory(checkpoints, 2)))
    shard.unlink()
    return shard.name


def _shards_swapped(checkpoints: Path, others: Path, draw: random.Random) -> str:
    one, other = _shards(step_directory(checkpoints, 2))
    one.rename(one.with_suffix(".x"))
    other.rename(one)
    one.with_suffix(".x").rename(other)
    return one.name


def _manifest_gone(checkpoints: Path, others: Path, draw: random.Random) -> str:
    (step_directory(checkpoints, 2) / "manifest.json").unlink()
    return "manifest.json"


def _older_manifest(checkpoints: Path, others: Path, draw: random.Random) -> str:
    shutil.copy(step_directory(checkpoints, 1) / "manifest.json", step_directory(checkpoints, 2))
    return "manifest.json"


def _foreign_manifest(checkpoints: Path, others: Path, draw: random.Random) -> str:
    shutil.copy(step_directory(others, 2) / "manifest.json", step_directory(checkpoints, 2))
    return draw.choice(_shards(step_directory(checkpoints, 2))).name


def _foreign_state(checkpoints: Path, others: Path, draw: random.Random) -> str:
    state = step_directory(checkpoints, 2) / "state.json"
    state.write_bytes(state.read_bytes().replace(b"2", b"1"))
    return "state.json"


def _shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("shard-*"))


_DAMAGES: tuple[Damage, ...] = (
    _older_shard,
    _foreign_shard,
    _shard_gone,
    _shards_swapped,
    _manifest_gone,
    _older_manifest,
    _foreign_manifest,
    _foreign_state,
)


def mixed_up(tally: Tally, board: Board) -> None:
    """Shards and manifests of another step or run of the same shapes, or gone: refused, the file named, the one before taken."""
    original, others = _two_runs(board)
    for seed in board.seeds:
        for damage in _DAMAGES:
            with tally.trial(seed, damage=damage.__name__.strip("_")):
                checkpoints = Path(shutil.copytree(original, board.fresh("mixed") / "checkpoints"))
                name = damage(checkpoints, others, random.Random(seed))
                _expect_named(Checkpoint(2, step_directory(checkpoints, 2)), name)
                expect(pretend.newest_usable(checkpoints).step == 1, "it did not fall back")


# --- whole runs ----------------------------------------------------------------------------------------------------


def flipped_bit_in_a_run(tally: Tally, board: Board) -> None:
    """A run whose newest checkpoint has one bit turned goes on from the one before, says why, and is exact."""
    for seed in board.seeds:
        draw = random.Random(seed)

        def turn_one(newest: Path, draw: random.Random = draw) -> str:
            path = draw.choice(sorted(newest.iterdir()))
            flip(path, draw.randrange(path.stat().st_size * 8))
            return path.name

        _resumed_in_spite_of(tally, board, seed, turn_one)


def mixed_up_run(tally: Tally, board: Board) -> None:
    """A run whose newest checkpoint has a shard of an older one, or no manifest, goes on from the one before, says why, and is exact."""
    for seed in board.seeds:

        def mix(newest: Path, draw: random.Random = random.Random(seed)) -> str:  # noqa: B008
            older = committed(newest.parent)[-2].directory
            shard = draw.choice(_shards(newest))
            shutil.copy(older / shard.name, shard)
            return shard.name

        def lose(newest: Path) -> str:
            (newest / "manifest.json").unlink()
            return "manifest.json"

        _resumed_in_spite_of(tally, board, seed, mix if seed % 2 else lose)


def _resumed_in_spite_of(tally: Tally, board: Board, seed: int, damage: Callable[[Path], str]) -> None:
    with tally.trial(seed, run=True):
        paths = board.halfway()
        before, newest = (checkpoint for checkpoint in committed(paths.checkpoints)[-2:])
        name = damage(newest.directory)
        end = drive(paths.root, 2, new=False)
        expect(end.state == "succeeded", f"the run ended as {end}")
        _expect_passed_over(paths, newest, name, before)
        expect_exact(paths, board.reference)


def _expect_passed_over(paths: RunPaths, newest: Checkpoint, name: str, before: Checkpoint) -> None:
    events = read_lines(paths.events)
    said = [event["checkpoint"] for event in events if event["event"] == "passed_over"]
    expect(said and newest.directory.name in said[0] and name in said[0], f"{name} is not named: {said}")
    steps = [event["from_step"] for event in events if event["event"] == "attempt_started"]
    expect(steps[-1] == before.step, f"it went on from step {steps[-1]} instead of {before.step}")


# --- 9: retention --------------------------------------------------------------------------------------------------


def retention_beside_damage(tally: Tally, board: Board) -> None:
    """Some commits, damage to some of them, the newest among them, retention: what was the newest good one before is so behind it."""
    for seed in board.seeds:
        for number in range(board.points or 20):
            with tally.trial(seed, history=number):
                _one_history(board, random.Random(f"{seed} {number}"))


def _one_history(board: Board, draw: random.Random) -> None:
    folder = board.fresh("kept")
    checkpoints, steps = folder / "checkpoints", draw.randrange(2, 6)
    keep, metrics = draw.randrange(1, 4), {"loss": draw.random()}
    done(saving(checkpoints, *range(steps), metrics=metrics))
    damaged = {steps - 1} | {step for step in range(steps) if draw.random() < 0.3}
    for step in damaged:
        path = draw.choice(sorted(step_directory(checkpoints, step).iterdir()))
        flip(path, draw.randrange(path.stat().st_size * 8))
    good = [step for step in range(steps) if step not in damaged]
    best = draw.choice([None, "loss"])
    removed = done(lambda control: retention.prune(checkpoints, Rules(keep=keep, best=best), control))
    left = [checkpoint.step for checkpoint in committed(checkpoints)]
    expect(removed[0] == removed[1], f"the workers heard of different removals: {removed}")
    expect(not set(removed[0]) & set(left), f"said to be removed, and there: {removed[0]}")
    found = newest_whole(checkpoints)[0]
    if not good:
        expect(left == list(range(steps)), f"nothing is whole, and {removed[0]} went")
        return
    expect(found is not None and found.step == good[-1], f"of the good ones {good}, {found} is the newest now")
    pretend.newest_usable(checkpoints)
    kept = [step for step in left if step <= good[-1]]
    expect(len(kept) >= min(keep, good[-1] + 1), f"{kept} are fewer than {keep} up to the newest whole one")
    _expect_later_commit_tidies(checkpoints, steps, keep)
    shutil.rmtree(folder)


def _expect_later_commit_tidies(checkpoints: Path, step: int, keep: int) -> None:
    def work(control: Control) -> Any:
        pretend.save(checkpoints, step, control)
        return retention.prune(checkpoints, Rules(keep=keep), control)

    done(work)
    expect(pretend.newest_usable(checkpoints).step == step, "the next commit is not the newest")
    expect(len(committed(checkpoints)) == min(keep, step + 1), f"{len(committed(checkpoints))} are kept, {keep} wanted")
