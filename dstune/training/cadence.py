"""When a checkpoint is due: after so many steps, or so much time. Only worker 0 looks at the clock."""

import time

from dstune.config.units import duration_seconds


class SaveCadence:
    """`every` as the run file has it: steps, or a duration."""

    def __init__(self, every: int | str) -> None:
        self._steps = every if isinstance(every, int) else None
        self._seconds = None if isinstance(every, int) else duration_seconds(every)
        self._last = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether the state behind `step` should be saved."""
        if self._steps is not None:
            return step % self._steps == 0
        assert self._seconds is not None
        return time.monotonic() - self._last >= self._seconds

    def saved(self) -> None:
        """A save has just ended."""
        self._last = time.monotonic()
