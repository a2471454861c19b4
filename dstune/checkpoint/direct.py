"""A file written past the page cache and hashed while it is written: one thread hashes what another hands to the disk."""

import errno
import fcntl
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from dstune.checkpoint.host_memory import whole_pages
from dstune.checkpoint.layout import FileRecord

BLOCK_BYTES = 32 << 20
"""Written at once: long enough for a disk's full speed, short enough to hash and write by turns."""


class HashedFile:
    """Takes a file's bytes in order. Where the file system has no O_DIRECT it writes through the page cache."""

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        try:
            self._descriptor = os.open(path, flags | os.O_DIRECT, 0o644)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._descriptor = os.open(path, flags, 0o644)
        self._path = path
        self._digest = hashlib.sha256()
        self._size = 0
        self._writer = ThreadPoolExecutor(1, "shard-writer")

    def write(self, memory: memoryview, length: int) -> None:
        """Append the first `length` bytes. `memory` begins at a page and reaches to the end of the last one; all calls but the
        last have whole pages."""
        for first in range(0, length, BLOCK_BYTES):
            last = min(first + BLOCK_BYTES, length)
            written = self._writer.submit(self._put, memory[first : whole_pages(last)], self._size)
            self._digest.update(memory[first:last])
            self._size += last - first
            written.result()

    def finish(self) -> FileRecord:
        """Cut off what the last page had too much, and flush to the disk."""
        os.ftruncate(self._descriptor, self._size)
        os.fsync(self._descriptor)
        return FileRecord(self._size, self._digest.hexdigest())

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

    def __enter__(self) -> "HashedFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.shutdown()
        os.close(self._descriptor)
