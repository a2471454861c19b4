"""The C library's heap of a worker that computes on a processor: kept from growing as step follows step.

Gathered weights, activations and gradients come and go in an order that no two steps share to the byte, and glibc keeps what is freed:
two workers of 3.1 GiB in their second step had 4.3 GiB in their fortieth, and went on growing, all of it holes. Given back to the system
a hole costs the next step the first touch of its pages, so that is done where it has come to something.
"""

import ctypes
import mmap
from collections.abc import Callable
from pathlib import Path

_GROWTH = 1.1
"""Over what a step takes that begins without holes. (1.05: four times as many trims for 1% less memory.)"""
_STATM = Path("/proc/self/statm")


class Heap:
    """Has the heap give back its holes at the end of a step where the process has grown by them."""

    def __init__(self, resident: Callable[[], int] | None = None, trim: Callable[[], None] | None = None) -> None:
        """`resident`: the bytes that the process has in memory; `trim` gives back what is free. None: this process's own."""
        self._resident = resident or resident_bytes
        self._trim = trim or _trim
        self._steps = 0
        self._usual = 0
        """Bytes at the end of a step that began without holes, the most that there were."""
        self._trimmed = False

    def after_step(self) -> None:
        """The first two steps make what stays."""
        self._steps += 1
        now = self._resident()
        if self._steps <= 2 or self._trimmed:
            self._usual = max(now, self._usual)
        self._trimmed = now > _GROWTH * self._usual
        if self._trimmed:
            self._trim()


def resident_bytes() -> int:
    """What this process has in memory; 0 where the system does not say."""
    try:
        return int(_STATM.read_text(encoding="ascii").split()[1]) * mmap.PAGESIZE
    except OSError:
        return 0


def _trim() -> None:
    """NOTE: glibc alone has this; others give back by themselves, or never."""
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if give_back is not None:
        give_back(0)
