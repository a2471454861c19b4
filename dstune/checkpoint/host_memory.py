"""Host memory for copies of training state: page-aligned, so that files are written straight from it, and kept to be used again."""

from pathlib import Path

import torch

from dstune.checkpoint.pages import huge_pages
from dstune.errors import RunFailed

_MEMINFO = Path("/proc/meminfo")
_CGROUPS = Path("/sys/fs/cgroup")


class HostMemory:
    """Memory of `num_bytes` and what is missing to a whole page; `pinned`: a GPU copies into it without a stop on the way."""

    def __init__(self, num_bytes: int, pinned: bool = False) -> None:
        self._map = huge_pages(num_bytes)
        size = len(self._map)
        self.tensor = torch.frombuffer(self._map, dtype=torch.uint8)
        """uint8 [whole pages]"""
        if pinned and (status := int(torch.cuda.cudart().cudaHostRegister(self.tensor.data_ptr(), size, 0))) != 0:
            raise RunFailed(f"{size} bytes of host memory could not be pinned for checkpoints: CUDA error {status}")

    @property
    def view(self) -> memoryview:
        """The same bytes, for files and hashes."""
        return memoryview(self._map)


def available_bytes() -> int:
    """What this process may still take: the machine's available memory, or less where its control group has a limit."""
    lines = dict(line.split(":", 1) for line in _MEMINFO.read_text(encoding="ascii").splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    return min([free, *_left_in_groups()])


def _left_in_groups() -> list[int]:
    """What each control group (version 2) around this process leaves, its page cache counted as free."""
    try:
        own = Path("/proc/self/cgroup").read_text(encoding="utf-8").rpartition("::")[2].strip().lstrip("/")
    except OSError:
        return []
    left: list[int] = []
    for group in [_CGROUPS / own, *(_CGROUPS / own).parents]:
        try:
            limit = (group / "memory.max").read_text(encoding="ascii").strip()
            used = int((group / "memory.current").read_text(encoding="ascii"))
            stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
        except (OSError, ValueError):
            continue
        if limit != "max":
            left.append(int(limit) - used + int(stat.get("inactive_file", 0)))
    return left
