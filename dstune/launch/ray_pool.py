"""Preparing data on the CPUs of a Ray cluster: the same work on chunk after chunk, results in the order of the chunks.

Only the chunks' bytes and the tokens travel; nothing is decided on the cluster and no file is written there, so the directory is the
same, byte for byte, as one prepared on a laptop. A node that is lost costs its chunks in flight, which are done again elsewhere.
"""

import contextlib
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from dstune.config.schema import RunConfig
from dstune.data import pool
from dstune.data.prepare import Mapper, Report, prepare
from dstune.data.shards import Prepared
from dstune.errors import Problem, RunFailed, UsageError, first_line

S = TypeVar("S")
T = TypeVar("T")
R = TypeVar("R")

_IN_FLIGHT = 2
"""Chunks a worker that are waiting or worked on."""
_CONNECT_SECONDS = 10
_FREE_SECONDS = 10.0
_RETRIES = 3
"""Of a chunk whose node was lost."""


def prepared_where_asked(config: RunConfig, base: Path, progress: Report | None = None) -> Prepared:
    """`data.prepare.prepare`, done where `data.workers` says. Raises what it raises, UsageError where the cluster is not there."""
    return prepare(config, base, progress, _mapper(config))


def _mapper(config: RunConfig) -> Mapper:
    if config.data.workers == "local":
        return pool.map_in_order
    address = config.cluster.address

    def mapper(
        setup: Callable[[S], Callable[[T], R]], argument: S, chunks: Iterable[T], num_processes: int
    ) -> Generator[R, None, None]:
        # Without `data.num_processes` every CPU of the cluster: what this machine has says nothing of it.
        return map_in_order(setup, argument, chunks, config.data.num_processes, address)

    return mapper


def map_in_order(
    setup: Callable[[S], Callable[[T], R]],
    argument: S,
    chunks: Iterable[T],
    num_workers: int | None = None,
    address: str | None = None,
) -> Generator[R, None, None]:
    """`pool.map_in_order` over Ray actors of one CPU each: `num_workers` of them, by default as many as there are free CPUs.

    `address`: the cluster's; None: RAY_ADDRESS, else a Ray of this process's own. Raises UsageError where it is not there, RunFailed
    where its workers are lost again and again.
    """
    import ray
    from ray.exceptions import RayError

    with _connected(address):
        free = _free_cpus()
        count = min(num_workers or free, free)
        if count < 1:
            came = "no free CPU in the Ray cluster"
            raise RunFailed(Problem("data.workers", came, "at least one", "Wait, or `data.workers: local`."))
        shared = ray.put((setup, argument))
        remote = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=_RETRIES)(_Worker)
        workers = [remote.remote(shared) for _ in range(count)]
        try:
            yield from _in_order(workers, iter(chunks))
        except RayError as error:
            raise RunFailed(
                Problem("data.workers", f"the Ray cluster lost the preparation: {first_line(error)}")
            ) from error
        finally:
            for worker in workers:
                ray.kill(worker)


def _free_cpus() -> int:
    """Of the cluster; not until some seconds after what used them is gone does it say that they are free."""
    import ray

    pause, end = threading.Event(), time.monotonic() + _FREE_SECONDS
    while (free := int(ray.available_resources().get("CPU", 0))) < 1 and time.monotonic() < end:
        pause.wait(0.2)
    return free


def _in_order(workers: list[Any], chunks: Iterator[T]) -> Generator[Any, None, None]:
    import ray

    waiting: deque[Any] = deque()
    for number, chunk in enumerate(chunks):
        waiting.append(workers[number % len(workers)].work.remote(chunk))
        if len(waiting) > _IN_FLIGHT * len(workers):
            yield pool.opened(ray.get(waiting.popleft()))
    while waiting:
        yield pool.opened(ray.get(waiting.popleft()))


@contextlib.contextmanager
def _connected(address: str | None) -> Iterator[None]:
    """A connection to the cluster, ended afterwards unless it was there before."""
    import ray

    if ray.is_initialized():
        yield
        return
    where = address or os.environ.get("RAY_ADDRESS")
    _require_listener(where)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "WARNING"}
    try:
        if where:
            ray.init(address=where, **quiet)
        else:
            ray.init(include_dashboard=False, _node_ip_address="127.0.0.1", **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        do = "Is the cluster up, and RAY_AUTH_TOKEN set? `data.workers: local` prepares here."
        raise UsageError(Problem(f"Ray at {where or 'this machine'}", first_line(error), do=do)) from error
    try:
        yield
    finally:
        ray.shutdown()


def _require_listener(where: str | None) -> None:
    """Raises UsageError where nobody listens at `host:port`: Ray itself would try for minutes."""
    host, _, port = (where or "").removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
    except OSError as error:
        do = "Is the cluster up? `data.workers: local` prepares here."
        raise UsageError(Problem(f"Ray at {where}", str(error), do=do)) from error


class _Worker:
    """One CPU of the cluster."""

    def __init__(self, shared: tuple[Callable[[Any], Callable[[Any], Any]], Any]) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self._worker = pool.Worker(*shared)

    def work(self, chunk: Any) -> pool.Answer:
        return self._worker.answer(chunk)
