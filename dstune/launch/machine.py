"""What this machine has: its memory, and its GPUs as their driver names them, without torch."""

import contextlib
import os
import subprocess
from functools import cache
from typing import NamedTuple

_SECONDS = 20.0


class Gpu(NamedTuple):
    """One GPU of this machine."""

    name: str
    memory: int
    """Bytes."""


@cache
def gpus() -> tuple[Gpu, ...]:
    """The GPUs that `nvidia-smi` lists; none where there is no such program or driver."""
    words = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
        listed = subprocess.run(words, capture_output=True, text=True, check=True, timeout=_SECONDS).stdout
        return tuple(_gpu(line) for line in listed.splitlines() if line.strip())
    return ()


def _gpu(line: str) -> Gpu:
    name, _, mebibytes = line.rpartition(",")
    return Gpu(name.strip(), int(mebibytes) << 20)


def memory_bytes() -> int:
    """Main memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
