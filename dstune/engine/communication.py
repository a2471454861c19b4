"""How long a worker stands still for collectives: what of them no computation hides.

All of DeepSpeed's collectives go through one object of its own, its backend. `timed` puts a clock before it: counted is the time
inside those that block, and, of those that go on behind the computation, the time for which somebody waits for them. Where
DeepSpeed gathers and reduces on GPU streams beside the computation's (`overlap_comm`), the computation waits for the streams
instead: `watch` counts that. What torch.compile or DeepCompile put into a graph goes past the backend, and is not counted.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from dstune.engine.exchange import DirectBackend
from dstune.engine.partitions import is_bf16_class

_COLLECTIVES = (
    "all_gather", "all_gather_coalesced", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_reduce_coalesced",
    "all_to_all", "all_to_all_single", "barrier", "broadcast", "broadcast_object_list", "gather", "inference_all_reduce",
    "irecv", "isend", "monitored_barrier", "recv", "reduce", "reduce_scatter", "reduce_scatter_tensor", "scatter", "send",
)  # fmt: skip


class Clock(Protocol):
    """Sums up intervals. These three are the whole of its surface."""

    def begin(self) -> Any:
        """What `end` wants."""
        ...

    def end(self, begun: Any) -> None:
        """Count the time since `begun`, which `begin` gave."""
        ...

    def seconds(self) -> float:
        """Everything so far."""
        ...


class HostClock:
    """Of the calling thread, where the computation is on the CPU."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def begin(self) -> float:
        return time.perf_counter()

    def end(self, begun: float) -> None:
        self._seconds += time.perf_counter() - begun

    def seconds(self) -> float:
        return self._seconds


class QueueClock:
    """Of the stream on which a GPU computes, by events in it: nothing waits for them before `seconds`.

    What happens on another stream does not hold up the computation, and is not counted. NOTE: timing events in NCCL's own streams
    would keep it from going on beside the computation (pytorch#143890); here are none.
    """

    def __init__(self, device: torch.device) -> None:
        self._queue = torch.cuda.default_stream(device)
        self._open: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._seconds = 0.0

    def begin(self, stream: torch.Stream | None = None) -> torch.cuda.Event | None:
        """`stream`: the one that may have to wait; None: the current one."""
        return self._mark() if (stream or torch.cuda.current_stream()) == self._queue else None

    def end(self, begun: torch.cuda.Event | None) -> None:
        if begun is None:
            return
        self._open.append((begun, self._mark()))
        while self._open[0][1].query():
            self._count(*self._open.popleft())
            if not self._open:
                return

    def seconds(self) -> float:
        while self._open:
            begin, end = self._open.popleft()
            end.synchronize()
            self._count(begin, end)
        return self._seconds

    def _mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._queue)
        return event

    def _count(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> None:
        self._seconds += begin.elapsed_time(end) / 1000


class TimedBackend:
    """A backend of DeepSpeed's, `clock` before its collectives; everything else is its own."""

    def __init__(self, backend: Any, clock: Clock, more: Sequence[str] = ()) -> None:
        """`more`: names of collectives that DeepSpeed's backends lack."""
        self._backend, self.clock = backend, clock
        for name in (*_COLLECTIVES, *more):
            setattr(self, name, _timed(getattr(backend, name), clock))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


class _Handle:
    """A collective under way. Waiting for it is counted, what it does meanwhile is not."""

    def __init__(self, work: Any, clock: Clock) -> None:
        self._work, self._clock = work, clock

    def wait(self, *arguments: Any, **options: Any) -> Any:
        begun = self._clock.begin()
        result = self._work.wait(*arguments, **options)
        self._clock.end(begun)
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _timed(collective: Callable[..., Any], clock: Clock) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        begun = clock.begin()
        result = collective(*arguments, **options)
        if hasattr(result, "wait"):
            return _Handle(result, clock)
        clock.end(begun)
        return result

    return call


def timed(device: torch.device) -> Clock:
    """The clock before the collectives of this process, which computes on `device`; the first call puts it there.

    After `World.init` alone. Between CPUs they become those of `exchange`.
    """
    from deepspeed.comm import comm

    if not isinstance(comm.cdb, TimedBackend):
        if device.type == "cuda":
            comm.cdb = TimedBackend(comm.cdb, QueueClock(device))
        else:
            comm.cdb = TimedBackend(DirectBackend(comm.cdb), HostClock(), ["mean_of_pieces"])
    return comm.cdb.clock


def collectives() -> Any:
    """What to call in place of `torch.distributed`, by the same names, for collectives of our own that shall count."""
    import deepspeed.comm

    return deepspeed.comm


def watch(zero: Any, stage: int, clock: Clock) -> None:
    """Count what the computation waits for the streams beside it on which `zero`, DeepSpeed's optimizer, lets collectives run."""
    if not isinstance(clock, QueueClock):
        return
    for holder, attribute in streams(zero, stage):
        stream = getattr(holder, attribute)
        if stream == torch.cuda.default_stream(stream.device):
            continue
        same = {name: getattr(stream, name) for name in ("stream_id", "device_index", "device_type")}
        watched = WatchedStream(**same)
        watched.clock = clock
        setattr(holder, attribute, watched)


def streams(zero: Any, stage: int) -> list[tuple[Any, str]]:
    """Where `zero` keeps them: objects and names of attributes. On a CPU there are none, and the attributes are None.

    DeepSpeed's class for ZeRO-1 in bf16 has none at all: it sums its gradients where they are computed.
    """
    if stage < 3:
        return [] if is_bf16_class(zero) else [(zero, "reduction_stream")]
    gathering = (zero.parameter_offload.param_coordinator, "_PartitionedParameterCoordinator__allgather_stream")
    return [gathering, (zero, "reduce_and_partition_stream")]


class WatchedStream(torch.cuda.Stream):
    """A stream that counts for how long others wait for it."""

    clock: QueueClock

    def record_event(self, event: Any = None) -> Any:
        """What `wait_stream` of another stream asks for, and then waits for."""
        if event is None:
            event = _WatchedEvent()
            event.clock = self.clock
        return super().record_event(event)

    def synchronize(self) -> None:
        begun = self.clock.begin()
        super().synchronize()
        self.clock.end(begun)


class _WatchedEvent(torch.cuda.Event):
    clock: QueueClock

    def wait(self, stream: Any = None) -> None:
        begun = self.clock.begin(stream)
        super().wait(stream)
        self.clock.end(begun)
