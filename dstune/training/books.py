"""What worker 0 writes into the run directory while it trains, and where it looks for a stop request."""

import json
from typing import Any

from dstune.paths import RunPaths
from dstune.records.sinks import EventLog, JsonLines
from dstune.records.step import StepRecord
from dstune.training.validation import ValidationRecord


class RunBooks:
    """`loop.Books` over a run directory's files."""

    def __init__(self, paths: RunPaths) -> None:
        self._paths = paths
        self._metrics = JsonLines(paths.metrics)
        self._evaluations = JsonLines(paths.evaluations)
        self.events = EventLog(paths.events)

    def step(self, record: StepRecord) -> None:
        self._metrics.write(record.as_dict())

    def validation(self, record: ValidationRecord) -> None:
        self._evaluations.write(record.as_dict())

    def skip(self, step: int, examples: list[dict[str, Any]]) -> None:
        self.events.event("skip", step=step, examples=examples)

    def stop_reason(self) -> str | None:
        try:
            return str(json.loads(self._paths.stop_request.read_text(encoding="utf-8"))["reason"])
        except FileNotFoundError:
            return None
