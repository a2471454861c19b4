"""What stands beside a run's committed checkpoints: saves and deletions that were cut short, damaged ones moved aside."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dstune.paths import owner_file, step_of

Kind = Literal["unfinished", "deleting", "damaged", "other"]

_PATTERNS: tuple[tuple[Kind, re.Pattern[str]], ...] = (
    ("unfinished", re.compile(r"step-(\d+)\.tmp-.+")),
    ("deleting", re.compile(r"\.step-(\d+)\..*deleting|\.prune-.+")),
    ("damaged", re.compile(r"step-(\d+)\.damaged-.+")),
)


@dataclass(frozen=True)
class LeftOver:
    """A file or directory that is no committed checkpoint."""

    path: Path
    kind: Kind
    """`unfinished`: of a save (one that goes on, or was cut short); `deleting`: of a deletion; `damaged`: moved aside by the
    save that wrote the step anew; `other`: not of ours."""
    step: int | None
    bytes: int


def left_overs(checkpoints: Path) -> list[LeftOver]:
    """Everything there that is not committed, by name."""
    if not checkpoints.is_dir():
        return []
    beside = [path for path in sorted(checkpoints.iterdir()) if step_of(path) is None or not path.is_dir()]
    return [_left_over(path) for path in beside if path != owner_file(checkpoints)]


def tree_bytes(path: Path) -> int:
    """The sizes of all files in it; of what disappears meanwhile, nothing."""
    total = 0
    for file in [path, *path.rglob("*")]:
        try:
            total += file.lstat().st_size if not file.is_dir() else 0
        except FileNotFoundError:
            continue
    return total


def _left_over(path: Path) -> LeftOver:
    for kind, pattern in _PATTERNS:
        if (match := pattern.fullmatch(path.name)) and path.is_dir():
            return LeftOver(path, kind, int(match.group(1)) if match.group(1) else None, tree_bytes(path))
    return LeftOver(path, "other", None, tree_bytes(path))
