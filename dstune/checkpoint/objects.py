"""What lies below an address, as a few requests: list, read, write, delete. Nothing here knows checkpoints."""

import contextlib
import posixpath
from collections.abc import Callable, Iterator

from pyarrow import fs

from dstune import places
from dstune.errors import CheckpointError, Problem, first_line

BLOCK_BYTES = 8 << 20
"""Of one read, and of one write."""
_BLOCKS_UNDER_WAY = 8
"""An upload waits for those that it has sent: memory stays at so many blocks, however slow the network."""


class Unavailable(CheckpointError):
    """The store, or this disk, does not do what it is asked now: nothing is known of the checkpoint."""


class Objects:
    """The objects below `address`, named by their paths from there. Every method raises Unavailable where the request fails.

    Raises ConfigError for an address that cannot be opened here.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        there = places.filesystem(address)
        self._system, self._root = there.system, there.path
        self._holds_objects = self._system.type_name in ("s3", "gcs")

    def sizes(self) -> dict[str, int]:
        """Every object's size in bytes."""
        return {name: info.size for name, info in self._below("").items()}

    def changes(self, folder: str) -> dict[str, tuple[int, int | None]]:
        """Size and time of change (nanoseconds; None where the store does not say) of every object below `folder`."""
        return {name: (info.size, info.mtime_ns) for name, info in self._below(folder).items()}

    def _below(self, folder: str) -> dict[str, fs.FileInfo]:
        with self._asking():
            if isinstance(self._system, fs.PyFileSystem):
                self._system.handler.fs.invalidate_cache()
            selector = fs.FileSelector(self._path(folder).rstrip("/"), allow_not_found=True, recursive=True)
            found = self._system.get_file_info(selector)
        start = len(self._root.strip("/")) + 1
        return {info.path.strip("/")[start:]: info for info in found if info.type == fs.FileType.File}

    def blocks(self, name: str) -> Iterator[bytes]:
        """An object's bytes, in blocks."""
        with self._asking():
            stream = self._system.open_input_stream(self._path(name), compression=None)
        with stream:
            while True:
                with self._asking():
                    block = stream.read(BLOCK_BYTES)
                if not block:
                    return
                yield block

    def put(self, name: str, content: bytes) -> None:
        """Write a small one whole: an object is there when it was sent to its end, a file elsewhere needs a rename for that."""
        written = name if self._holds_objects else f"{name}.tmp"
        with self.writing(written) as write:
            write(content)
        if written != name:
            with self._asking():
                self._system.move(self._path(written), self._path(name))

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Callable[[bytes], None]]:
        """Write an object block by block. It is whole when the context was left without an error."""
        with self._asking():
            if not self._holds_objects:
                self._system.create_dir(posixpath.dirname(self._path(name)), recursive=True)
            stream = self._system.open_output_stream(self._path(name), compression=None)
        written = 0

        def write(block: bytes) -> None:
            nonlocal written
            with self._asking():
                stream.write(block)
                written += 1
                if written % _BLOCKS_UNDER_WAY == 0:
                    stream.flush()

        try:
            yield write
        except BaseException:
            with contextlib.suppress(OSError):  # the first error is the one to tell
                stream.close()
            raise
        with self._asking():
            stream.close()

    def delete(self, name: str) -> None:
        with self._asking():
            self._system.delete_file(self._path(name))

    def delete_below(self, folder: str) -> None:
        """Delete every object whose name begins with `folder/`."""
        with self._asking():
            self._system.delete_dir(self._path(folder))

    def _path(self, name: str) -> str:
        return posixpath.join(self._root, name)

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        try:
            with places.as_os_errors():
                yield
        except OSError as error:
            do = "Is the network there, and are the credentials still good?"
            raise Unavailable(Problem(self._address, first_line(error), do=do)) from None
