"""Where a step's time goes, and how much of the device's arithmetic it uses."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dstune.planning import hardware
from dstune.planning.cost import flops
from dstune.planning.shapes import ModelShape

_SIDE = 1024
_TRIALS = 5


class PhaseClock:
    """Seconds by phase of one step. On a GPU the time of its own queue, by events: nothing waits for them before `seconds`.

    What ZeRO sends between workers runs inside forward, backward and update, and is counted there; the engine knows how much it was.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._taken: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what happens inside towards `name`."""
        if not self._on_gpu:
            started = time.perf_counter()
            yield
            self._taken[name] += time.perf_counter() - started
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._events.append((name, begin, end))

    def seconds(self) -> dict[str, float]:
        """What each phase took."""
        for name, begin, end in self._events:
            end.synchronize()
            self._taken[name] += begin.elapsed_time(end) / 1000
        self._events.clear()
        return dict(self._taken)


@dataclass(frozen=True)
class Utilisation:
    """Of the devices' arithmetic, counted causally: recomputed passes do not count, nor does what examples in a row do not see."""

    shape: ModelShape
    peak: float
    """FLOP/s of one worker's device."""

    def mfu(self, tokens: int, squares: int, seconds: float, world_size: int) -> float:
        """`squares`: the sum of the squared lengths of all examples; `tokens` of all workers."""
        return flops(self.shape, tokens, squares, recompute=False) / (seconds * world_size * self.peak)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of `device` at best: as its maker states them for 16 bits, of a CPU as a product of two large matrices reaches them now.

    None for a GPU that nobody knows: another one's figure would say nothing. A CPU's is that of the threads that torch may use. It takes
    some hundredths of a second.
    """
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        device_known = hardware.known(found.name, found.total_memory)
        return device_known.flops if device_known else None
    one, other = (torch.ones(_SIDE, _SIDE, dtype=dtype) for _ in range(2))
    times: list[float] = []
    for _ in range(_TRIALS):
        started = time.perf_counter()
        torch.mm(one, other)
        times.append(time.perf_counter() - started)
    return 2 * _SIDE**3 / min(times)
