"""Which checkpoints stay: the newest ones and the best one. Nothing goes before a newer one was read back and found whole."""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from dstune.atomic import remove_directory
from dstune.checkpoint.layout import Manifest, load_manifest
from dstune.checkpoint.resolve import committed, file_problems
from dstune.errors import CheckpointError
from dstune.loggers import get_logger
from dstune.paths import step_directory
from dstune.protocols import Control

_log = get_logger(__name__)


def prune(
    checkpoints: Path, keep: int, control: Control, best: str | None = None, mode: Literal["min", "max"] = "min"
) -> list[int]:
    """Delete all but the newest `keep` checkpoints, and the one whose metric `best` is best; returns the deleted steps.

    A collective call. The workers first read the newest one back, each a part of its files, past the page cache;
    where it is damaged, the newest whole one counts as the newest, and nothing newer than that is touched.
    """
    if not control.broadcast(len(committed(checkpoints)) > keep):
        return []
    newest = _newest_read_back(checkpoints, control)
    deleted: list[int] = []
    if control.rank == 0 and newest is not None:
        steps = [checkpoint.step for checkpoint in committed(checkpoints)]
        deleted = surplus(steps, newest, keep, _best(checkpoints, best, mode))
        for step in deleted:
            remove_directory(step_directory(checkpoints, step))
        _remove_damaged(checkpoints, newest)
    return control.broadcast(deleted)


def surplus(steps: Sequence[int], newest_whole: int, keep: int, best: int | None) -> list[int]:
    """Of all committed `steps`, those that may go: older than the newest `keep` up to `newest_whole`, and not the best."""
    settled = sorted(step for step in steps if step <= newest_whole)
    return [step for step in settled[:-keep] if step != best]


def _newest_read_back(checkpoints: Path, control: Control) -> int | None:
    """The newest step of which every byte came back right; the workers share the reading."""
    for step in control.broadcast([checkpoint.step for checkpoint in reversed(committed(checkpoints))]):
        problems = [found for share in control.gather(_share_problems(checkpoints, step, control)) for found in share]
        if not problems:
            return step
        if control.rank == 0:
            _log.warning("step %d is damaged and does not count: %s", step, "; ".join(problems))
    return None


def _share_problems(checkpoints: Path, step: int, control: Control) -> list[str]:
    directory = step_directory(checkpoints, step)
    try:
        manifest = load_manifest(directory)
    except CheckpointError as error:
        return [str(error)]
    share = sorted(manifest.files)[control.rank :: control.world_size]
    problems = file_problems(directory, manifest, share, from_disk=True)
    return problems + ([f"manifest.json: is of step {manifest.step}"] if manifest.step != step else [])


def _best(checkpoints: Path, metric: str | None, mode: str) -> int | None:
    manifests: dict[int, Manifest] = {}
    for checkpoint in committed(checkpoints):
        with contextlib.suppress(CheckpointError):  # a damaged one is not the best
            manifests[checkpoint.step] = load_manifest(checkpoint.directory)
    return best_of(manifests, metric, mode)


def best_of(manifests: Mapping[int, Manifest], metric: str | None, mode: str = "min") -> int | None:
    """The step whose manifest has the best value of `metric`, the newer of two equal ones; None where none has it."""
    values = [
        (-value if mode == "min" else value, step)
        for step, manifest in manifests.items()
        if (value := manifest.metrics.get(metric or "")) is not None
    ]
    return max(values)[1] if values else None


def _remove_damaged(checkpoints: Path, newest: int) -> None:
    """Delete what a save had moved aside as damaged, now that this step or a newer one is whole."""
    for directory in checkpoints.glob("step-*.damaged-*"):
        if int(directory.name.split(".")[0].removeprefix("step-")) <= newest:
            remove_directory(directory)
