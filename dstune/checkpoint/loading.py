"""Loading a checkpoint into the workers' engines: each checks what it reads, and all know where one could not."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from dstune.checkpoint.reader import Reader
from dstune.errors import CheckpointError, DamagedCheckpoint, Problem
from dstune.protocols import Control, Slice

T = TypeVar("T")


class Loading:
    """One worker's part. A collective: build it, have `fill` called for every slice, `settle`, and only then use what was read.

    The constructor and `settle` raise on every worker where one failed: DamagedCheckpoint where bytes are not what was
    written or do not come, CheckpointError where the model has other parameters.
    """

    def __init__(self, directory: Path, control: Control) -> None:
        self._directory, self._control = directory, control
        self._failure: CheckpointError | None = None
        reader = self._tried(lambda: _opened(directory))
        self.settle()
        assert reader is not None
        self.reader = reader

    def fill(self, piece: Slice) -> None:
        """`Reader.fill`; nothing any more behind a failure, so that the engines' own collectives are come to by all."""
        self.read(lambda: self.reader.fill(piece))

    def fill_weights(self, piece: Slice) -> None:
        """`Reader.fill_weights`, likewise."""
        self.read(lambda: self.reader.fill_weights(piece))

    def read(self, work: Callable[[], None]) -> None:
        """What else is read of the checkpoint, likewise."""
        if self._failure is None:
            self._tried(work)

    def settle(self) -> None:
        """Hear how the others fared."""
        failure = self._failure
        words = {"message": str(failure), "damaged": isinstance(failure, DamagedCheckpoint)} if failure else None
        heard = self._control.gather(words)
        failed = [(rank, one) for rank, one in enumerate(heard) if one is not None]
        if failed:
            rank, first = failed[0]
            kind = DamagedCheckpoint if any(one["damaged"] for _, one in failed) else CheckpointError
            raise kind(f"worker {rank}: {first['message']}")

    def _tried(self, work: Callable[[], T]) -> T | None:
        try:
            return work()
        except CheckpointError as error:
            self._failure = error
        except OSError as error:
            came = f"cannot be read: {error.strerror or error}"
            self._failure = DamagedCheckpoint(Problem(str(error.filename or self._directory), came))
        return None


def _opened(directory: Path) -> Reader:
    reader = Reader(directory)
    _ = reader.state  # read now, that all may know whether it is whole
    return reader
