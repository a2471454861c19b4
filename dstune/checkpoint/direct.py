"""Files written past the page cache, in order; what a checkpoint holds is hashed while it is written."""

import errno
import fcntl
import hashlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch

from dstune.checkpoint.blocks import BlockHasher, block_bytes_for
from dstune.checkpoint.host_memory import HostMemory
from dstune.checkpoint.layout import FileRecord
from dstune.checkpoint.pages import whole_pages

BLOCK_BYTES = 32 << 20
"""Written at once: long enough for a disk's full speed, short enough to hash and write by turns."""
_HASHED_BYTES = 256 << 10
"""Hashed twice while the core's own cache holds it."""


class Sink(Protocol):
    """What takes a file's bytes in order."""

    def write(self, memory: memoryview, length: int) -> None:
        """Append the first `length` bytes. `memory` begins at a page and reaches to the end of the last one; all calls but the
        last have whole pages."""
        ...


class DirectFile:
    """A `Sink`. Where the file system has no O_DIRECT it writes through the page cache."""

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        try:
            self._descriptor = os.open(path, flags | os.O_DIRECT, 0o644)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._descriptor = os.open(path, flags, 0o644)
        self._path = path
        self.size = 0

    def write(self, memory: memoryview, length: int) -> None:
        self._put(memory[: whole_pages(length)], self.size)
        self.size += length

    def finish(self) -> None:
        """Cut off what the last page had too much, and flush to the disk."""
        os.ftruncate(self._descriptor, self.size)
        os.fsync(self._descriptor)

    def _put(self, block: memoryview, offset: int) -> None:
        done = 0
        while done < len(block):
            try:
                done += os.pwrite(self._descriptor, block[done:], offset + done)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._drop_direct():
                    error.filename = error.filename or str(self._path)
                    raise
            else:
                if done < len(block):  # the rest no longer begins at a page
                    self._drop_direct()

    def _drop_direct(self) -> bool:
        """Go on through the page cache; False where that is so already."""
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        return bool(flags & os.O_DIRECT)

    def __enter__(self) -> "DirectFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)


class HashedFile:
    """A `Sink` over a direct file: one thread hashes what another hands to the disk. `num_bytes`: how long it will be."""

    def __init__(self, path: Path, num_bytes: int = 0) -> None:
        self._file = DirectFile(path)
        self._digest = hashlib.sha256()
        self._block_bytes = block_bytes_for(num_bytes)
        self._blocks = BlockHasher(self._block_bytes)
        self._writer = ThreadPoolExecutor(1, "shard-writer")

    def write(self, memory: memoryview, length: int) -> None:
        for first in range(0, length, BLOCK_BYTES):
            last = min(first + BLOCK_BYTES, length)
            written = self._writer.submit(self._file.write, memory[first : whole_pages(last)], last - first)
            self._hash(memory[first:last])
            written.result()

    def finish(self) -> FileRecord:
        """Flush to the disk."""
        self._file.finish()
        return FileRecord(self._file.size, self._digest.hexdigest(), self._block_bytes, self._blocks.finish())

    def _hash(self, memory: memoryview) -> None:
        for first in range(0, len(memory), _HASHED_BYTES):
            part = memory[first : first + _HASHED_BYTES]
            self._digest.update(part)
            self._blocks.update(part)

    def __enter__(self) -> "HashedFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.shutdown()
        self._file.__exit__(kind, error, trace)


class Staging:
    """Two blocks by turns: one is filled while the other is written (and hashed)."""

    def __init__(self, file: Sink) -> None:
        self._file = file
        self._blocks = [HostMemory(BLOCK_BYTES), HostMemory(BLOCK_BYTES)]
        self._filled = 0
        self._writing: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, "shard-staging")

    def put(self, part: torch.Tensor) -> None:
        """Append uint8 `part`, at most a block."""
        room = BLOCK_BYTES - self._filled
        for piece in (part[:room], part[room:]):
            if len(piece):
                self._blocks[0].tensor[self._filled : self._filled + len(piece)].copy_(piece)
                self._filled += len(piece)
            if self._filled == BLOCK_BYTES:
                self.flush_block()

    def flush_block(self) -> None:
        """Begin to write what was filled, once the block before it is written."""
        self._wait()
        self._writing = self._thread.submit(self._file.write, self._blocks[0].view, self._filled)
        self._blocks.reverse()
        self._filled = 0

    def flush(self) -> None:
        """Write all that was put."""
        self.flush_block()
        self._wait()

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()

    def __enter__(self) -> "Staging":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()
