"""Writing one worker's shard, again and again over a run: from a copy in host memory, or piece by piece from the engine itself."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from dstune.checkpoint.direct import BLOCK_BYTES, HashedFile, Staging
from dstune.checkpoint.host_memory import HostMemory
from dstune.checkpoint.layout import FileRecord
from dstune.checkpoint.shards import ShardLayout
from dstune.errors import CheckpointError, Problem
from dstune.protocols import Slice

_CHECKED_ELEMENTS = 4 << 20


class ShardWriter:
    """Writes what `slices()` gives, always the same pieces in the same order. Size and SHA-256 are of what was handed to the disk.

    Every writing method raises CheckpointError where an element is not finite (such a state is never committed) and OSError
    where the disk fails.
    """

    def __init__(self, slices: Callable[[], Iterable[Slice]], pinned: bool = False) -> None:
        self._slices = slices
        self._pinned = pinned
        self._layout = ShardLayout(slices())
        self._copy: HostMemory | None = None

    @property
    def num_bytes(self) -> int:
        """The shard's size, and what a copy of it takes in host memory."""
        return self._layout.num_bytes

    def reserve(self) -> None:
        """Have the memory for copies."""
        self._copy = self._copy or HostMemory(self.num_bytes, self._pinned)

    def copy(self) -> None:
        """Copy every slice into host memory, where `write` finds it. What stood there before is gone."""
        self.reserve()
        assert self._copy is not None
        begin = self._layout.data_start
        with _to_the_end(self._slices()) as slices:
            for piece, end in zip(slices, self._layout.ends, strict=True):
                self._copy.tensor[begin:end].copy_(_as_bytes(piece.tensor), non_blocking=self._pinned)
                begin = end
        if self._pinned:
            torch.cuda.synchronize()

    def write(self, path: Path, step: int) -> FileRecord:
        """The last `copy` as the shard of `step`, flushed."""
        assert self._copy is not None, "nothing was copied"
        begin = self._layout.data_start
        self._copy.tensor[:begin].numpy()[:] = memoryview(self._layout.head(step))
        for key, dtype, end in zip(self._layout.keys, self._layout.dtypes, self._layout.ends, strict=True):
            _require_finite(key, _typed(self._copy.tensor[begin:end], dtype))
            begin = end
        with HashedFile(path, self.num_bytes) as file:
            file.write(self._copy.view, self.num_bytes)
            return file.finish()

    def stream(self, path: Path, step: int) -> FileRecord:
        """The slices as they are now as the shard of `step`, flushed: takes no memory to speak of, and the training waits."""
        with (
            _to_the_end(self._slices()) as slices,
            HashedFile(path, self.num_bytes) as file,
            Staging(file) as staging,
        ):
            staging.put(torch.frombuffer(bytearray(self._layout.head(step)), dtype=torch.uint8))
            for key, piece in zip(self._layout.keys, slices, strict=True):
                _require_finite(key, piece.tensor.detach())
                for part in _as_bytes(piece.tensor).split(BLOCK_BYTES):
                    staging.put(part)
            staging.flush()
            return file.finish()


def write_shard(path: Path, slices: Iterable[Slice], step: int) -> FileRecord:
    """Write and flush one shard, once. Raises as `ShardWriter` does."""
    kept = list(slices)
    return ShardWriter(lambda: kept).stream(path, step)


@contextlib.contextmanager
def _to_the_end(slices: Iterable[Slice]) -> Iterator[Iterator[Slice]]:
    """NOTE: what a worker gives others for their slices it gives as it comes to its own: they would wait for one that stops before."""
    left = iter(slices)
    try:
        yield left
    finally:
        deque(left, maxlen=0)


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(torch.uint8)


def _typed(raw: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Bytes of the file as elements; a copy where they do not stand at a multiple of an element's size."""
    aligned = raw.data_ptr() % dtype.itemsize == 0
    return (raw if aligned else raw.clone()).view(dtype)


def _require_finite(key: str, tensor: torch.Tensor) -> None:
    """A sum is finite only where every element is; where it is not, it may also have been too large."""
    if not tensor.is_floating_point():
        return
    for part in tensor.split(_CHECKED_ELEMENTS):
        if not torch.isfinite(part.sum()) and not torch.isfinite(part).all():
            raise CheckpointError(Problem(key, "holds NaN or infinity", "finite numbers"))
