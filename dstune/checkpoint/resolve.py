"""Which checkpoints exist, which are whole, and which is the newest whole one. No pointer file is ever read."""

from dataclasses import dataclass
from pathlib import Path

from dstune.checkpoint.audit import check
from dstune.checkpoint.keeping import BestMode, best_of
from dstune.checkpoint.layout import load_manifest
from dstune.errors import CheckpointError, Problem
from dstune.loggers import get_logger
from dstune.paths import step_of

log = get_logger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint: a directory with a final name. Whether it is whole is `verify`'s to say."""

    step: int
    directory: Path


def committed(checkpoints: Path) -> list[Checkpoint]:
    """Every directory with a committed checkpoint's name, oldest step first."""
    if not checkpoints.is_dir():
        return []
    found = [
        Checkpoint(step, path)
        for path in checkpoints.iterdir()
        if (step := step_of(path)) is not None and path.is_dir()
    ]
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def verify(checkpoint: Checkpoint, *, past_cache: bool = False, blocks: bool = True) -> list[str]:
    """What is wrong with a checkpoint, each with the file's name; empty where every byte is as it was written.

    Reads through the page cache, where whoever loads it next finds it; `past_cache`: what the disk holds.
    `blocks` false: what `Reader` checks while it reads is left to it; names, sizes and the rest are looked at.
    """
    return [str(finding) for finding in check(checkpoint.directory, past_cache=past_cache, blocks=blocks).findings]


def newest_whole(checkpoints: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint in which nothing is wrong, and why each newer one was passed over."""
    passed_over: list[str] = []
    for checkpoint in reversed(committed(checkpoints)):
        problems = verify(checkpoint)
        if not problems:
            return checkpoint, passed_over
        passed_over.append(f"{checkpoint.directory.name} passed over: {'; '.join(problems)}")
    return None, passed_over


def choose(checkpoints: Path, wanted: str, metric: str | None, mode: BestMode = "min") -> Checkpoint:
    """The checkpoint that `wanted` names: a step, `newest` (whole), or `best` by `metric`. It is whole.

    Raises CheckpointError where there is none such, or it is damaged.
    """
    if wanted == "newest":
        newest, passed_over = newest_whole(checkpoints)
        if newest is None:
            raise CheckpointError(Problem(str(checkpoints), "; ".join(passed_over) or "nothing is committed"))
        for reason in passed_over:
            log.warning("%s; step %d is the newest whole one", reason, newest.step)
        return newest
    chosen = _best(checkpoints, metric or "loss", mode) if wanted == "best" else numbered(checkpoints, wanted)
    if problems := verify(chosen):
        raise CheckpointError(Problem(str(chosen.directory), "; ".join(problems)))
    return chosen


def numbered(checkpoints: Path, step: str | int) -> Checkpoint:
    """The committed checkpoint of a step. Raises CheckpointError where there is none."""
    found = committed(checkpoints)
    for one in found:
        if str(one.step) == str(step):
            return one
    known = ", ".join(str(one.step) for one in found) or "none"
    raise CheckpointError(Problem(str(checkpoints), f"no committed step {str(step)!r}", f"one of: {known}"))


def metric_of(checkpoint: Checkpoint, metric: str | None) -> float | None:
    """The metric's value at this step; None where it has none, or a manifest that cannot be read."""
    try:
        return load_manifest(checkpoint.directory).metrics.get(metric or "")
    except CheckpointError as error:
        log.warning("%s: the value of %r at step %d is not known", error, metric, checkpoint.step)
        return None


def _best(checkpoints: Path, metric: str, mode: BestMode) -> Checkpoint:
    step = best_of({one.step: metric_of(one, metric) for one in committed(checkpoints)}, mode)
    if step is None:
        raise CheckpointError(Problem(str(checkpoints), f"no checkpoint has a value of {metric!r}", "a validation set"))
    return numbered(checkpoints, step)
