"""Signals as the driver takes them: a handler only notes them and wakes the driver, which acts on its own thread."""

import contextlib
import queue
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

REASONS = {signal.SIGINT: "interrupt", signal.SIGTERM: "terminate", signal.SIGUSR1: "preempted"}
"""Why a stop is asked for, by the signal that asked. Batch systems send SIGUSR1 ahead of a time limit or preemption."""


class StopSignals:
    """Within `with`: SIGINT, SIGTERM and SIGUSR1 become reasons to stop; a second SIGINT becomes `kill`.

    With `handle=False`, or outside the main thread (where Python cannot set handlers), only `wait` and `wake` work.
    """

    def __init__(self, handle: bool = True) -> None:
        self._handle = handle and threading.current_thread() is threading.main_thread()
        self._before: dict[signal.Signals, Any] = {}
        self._interrupts = 0
        self._noted: queue.SimpleQueue[str] = queue.SimpleQueue()  # the one queue that a signal handler may write to
        self._reasons: list[str] = []

    def __enter__(self) -> "StopSignals":
        if self._handle:
            self._before = {number: signal.signal(number, self._note) for number in REASONS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def take(self) -> list[str]:
        """The reasons that came since the last call, in their order."""
        while not self._noted.empty():
            self._reasons.append(self._noted.get())
        reasons, self._reasons = [reason for reason in self._reasons if reason], []
        return reasons

    def wait(self, seconds: float) -> None:
        """Return when a signal came, when woken, or after `seconds`."""
        with contextlib.suppress(queue.Empty):
            self._reasons.append(self._noted.get(timeout=seconds))

    def wake(self) -> None:
        """End a `wait` (from any thread)."""
        self._noted.put("")

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        again = number == signal.SIGINT and self._interrupts > 1
        self._noted.put("kill" if again else REASONS[signal.Signals(number)])
