"""The C library's heap of a worker that computes on a processor: it keeps what a step frees for the next one, within what was planned.

What goes back to the system costs the next step the first touch of its pages. glibc maps each tensor above 32 MiB by itself and unmaps it
when it is freed: gigabytes in every step of ZeRO, which makes weights, activations and gradients anew (155 M parameters on two workers:
3.1 s a step, 2.15 s where all stays in the heap, and 3% more memory). What is kept is left in pieces by whatever lies between: with a
vocabulary of 256,000 a process took half as much again. So what is free goes back wherever a process comes to take more than was planned.

Two habits of glibc leave pieces between tensors of one size where the next one of that size does not fit, for it looks for the alignment on
top: torch's huge pages (THP_MEM_ALLOC_ENABLE) align to 2 MiB (150 M parameters, rows of 2,048: 6.0 GiB where it is 4.7 without, and a fifth
more time), and a thread's cache takes the crumbs beside a tensor that would complete its room (a LoRA run: 3.8 GiB, 2.8 without).
"""

import ctypes
import mmap
import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

_ROOM = 1.05
"""Over what was planned, and over what a process takes without holes where that is more."""
_STATM = Path("/proc/self/statm")
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""Of mallopt(3)."""
_WITHOUT_CACHES = "glibc.malloc.tcache_count=0"
_MARK = "DSTUNE_STARTED_AGAIN"
"""In the environment of a program that did."""
_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")


def at_start(processors: float) -> Mapping[str, str]:
    """Of the environment that a worker on so many processors (0: not known) starts with: what glibc reads then alone. `${NAME}` stands for
    what the variable is where the worker starts, which is kept.

    All threads share one heap where they take turns anyway: a thread's own is in pieces too small for tensors, and who trains may be any
    of them (Ray's, and worker 0's where it is the driver too: a quarter of a step's time). Several processors would wait for each other
    at it (two for a fifth of a step): there large tensors are mapped and unmapped as ever.
    """
    shared = {"MALLOC_ARENA_MAX": "1"} if processors == 1 else {}
    return {"GLIBC_TUNABLES": f"{_WITHOUT_CACHES}:${{GLIBC_TUNABLES}}", **shared}


def start_again() -> None:
    """Have this program, which has done nothing yet, run once more from its first line with `at_start`. Returns in that second run, and
    where there is no other C library to start with, or another program to start.
    """
    glibc = hasattr(ctypes.CDLL(None), "gnu_get_libc_version")
    if not glibc or _MARK in os.environ or not sys.executable or multiprocessing.parent_process() is not None:
        return
    alone = os.environ.get("OMP_NUM_THREADS", "").strip() == "1"  # it may be a list, of nested threads
    settings = {name: os.path.expandvars(value) for name, value in at_start(1 if alone else 0).items()}
    settings["GLIBC_TUNABLES"] = settings["GLIBC_TUNABLES"].removesuffix(":${GLIBC_TUNABLES}")
    os.environ.update({_MARK: "1", **settings})
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def keep_what_is_freed() -> None:
    """From here on memory comes from the heap and stays there, unless the environment says something of it.

    NOTE: glibc alone has this, and for the one heap that it begins with (`at_start`).
    """
    library = ctypes.CDLL(None)
    tunables = os.environ.get("GLIBC_TUNABLES", "").replace(_WITHOUT_CACHES, "")
    told = any(os.environ.get(name) for name in _SETTINGS) or "glibc.malloc" in tunables
    if hasattr(library, "mallopt") and not told:
        library.mallopt(_MMAP_MAX, 0)
        library.mallopt(_TRIM_THRESHOLD, -1)


def kept_heap(device_type: str, planned: int | None) -> "Heap | None":
    """The heap of a worker that is planned to take `planned` bytes at most, and from here on keeps what is freed.

    None: it computes elsewhere than on a processor, or nobody planned what it takes. Then nothing is kept.
    """
    if device_type != "cpu" or planned is None:
        return None
    keep_what_is_freed()
    return Heap(planned)


class Heap:
    """Has the heap give back its holes where the process takes more than was planned."""

    def __init__(
        self, planned: int, resident: Callable[[], int] | None = None, trim: Callable[[], None] | None = None
    ) -> None:
        """`resident`: the bytes that the process has in memory; `trim` gives back what is free. None: this process's own."""
        self._resident = resident or resident_bytes
        self._trim = trim or _trim
        self._most = int(_ROOM * planned)

    def look(self) -> None:
        """To be called between two passes of a step. What a process needs is no hole: with more than was planned it is let be."""
        if self._resident() > self._most:
            self._trim()
            self._most = max(self._most, int(_ROOM * self._resident()))


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
