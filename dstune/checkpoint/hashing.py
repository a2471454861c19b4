"""Whole files hashed, several at once, each block while the next ones are read; past the page cache where that is asked for.

What a file holds is what the disk gives back, not what memory still knows of it, and what is only looked at should push
nothing useful out of memory. A resume wants the opposite: it reads what was verified, from memory.
"""

import contextlib
import errno
import fcntl
import hashlib
import mmap
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType

from dstune.checkpoint.layout import FileRecord
from dstune.checkpoint.pages import PAGE_BYTES, huge_pages

OnBytes = Callable[[int], None]
"""Hears how many more bytes were hashed; called from several threads."""

_BLOCK_BYTES = 4 << 20
_READS_AHEAD = 4
_MAX_FILES_AT_ONCE = 8


@dataclass(frozen=True)
class Unreadable:
    """A file that could not be read to its end."""

    reason: str
    first: int = 0
    """The bytes that did not come: from `first` up to `last`."""
    last: int = 0


def hashed(
    paths: Iterable[Path], *, past_cache: bool, on_bytes: OnBytes | None = None
) -> Iterator[FileRecord | Unreadable]:
    """Size and SHA-256 of each file, in the order of `paths`; as many at once as there are cores, up to 8.

    `past_cache`: what the disk holds (O_DIRECT; where there is none, the cached pages are dropped before and after).
    """
    paths = list(paths)
    at_once = max(1, min(len(paths), len(os.sched_getaffinity(0)), _MAX_FILES_AT_ONCE))
    stop = threading.Event()
    lanes: SimpleQueue[_Lane] = SimpleQueue()
    every = [_Lane(past_cache, on_bytes or (lambda _: None), stop) for _ in range(at_once)]

    def look(path: Path) -> FileRecord | Unreadable:
        lane = lanes.get()
        try:
            return lane.hashed(path)
        finally:
            lanes.put(lane)

    with contextlib.ExitStack() as stack:
        for lane in every:
            stack.callback(lane.close)
            lanes.put(lane)
        pool = stack.enter_context(ThreadPoolExecutor(at_once, "hashing"))
        results = [pool.submit(look, path) for path in paths]
        try:
            yield from (result.result() for result in results)
        finally:  # who asked may have stopped asking: then the files that nobody wants are not waited for
            stop.set()
            for result in results:
                result.cancel()


class _Lane:
    """Hashes one file at a time; its buffers are used again for the next."""

    def __init__(self, past_cache: bool, on_bytes: OnBytes, stop: threading.Event) -> None:
        self._past_cache, self._on_bytes, self._stop = past_cache, on_bytes, stop
        self._buffers = [huge_pages(_BLOCK_BYTES) for _ in range(_READS_AHEAD + 1)]
        self._readers = ThreadPoolExecutor(_READS_AHEAD, "reading")

    def hashed(self, path: Path) -> FileRecord | Unreadable:
        try:
            with OpenFile(path, self._past_cache) as file:
                return self._hashed(file)
        except OSError as error:
            return Unreadable(error.strerror or str(error))

    def close(self) -> None:
        self._readers.shutdown()

    def _hashed(self, file: "OpenFile") -> FileRecord | Unreadable:
        digest = hashlib.sha256()
        free = deque(self._buffers)
        offsets = deque(range(0, file.size, _BLOCK_BYTES))
        reads: deque[tuple[int, mmap.mmap, Future[memoryview]]] = deque()
        try:
            while offsets or reads:
                while free and offsets:
                    offset, buffer = offsets.popleft(), free.popleft()
                    reads.append((offset, buffer, self._readers.submit(file.read, buffer, offset)))
                offset, buffer, read = reads.popleft()
                try:
                    block = read.result()
                except OSError as error:
                    last = min(offset + _BLOCK_BYTES, file.size)
                    return Unreadable(error.strerror or str(error), offset, last)
                digest.update(block)
                self._on_bytes(len(block))
                free.append(buffer)
                if self._stop.is_set():
                    return Unreadable("interrupted", offset, file.size)
        finally:
            wait([read for _, _, read in reads])  # they write into the buffers
        return FileRecord(file.size, digest.hexdigest())


class OpenFile:
    """A file that is read in whole blocks at any offset, by several threads."""

    def __init__(self, path: Path, past_cache: bool) -> None:
        self._past_cache = past_cache
        try:
            self._descriptor = os.open(path, os.O_RDONLY | (os.O_DIRECT if past_cache else 0))
        except OSError as error:
            if error.errno != errno.EINVAL or not past_cache:
                raise
            self._descriptor = os.open(path, os.O_RDONLY)  # this file system has no O_DIRECT
        self.size = os.fstat(self._descriptor).st_size
        if past_cache:
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def read(self, buffer: mmap.mmap | memoryview, offset: int) -> memoryview:
        """Fill the buffer from `offset`, up to the file's end: what of it was filled."""
        block = memoryview(buffer)
        length = min(len(block), self.size - offset)
        done = 0
        while done < length:
            try:
                count = os.preadv(self._descriptor, [block[done:]], offset + done)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._drop_direct():
                    raise
                continue
            if count == 0:
                raise OSError(errno.EIO, f"ends at byte {offset + done}")
            done += count
            if done < length and count % PAGE_BYTES:  # the rest no longer begins at a page
                self._drop_direct()
        if self._past_cache:
            os.posix_fadvise(self._descriptor, offset, length, os.POSIX_FADV_DONTNEED)
        return block[:length]

    def _drop_direct(self) -> bool:
        """Go on through the page cache; False where that is so already."""
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        return bool(flags & os.O_DIRECT)

    def __enter__(self) -> "OpenFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)
