"""A trace of some steps of one worker, as torch's profiler writes it, for Perfetto or chrome://tracing."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from dstune.loggers import get_logger

log = get_logger(__name__)


class Trace:
    """Records the steps `first` to `last` (both with it, from 1) and writes them to `file`; a run that begins later writes nothing."""

    def __init__(self, first: int, last: int, file: Path, device: torch.device) -> None:
        self._first, self._last, self._file = first, last, file
        self._activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        self._running: profile | None = None

    def before(self, step: int) -> None:
        """`step` is about to be taken."""
        if step == self._first:
            self._running = profile(activities=self._activities)
            self._running.start()

    def after(self, step: int, end: bool) -> None:
        """`step` was taken; `end`: no other one follows."""
        if self._running is None or (step < self._last and not end):
            return
        running, self._running = self._running, None
        running.stop()
        self._file.parent.mkdir(parents=True, exist_ok=True)
        running.export_chrome_trace(str(self._file))
        log.info("steps %d to %d are traced in %s", self._first, step, self._file)
