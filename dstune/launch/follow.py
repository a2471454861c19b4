"""Logs of JSON lines as the driver needs them: read what is new, cut back to a step."""

import json
from pathlib import Path
from typing import Any

from dstune.atomic import write_bytes


class LineFollower:
    """The records that were added to a log since the last look; a line that is still being written waits for the next look."""

    def __init__(self, path: Path, from_end: bool = True) -> None:
        self._path = path
        self._offset = path.stat().st_size if from_end and path.exists() else 0

    def new(self) -> list[dict[str, Any]]:
        """Records since the last call, oldest first."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            whole, newline, _ = file.read().rpartition(b"\n")
        if not newline:
            return []
        self._offset += len(whole) + 1
        return [json.loads(line) for line in whole.split(b"\n") if line]


def cut_back(path: Path, step: int) -> int:
    """Leave only records whose `step` is at most `step`, atomically; returns how many were cut.

    The first line that is behind `step`, or that a crash cut in the middle, ends what is kept: records stand in order.
    """
    if not path.exists():
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    kept = 0
    for line in lines:
        if not _is_kept(line, step):
            break
        kept += 1
    if kept < len(lines):
        write_bytes(path, b"".join(lines[:kept]))
    return len(lines) - kept


def _is_kept(line: bytes, step: int) -> bool:
    if not line.endswith(b"\n"):
        return False
    try:
        return int(json.loads(line)["step"]) <= step
    except (ValueError, KeyError, TypeError):
        return False
