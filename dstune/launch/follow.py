"""Logs of JSON lines as the driver needs them: read what is new, cut back to a step."""

from pathlib import Path
from typing import Any

from dstune.atomic import json_record, write_bytes


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
        records = map(json_record, whole.split(b"\n"))
        return [record for record in records if record is not None]


def cut_back(path: Path, step: int) -> int:
    """Leave only records whose `step` is at most `step`, atomically; returns how many were cut.

    A line that is damaged is cut too.
    """
    if not path.exists():
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if _is_kept(line, step)]
    if len(kept) < len(lines):
        write_bytes(path, b"".join(kept))
    return len(lines) - len(kept)


def _is_kept(line: bytes, step: int) -> bool:
    if not line.endswith(b"\n"):
        return False
    try:
        return int((json_record(line) or {})["step"]) <= step
    except (ValueError, KeyError, TypeError):
        return False
