"""What several benchmarks measure alike: ratios round by round, this machine's rate of large products, a process's memory."""

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Ours over theirs, round by round: the median, the least and the most."""
    each = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    return {"median": round(statistics.median(each), 4), "least": round(each[0], 4), "most": round(each[-1], 4)}


def wait_for(tensor: torch.Tensor) -> None:
    """Until the device has done what was asked of it."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def product_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large square product on the threads that torch may use, the best of some."""
    size = 8192 if device == "cuda" else 2048
    square = torch.empty(size, size, dtype=dtype, device=device).normal_()
    best = 1e9
    for _ in range(50 if device == "cuda" else 5):  # a GPU that was idle takes a while to its full clock
        wait_for(square)
        started = time.perf_counter()
        square @ square
        wait_for(square)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def memory_bytes(key: str, process: int | str = "self") -> int:
    """A line of a process's status, such as `VmHWM` or `RssAnon`; 0 for a process that has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 0)
