"""Which checkpoints were read to the last byte and found whole, and when: remembered in one small file of the run's directory.

Nothing is decided by it: a resume, an export and a pruning read anew. A checkpoint of which any file has another size, time of
change or inode than before the reading counts as never read. A record that is damaged or cannot be written is as none.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dstune.atomic import write_json
from dstune.loggers import get_logger

_log = get_logger(__name__)


class Verified:
    """The record in `file` (None: nothing is remembered), by place: a checkpoint's directory, or its address in a store."""

    def __init__(self, file: Path | None) -> None:
        self._file = file

    def when(self, place: str, stamp: str | None) -> str | None:
        """When it was last found whole (UTC, ISO 8601), if it still has the `stamp` that it had then."""
        entry = self._entries().get(place)
        return entry["time"] if entry and entry["stamp"] == stamp else None

    def note(self, whole: Mapping[str, str | None], others: Iterable[str] = ()) -> str:
        """Remember those that are `whole`, each with its stamp of before the reading, and forget `others`; the time noted."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        before = self._entries()
        gone = {*others, *(place for place, stamp in whole.items() if stamp is None)}
        fresh = {place: {"time": now, "stamp": stamp} for place, stamp in whole.items()}
        after = {place: entry for place, entry in (before | fresh).items() if place not in gone}
        if self._file and after != before:
            try:
                write_json(self._file, after)
            except OSError as error:
                _log.warning("%s: which checkpoints are verified is not remembered: %s", self._file, error)
        return now

    def _entries(self) -> dict[str, dict[str, Any]]:
        if self._file is None:
            return {}
        try:
            entries = json.loads(self._file.read_text(encoding="utf-8"))
            return {place: entry for place, entry in entries.items() if {"time", "stamp"} <= entry.keys()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, AttributeError) as error:
            _log.debug("%s: which checkpoints are verified is not known: %s", self._file, error)
            return {}


NO_RECORD = Verified(None)


def stamp_of(directory: Path) -> str | None:
    """A hash of every file's name, size, time of change and inode; None where they cannot be asked for."""
    try:
        facts = {path.name: path.stat() for path in directory.iterdir()}
    except OSError:
        return None
    return digest({name: (one.st_size, one.st_mtime_ns, one.st_ino) for name, one in facts.items()})


def digest(facts: Mapping[str, tuple[int, ...]]) -> str:
    """One hash of what is known of each file, by name."""
    return hashlib.sha256(json.dumps(sorted(facts.items())).encode("utf-8")).hexdigest()
