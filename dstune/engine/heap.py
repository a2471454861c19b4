"""The C library's heap of a worker that computes on a processor: it keeps what a step frees for the next one, and does not grow.

What goes back to the system costs the next step the first touch of its pages. glibc maps each tensor above 32 MiB by itself and unmaps it
when it is freed: gigabytes in every step of ZeRO, which makes weights, activations and gradients anew (155 M parameters on two workers:
3.1 s a step, 2.15 s where all stays in the heap, and 3% more memory). What is kept leaves holes where sizes differ from step to step:
those go back when they have come to something.
"""

import ctypes
import mmap
import os
from collections.abc import Callable
from pathlib import Path

_GROWTH = 1.1
"""Over what a step takes that begins without holes. (1.05: four times as many trims for 1% less memory.)"""
_STATM = Path("/proc/self/statm")
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""Of mallopt(3)."""
_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")


def keep_what_is_freed() -> None:
    """From here on memory comes from the heap and stays there, unless the environment says something of it.

    NOTE: glibc alone has this. A thread's own heap is in pieces of 64 MiB: threads share one under MALLOC_ARENA_MAX=1, which can only be
    set before a process starts (`launch.ray_host`).
    """
    library = ctypes.CDLL(None)
    told = any(os.environ.get(name) for name in _SETTINGS) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if hasattr(library, "mallopt") and not told:
        library.mallopt(_MMAP_MAX, 0)
        library.mallopt(_TRIM_THRESHOLD, -1)


def kept_heap(device_type: str) -> "Heap | None":
    """The heap of a worker on a processor, which from here on keeps what is freed; None: it computes elsewhere."""
    if device_type != "cpu":
        return None
    keep_what_is_freed()
    return Heap()


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
