"""What the rungs share: a folder of their own, the seeds, the uninterrupted run that others are compared with, and the comparison."""

import functools
import json
import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from dstune.launch import control, rundir
from dstune.launch.driver import Observer
from dstune.paths import RunPaths
from tests.runs.tiny import drive, finished, metrics, weights_hash, write_run
from tools.rungs.tally import expect

T = TypeVar("T")
EVERY = 3
"""Steps between two commits of the runs that are disturbed; all of them take 12."""

LONGER: Mapping[str, Mapping[str, Any]] = {"train": {"max_steps": 60}}
"""For what takes a while to be noticed."""


class Board:
    """One climb of the ladder."""

    def __init__(self, folder: Path, seeds: Sequence[int], points: int | None = None) -> None:
        """`points`: at most so many system calls, bits and the like of each kind; None: all of them."""
        self.folder, self.seeds, self.points = folder, seeds, points
        self._made = 0

    def fresh(self, name: str) -> Path:
        """A new empty folder."""
        self._made += 1
        made = self.folder / f"{self._made:04d}-{name}"
        made.mkdir(parents=True)
        return made

    def some(self, things: Sequence[T], seed: int) -> list[T]:
        """All of them, or `points` of them in their order, drawn by seed."""
        if self.points is None or len(things) <= self.points:
            return list(things)
        chosen = random.Random(seed).sample(range(len(things)), self.points)
        return [things[number] for number in sorted(chosen)]

    def write_run(self, folder: Path, **sections: Mapping[str, Any]) -> Path:
        """A run file of 12 steps over 2 workers on the ladder's own data; each keyword replaces keys of that section."""
        data = {"sources": [{"path": str(self._data)}]}
        return write_run(folder, data=data | dict(sections.pop("data", {})), **sections)

    @functools.cached_property
    def reference(self) -> RunPaths:
        """The run that nothing disturbs, committed at every step."""
        return finished(self.write_run(self.fresh("reference"), checkpoint={"every": 1}))

    @functools.cached_property
    def long_reference(self) -> RunPaths:
        """The same over `LONGER`."""
        return finished(self.write_run(self.fresh("long-reference"), **LONGER))

    def halfway(self) -> RunPaths:
        """A copy of a run that was stopped with several commits made and steps left."""
        copy = self.fresh("copy") / "tiny"
        shutil.copytree(self._stopped.root, copy)
        return RunPaths(copy)

    @functools.cached_property
    def _stopped(self) -> RunPaths:
        run = self.write_run(self.fresh("stopped"))
        paths = rundir.run_paths(rundir.load_run(run))
        end = drive(run, 2, new=True, observe=StopFrom(paths, 2 * EVERY))
        expect(end.state == "stopped" and end.step < 12, f"a run that was to be stopped at step 6 ended as {end}")
        return paths

    @functools.cached_property
    def _data(self) -> Path:
        """Questions of arithmetic, which no two records share."""
        path = self.folder / "arithmetic.jsonl"
        draw = random.Random(0)
        with path.open("w", encoding="utf-8") as file:
            for number in range(290):
                one, other = draw.randrange(10_000), number
                record = {"instruction": f"Add {one} to {other}, and show how.", "output": _sum(one, other)}
                file.write(json.dumps(record) + "\n")
        return path


def _sum(one: int, other: int) -> str:
    return f"{one} and {other} make {one + other}: " + ", ".join(f"{one} + {part}" for part in range(0, other, 97))


class StopFrom(Observer):
    """Ask for a stop once a step is seen; the run takes some more until it hears."""

    def __init__(self, paths: RunPaths, step: int) -> None:
        self.paths, self.step = paths, step

    def on_step(self, record: dict[str, Any]) -> None:
        if record["step"] >= self.step:
            control.request_stop(self.paths, control.USER)


def expect_exact(paths: RunPaths, reference: RunPaths) -> None:
    """Losses to the last digit, digests and final weights are those of the reference. Raises Failed."""
    for name in ("loss", "batch_digest"):
        expect_column(name, metrics(paths, name), metrics(reference, name))
    last = len(metrics(reference, "loss"))
    expect(weights_hash(paths, last) == weights_hash(reference, last), f"other weights after step {last}")


def expect_column(name: str, ours: Sequence[Any], theirs: Sequence[Any]) -> None:
    """Two columns of metrics.jsonl are equal. Raises Failed with the first step where they are not."""
    for step, (our, their) in enumerate(zip(ours, theirs, strict=False), start=1):
        expect(our == their, f"{name} of step {step}: {our} instead of {their}")
    expect(len(ours) == len(theirs), f"{len(ours)} steps instead of {len(theirs)}")
