"""What a person sees while a run goes on: one live line in a terminal, a line per step elsewhere."""

import sys
import threading
import time
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


class StepProgress:
    """Steps with loss, tokens/s and time left. `total` steps in all."""

    def __init__(self, total: int, mode: str = "auto", stream: TextIO | None = None) -> None:
        self._total = total
        self._stream = stream or sys.stderr
        self._console = Console(file=self._stream, highlight=False)
        self._live = mode == "rich" or (mode == "auto" and self._console.is_terminal)
        self._started = time.monotonic()
        self._first: int | None = None
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def step(self, record: dict[str, Any]) -> None:
        loss = "not finite" if record["loss"] is None else f"{record['loss']:.4f}"
        if not self._live:
            self._print_line(record, loss)
            return
        if self._progress is None:
            self._open()
        assert self._progress is not None and self._task is not None
        rate = f"{record['tokens_per_second']:,.0f} tok/s"
        self._progress.update(self._task, completed=record["step"], loss=loss, rate=rate, lr=f"{record['lr']:.2e}")

    def say(self, text: str) -> None:
        """A line of its own above the progress."""
        (self._progress.console if self._progress else self._console).print(text, markup=False)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _open(self) -> None:
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("loss {task.fields[loss]}  lr {task.fields[lr]}  {task.fields[rate]}  left"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task = self._progress.add_task("train", total=self._total, loss="", rate="", lr="")
        self._progress.start()

    def _print_line(self, record: dict[str, Any], loss: str) -> None:
        step = int(record["step"])
        if self._first is None:
            self._first, self._started = step, time.monotonic()
        done = step - self._first
        left = (time.monotonic() - self._started) / done * (self._total - step) if done else None
        tail = "" if left is None else f"  left {int(left // 60)}:{int(left % 60):02d}"
        self._console.print(
            f"step {step}/{self._total}  loss {loss}  lr {record['lr']:.2e}  {record['tokens_per_second']:,.0f} tok/s{tail}",
            markup=False,
        )


class Preparing(Protocol):
    """How far a preparation is (`data.prepare.Progress`)."""

    @property
    def stage(self) -> str: ...
    @property
    def file(self) -> str: ...
    @property
    def records(self) -> int: ...
    @property
    def examples(self) -> int: ...


class PreparationProgress:
    """What a preparation is doing: a live line in a terminal, nothing elsewhere or unless `shown`. Call it with each report."""

    def __init__(self, stream: TextIO | None = None, shown: bool = True) -> None:
        self._console = Console(file=stream or sys.stderr, highlight=False)
        self._shown = shown
        self._status = self._console.status("preparing the data")

    def __enter__(self) -> "PreparationProgress":
        if self._shown and self._console.is_terminal:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()

    def __call__(self, now: Preparing) -> None:
        where = f" {escape(now.file)}" if now.file else ""
        self._status.update(f"{now.stage}{where}: {now.records:,} records, {now.examples:,} examples")


class ReadingProgress:
    """Bytes read so far, of `total` where that is known, with speed and time left: a live line in a terminal where `shown`.

    It counts whether or not anything is shown. `more` may be called from any thread.
    """

    def __init__(self, total: int | None = None, stream: TextIO | None = None, shown: bool = True) -> None:
        console = Console(file=stream or sys.stderr, highlight=False)
        columns = (TextColumn("reading"), BarColumn(bar_width=24), DownloadColumn(), TransferSpeedColumn())
        self._progress = Progress(
            *columns,
            TimeRemainingColumn(),
            console=console,
            disable=not (shown and console.is_terminal),
            transient=True,
        )
        self._task = self._progress.add_task("read", total=total)
        self._lock = threading.Lock()
        self._started = self._ended = time.monotonic()
        self.bytes = 0

    @property
    def seconds(self) -> float:
        """From entering to leaving the block."""
        return self._ended - self._started

    def more(self, count: int) -> None:
        """So many more bytes were read."""
        with self._lock:
            self.bytes += count
        self._progress.advance(self._task, count)

    def __enter__(self) -> "ReadingProgress":
        self._started = time.monotonic()
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = time.monotonic()
        self._progress.stop()
