"""What counts as standing still for a collective, on a CPU and on a GPU's queue. With two workers: test_zero.py."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dstune.engine import communication
from dstune.engine.communication import HostClock, QueueClock, TimedBackend, WatchedStream

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a GPU")


class Time:
    """Stands still where nobody moves it."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Backend:
    """Every collective takes a second to start, and two more until it is done. One that is called with `async_op` goes on by itself."""

    name = "torch"

    def __init__(self, time: Time) -> None:
        self.time = time

    def is_initialized(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        return self.collective

    def collective(self, tensor: Any, async_op: bool = False) -> Any:
        self.time.now += 1
        ready = self.time.now + 2

        def wait() -> str:
            self.time.now = max(self.time.now, ready)
            return f"{tensor} is there"

        return SimpleNamespace(wait=wait, is_completed=lambda: self.time.now >= ready) if async_op else wait()


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    time = Time()
    monkeypatch.setattr(communication, "time", time)
    return time


@pytest.mark.parametrize("name", ["all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce", "all_to_all_single"])
def test_a_collective_that_blocks_counts_from_end_to_end(time: Time, name: str) -> None:
    backend = TimedBackend(Backend(time), HostClock())
    assert getattr(backend, name)("it") == "it is there"
    time.now += 10
    assert getattr(backend, name)(tensor="it") == "it is there"
    assert backend.clock.seconds() == 6


def test_one_that_goes_on_behind_counts_once_where_it_is_waited_for(time: Time) -> None:
    backend = TimedBackend(Backend(time), HostClock())
    handle = backend.all_reduce("it", async_op=True)
    assert backend.clock.seconds() == 0 and not handle.is_completed()
    time.now += 0.5
    assert handle.wait() == handle.wait() == "it is there"
    assert backend.clock.seconds() == 1.5
    hidden = backend.all_reduce("it", async_op=True)
    time.now += 100
    hidden.wait()
    assert backend.clock.seconds() == 1.5


def test_all_else_is_the_backends_own(time: Time) -> None:
    backend = TimedBackend(Backend(time), HostClock())
    assert backend.name == "torch" and backend.is_initialized() and backend.clock.seconds() == 0


class Queue:
    """A GPU's stream: what is put in is there at the moment `now`, and is done where `done` has come."""

    now = 0.0
    done = 0.0


class Event:
    """Of torch.cuda: knows when the queue came to it."""

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing

    def record(self, stream: Queue) -> None:
        self.queue, self.at = stream, stream.now

    def query(self) -> bool:
        return self.queue.done >= self.at

    def synchronize(self) -> None:
        self.queue.done = max(self.queue.done, self.at)

    def elapsed_time(self, end: "Event") -> float:
        assert self.query() and end.query(), "asked of an event that the queue has not reached"
        return 1000 * (end.at - self.at)


def test_a_gpu_counts_what_its_queue_stands_still_and_waits_only_to_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    queue, beside = Queue(), Queue()
    current = [queue]
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: queue)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[0])
    clock = QueueClock(torch.device("cuda", 0))

    def interval(seconds: float, *stream: Any) -> None:
        begun = clock.begin(*stream)
        queue.now += seconds
        clock.end(begun)

    interval(1.0)
    queue.now += 10
    interval(0.5)
    assert queue.done == 0 and len(clock._open) == 2
    queue.done = queue.now
    interval(0.25)
    assert len(clock._open) == 1, "what is done is not kept until somebody asks"
    current[0] = beside
    interval(100.0)
    assert clock.seconds() == 1.75 and queue.done < queue.now
    interval(0.25, queue)
    assert clock.seconds() == 2.0


@needs_gpu
def test_on_a_gpu_waiting_for_a_stream_beside_counts() -> None:
    device = torch.device("cuda", 0)
    clock, beside = QueueClock(device), WatchedStream()
    beside.clock = clock
    torch.cuda.synchronize()
    for wait in (lambda: torch.cuda.current_stream().wait_stream(beside), beside.synchronize):
        before = clock.seconds()
        with torch.cuda.stream(beside):
            torch.cuda._sleep(200_000_000)
        wait()
        assert clock.seconds() - before > 0.02
        with torch.cuda.stream(beside):
            torch.cuda._sleep(200_000_000)
            torch.cuda.current_stream().synchronize()
        before = clock.seconds()
        wait()
        assert clock.seconds() - before < 0.01
