"""Processes that do the same work on chunk after chunk, results in the order of the chunks.

Plain child processes with pipes rather than `multiprocessing`: that one runs the caller's main module again in every child, so a
notebook or a script without a `__main__` guard could not call `dstune.prepare`. A child ends when its pipe does, so none
outlives a parent that was killed.
"""

import contextlib
import gc
import importlib
import itertools
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar

from dstune.errors import DstuneError, Problem, RunFailed

S = TypeVar("S")
T = TypeVar("T")
R = TypeVar("R")

_LENGTH_BYTES = 8
_IN_FLIGHT = 2
"""Chunks a process that are waiting or worked on: memory stays bounded however slow the reader of the results is."""
_INLINE_CHUNKS = 8
"""So little work is done here, in less time than a process needs to start."""
_CHILD = "import os, sys; sys.path[:] = sys.argv[1].split(os.pathsep); from dstune.data.pool import serve; serve(sys.argv[2:])"
"""The parent's import path and no other: with `-c` the working directory would come first, and a `json.py` there be imported."""


GC_THRESHOLDS = (100_000, 20, 20)
"""For a process that does nothing but prepare: it makes few cycles, and looking for them costs a tenth of its start."""

_spares: "list[_Child]" = []


@contextlib.contextmanager
def started(num_processes: int, modules: Sequence[str]) -> Iterator[None]:
    """Inside, so many children are there and import `modules` before there is work; those that nobody takes are ended."""
    try:
        _spares.extend(_Child(modules) for _ in range(num_processes))
        yield
    finally:
        while _spares:
            child = _spares.pop()
            child.kill()
            child.release()


def map_in_order(
    setup: Callable[[S], Callable[[T], R]], argument: S, chunks: Iterable[T], num_processes: int
) -> Generator[R, None, None]:
    """`setup(argument)` gives the work, in each process anew; yields its result for each of `chunks`, in their order.

    `setup` is a function of a module, and what goes in and out can be pickled. With one process, or a few chunks, all happens
    here. An exception of the work is raised in its turn, and so is one of `chunks`, after the results of what came before it.
    """
    source = iter(chunks)
    first, failure = _take(source, _INLINE_CHUNKS)
    if num_processes == 1 or len(first) < _INLINE_CHUNKS or failure is not None:
        work = setup(argument)
        yield from map(work, first)
        if failure is not None:
            raise failure
        yield from map(work, source)
        return
    with contextlib.closing(_Pool(setup, argument, num_processes)) as pool:
        yield from pool.map(itertools.chain(first, source))


def _take(source: Iterator[T], count: int) -> tuple[list[T], DstuneError | None]:
    """Up to `count` items, and what ended them early if that was an error for the user."""
    taken: list[T] = []
    try:
        for item in itertools.islice(source, count):
            taken.append(item)
    except DstuneError as error:
        return taken, error
    return taken, None


Answer = tuple[str, Any]
"""What a worker sends back: (`result`, it), (`refused`, an error for the user) or (`failed`, a traceback)."""


class Worker:
    """The work of one process, wherever it runs: made with its first chunk, and nothing that it raises ends it."""

    def __init__(self, setup: Callable[[S], Callable[[Any], Any]], argument: S) -> None:
        self._make: Callable[[], Callable[[Any], Any]] = lambda: setup(argument)
        self._work: Callable[[Any], Any] | None = None

    def answer(self, chunk: Any) -> Answer:
        """The result for `chunk`, or what went wrong; `opened` takes it apart."""
        try:
            if self._work is None:
                self._work = self._make()
            return "result", self._work(chunk)
        except DstuneError as error:
            return "refused", error
        except Exception:  # noqa: BLE001 (`opened` raises it again, with this traceback)
            return "failed", traceback.format_exc()


def opened(answer: Answer) -> Any:
    """The result in an answer. Raises the error for the user, or RuntimeError with the traceback, that stands in its place."""
    kind, value = answer
    if kind == "result":
        return value
    if kind == "refused":
        raise value
    raise RuntimeError(f"in a preparing process:\n{value}")


class _Pool(Generic[T, R]):
    """Children that start when there is work for them, and a thread for each that feeds it."""

    def __init__(self, setup: Callable[[S], Callable[[T], R]], argument: S, num_processes: int) -> None:
        self._greeting = pickle.dumps((setup, argument), pickle.HIGHEST_PROTOCOL)
        self._num_processes = num_processes
        self._threads = ThreadPoolExecutor(num_processes, thread_name_prefix="prepare")
        self._idle: queue.SimpleQueue[_Child] = queue.SimpleQueue()
        self._children: list[_Child] = []
        self._guard = threading.Lock()
        self._closed = False

    def map(self, chunks: Iterable[T]) -> Iterator[R]:
        waiting: deque[Future[R]] = deque()
        failure: DstuneError | None = None
        source = iter(chunks)
        while failure is None:
            taken, failure = _take(source, 1)
            if not taken:
                break
            waiting.append(self._threads.submit(self._call, taken[0]))
            if len(waiting) > _IN_FLIGHT * self._num_processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
        if failure is not None:
            raise failure

    def close(self) -> None:
        """End every child at once; chunks that were not asked for are dropped."""
        with self._guard:
            self._closed = True
            children = list(self._children)
        for child in children:
            child.kill()
        self._threads.shutdown(cancel_futures=True)
        for child in children:
            child.release()

    def _call(self, chunk: T) -> R:
        child = self._child()
        answer = child.ask(chunk)
        self._idle.put(child)
        return opened(answer)

    def _child(self) -> "_Child":
        with contextlib.suppress(queue.Empty):
            return self._idle.get_nowait()
        with self._guard:
            if self._closed:
                raise RunFailed("the preparation was ended")
            child = _spares.pop() if _spares else _Child()
            self._children.append(child)
        child.greet(self._greeting)
        return child


class _Child:
    """One child process: pickled messages to its input and from its output, each behind its length."""

    def __init__(self, modules: Sequence[str] = ()) -> None:
        imports = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, imports, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._to: Any = self._process.stdin
        self._from: Any = self._process.stdout
        self._greeting: bytes | None = None

    def greet(self, greeting: bytes) -> None:
        """What the child is told before its first message."""
        self._greeting = greeting

    def ask(self, message: Any) -> tuple[str, Any]:
        """Send a message and wait for the answer. Raises RunFailed where the child is gone."""
        try:
            if self._greeting is not None:
                _send(self._to, self._greeting)
                self._greeting = None
            _send(self._to, pickle.dumps(message, pickle.HIGHEST_PROTOCOL))
            return pickle.loads(_receive(self._from))
        except (BrokenPipeError, EOFError) as error:
            code = self._process.wait()
            came = f"a preparing process ended by signal {-code}" if code < 0 else f"a preparing process ended ({code})"
            do = "Signal 9 is mostly a lack of memory: set `data.num_processes` lower."
            raise RunFailed(Problem("data", came, do=do if code == -signal.SIGKILL else "")) from error

    def kill(self) -> None:
        self._process.kill()

    def release(self) -> None:
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            self._to.close()
        self._from.close()


def _send(pipe: BinaryIO, message: bytes) -> None:
    pipe.write(len(message).to_bytes(_LENGTH_BYTES, "little"))
    pipe.write(message)
    pipe.flush()


def _receive(pipe: BinaryIO) -> bytes:
    """The next message. Raises EOFError where the other side is gone."""
    length = int.from_bytes(_read(pipe, _LENGTH_BYTES), "little")
    return _read(pipe, length)


def _read(pipe: BinaryIO, count: int) -> bytes:
    content = pipe.read(count)
    if len(content) < count:
        raise EOFError("the pipe ended")
    return content


def serve(modules: Sequence[str]) -> None:
    """A child's whole life. What the work prints goes to stderr: stdout is the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.set_threshold(*GC_THRESHOLDS)
    incoming, outgoing = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    for name in modules:
        importlib.import_module(name)
    with contextlib.suppress(EOFError, BrokenPipeError):
        worker = Worker(*pickle.loads(_receive(incoming)))
        while True:
            answer = worker.answer(pickle.loads(_receive(incoming)))
            _send(outgoing, pickle.dumps(answer, pickle.HIGHEST_PROTOCOL))
