"""Where records go: logs of JSON lines, each record in one write."""

import json
import time
from pathlib import Path
from typing import Any

from dstune.atomic import append_line


class JsonLines:
    """A log of records, one JSON object a line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, record: dict[str, Any]) -> None:
        append_line(self.path, json.dumps(record, ensure_ascii=False, allow_nan=False))


class EventLog(JsonLines):
    """events.jsonl: what happened to a run, each with the time (seconds since 1970) and its kind."""

    def event(self, kind: str, **facts: Any) -> None:
        """Add an event: attempt, failure, resize, commit, evaluation, skip, stop_requested, …"""
        self.write({"time": round(time.time(), 3), "event": kind, **facts})
