"""Whether files are as their records say, by their blocks' hashes: any number of threads read parts of the same file."""

import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from dstune.checkpoint.blocks import BlockHasher, Blocks
from dstune.checkpoint.hashing import OnBytes, OpenFile, Unreadable, hashed
from dstune.checkpoint.layout import FileRecord
from dstune.checkpoint.pages import huge_pages

_CACHED_READ_BYTES = 1 << 20
"""What is hashed while the core's own cache holds it."""
_DIRECT_READ_BYTES = 4 << 20
_TASK_BYTES = 32 << 20
_THREADS_PER_CORE = 2
"""One reads while the other hashes."""
_MAX_THREADS = 32

Span = tuple[int, int]
"""The bytes from the first up to the last."""


@dataclass(frozen=True)
class Changed:
    """A file's bytes are not those that were written."""

    spans: tuple[Span, ...] = ()
    """The blocks where that is so; empty where the file's record has none."""


Content = Changed | Unreadable | None
"""What is wrong with a file's bytes; None: nothing."""


def checked(
    files: Sequence[tuple[Path, FileRecord]], *, past_cache: bool, on_bytes: OnBytes | None = None
) -> Iterator[Content]:
    """What is wrong with each file of its record's size, in their order. One whose record has no blocks is hashed as a whole."""
    with _Checking(past_cache, on_bytes) as checking:
        tasks = [checking.submit(path, record) if record.block_bytes else None for path, record in files]
        whole = [path for path, record in files if not record.block_bytes]
        digests = hashed(whole, past_cache=past_cache, on_bytes=on_bytes)
        for (_, record), parts in zip(files, tasks, strict=True):
            yield compared(next(digests), record) if parts is None else _joined(part.result() for part in parts)


def compared(found: FileRecord | Unreadable, record: FileRecord) -> Content:
    """The same, of a file that was hashed as a whole."""
    if isinstance(found, Unreadable):
        return found
    return None if found.is_like(record) else Changed()


def _joined(parts: Iterator[Content]) -> Content:
    """Of one file's parts: the first that cannot be read, else all that were changed."""
    found = [part for part in parts if part is not None]
    unreadable = next((part for part in found if isinstance(part, Unreadable)), None)
    spans = [span for part in found if isinstance(part, Changed) for span in part.spans]
    return unreadable or (Changed(tuple(spans)) if spans else None)


class _Checking:
    """Threads with a buffer each, which is used again for their next part."""

    def __init__(self, past_cache: bool, on_bytes: OnBytes | None) -> None:
        self._past_cache, self._on_bytes = past_cache, on_bytes or (lambda _: None)
        self._piece = _DIRECT_READ_BYTES if past_cache else _CACHED_READ_BYTES
        self._own = threading.local()
        threads = min(_THREADS_PER_CORE * len(os.sched_getaffinity(0)), _MAX_THREADS)
        self._pool = ThreadPoolExecutor(threads, "checking")

    def submit(self, path: Path, record: FileRecord) -> list[Future[Content]]:
        blocks = Blocks(record)
        step = blocks.block_bytes * max(1, _TASK_BYTES // blocks.block_bytes)
        spans = [(first, min(first + step, record.bytes)) for first in range(0, record.bytes, step)]
        return [self._pool.submit(self._part, path, blocks, span) for span in spans]

    def _part(self, path: Path, blocks: Blocks, span: Span) -> Content:
        hasher, (at, last) = BlockHasher(blocks.block_bytes), span
        if not hasattr(self._own, "buffer"):
            self._own.buffer = memoryview(huge_pages(self._piece))
        try:
            with OpenFile(path, self._past_cache) as file:
                while at < last:
                    piece = file.read(self._own.buffer[: last - at], at)
                    hasher.update(piece)
                    self._on_bytes(len(piece))
                    at += len(piece)
        except OSError as error:
            return Unreadable(error.strerror or str(error), at, min(at + self._piece, last))
        changed = blocks.changed(span[0], hasher.finish())
        return Changed(tuple(changed)) if changed else None

    def __enter__(self) -> "_Checking":
        return self

    def __exit__(self, *_: object) -> None:
        # Who asked may have stopped asking: what nobody waits for any more is not read.
        self._pool.shutdown(cancel_futures=True)
