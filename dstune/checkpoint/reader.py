"""Reading a committed checkpoint for any world: just the elements that are asked for, whichever shards hold them."""

import hashlib
import json
import math
from collections.abc import Mapping
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dstune.checkpoint.blocks import Blocks
from dstune.checkpoint.layout import FileRecord, Manifest, load_manifest
from dstune.checkpoint.shards import LastBlock, OpenShard, StoredSlice, read_header
from dstune.errors import CheckpointError, DamagedCheckpoint, Problem
from dstune.paths import CheckpointPaths
from dstune.protocols import MODEL_STATES, WEIGHTS, Slice


class Reader:
    """One checkpoint, open. What it gives was checked while it was read, by the hashes of the blocks that it stands in.

    Raises DamagedCheckpoint where a byte is not what was written, and CheckpointError where manifest and files do not fit
    together. A checkpoint without such hashes has to be verified first (`resolve`), and is not looked at again.
    """

    def __init__(self, directory: Path, weights: str = WEIGHTS) -> None:
        """`weights`: the state that is meant where the master weights are asked for (`ema`: their average)."""
        self.directory = directory
        self._weights = weights
        self.manifest: Manifest = load_manifest(directory)
        self._paths = CheckpointPaths(directory)
        self._last_block = LastBlock()
        self._open: dict[Path, OpenShard] = {}
        self._index: dict[tuple[str, str], list[tuple[Path, StoredSlice]]] = {}
        for rank in range(self.manifest.world_size):
            self._index_shard(self._paths.shard(rank, self.manifest.world_size))
        for parts in self._index.values():
            parts.sort(key=lambda part: part[1].entry.offset)

    @property
    def step(self) -> int:
        return self.manifest.step

    @cached_property
    def state(self) -> dict[str, Any]:
        """`state.json`: everything that is no tensor. Raises DamagedCheckpoint where it is not what was written."""
        content, record = self._paths.state.read_bytes(), self.manifest.files[self._paths.state.name]
        if not record.is_like(FileRecord(len(content), hashlib.sha256(content).hexdigest())):
            raise DamagedCheckpoint(Problem(str(self._paths.state), "is damaged: it is not what was written"))
        state = json.loads(content)
        if state.get("step", self.step) != self.step:
            raise DamagedCheckpoint(Problem(str(self._paths.state), f"is of step {state['step']}", f"step {self.step}"))
        return state

    def tensors(self, state: str) -> Mapping[str, tuple[int, ...]]:
        """Every parameter's name and whole shape in `state` (`fp32`, `exp_avg`, …). Raises CheckpointError for no such state."""
        state = self._meant(state)
        if state not in self.manifest.tensors:
            raise self._missing(state, f"is not there; it holds {', '.join(self.manifest.tensors)}")
        return self.manifest.tensors[state]

    def read(self, state: str, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements `start` to `stop` (default: all) of a flattened parameter: a 1-D CPU tensor of the stored dtype."""
        parts = self._parts(state, name)
        stop = math.prod(self.tensors(state)[name]) if stop is None else stop
        out = torch.empty(stop - start, dtype=parts[0][1].dtype)
        self.read_into(state, name, start, out)
        return out

    def read_into(self, state: str, name: str, start: int, out: torch.Tensor) -> None:
        """Fill the 1-D tensor `out` from element `start` of the flattened parameter on. Raises CheckpointError for a gap."""
        stop = start + out.numel()
        reached = start
        for path, piece in self._parts(state, name):
            first = max(reached, piece.entry.offset)
            last = min(stop, piece.entry.offset + piece.entry.length)
            if first != reached or first >= last:
                continue
            self._opened(path).copy(piece, first - piece.entry.offset, out[first - start : last - start])
            reached = last
        if reached != stop:
            raise self._missing(f"{state}/{name}", f"element {reached} is in no shard")

    def fill(self, piece: Slice) -> None:
        """Write a slice of the engine (`Engine.load` calls this for each). Raises CheckpointError where the model differs."""
        shape = self.tensors(piece.state).get(piece.name)
        if shape != tuple(piece.shape):
            came = "is not there" if shape is None else f"has shape {list(shape)}"
            raise self._missing(f"{piece.state}/{piece.name}", came, f"shape {list(piece.shape)}, as the model has")
        self.read_into(piece.state, piece.name, piece.offset, piece.tensor)

    @property
    def has_weights_alone(self) -> bool:
        """Whether it was saved without the optimizer's states."""
        return WEIGHTS in self.manifest.tensors and set(self.manifest.tensors) <= set(MODEL_STATES)

    def fill_weights(self, piece: Slice) -> None:
        """As `fill`, but slices of the optimizer's states stay as they are."""
        if piece.state in MODEL_STATES:
            self.fill(piece)

    def _index_shard(self, path: Path) -> None:
        record = self.manifest.files.get(path.name)
        if record is None or not path.is_file() or path.stat().st_size != record.bytes:
            raise DamagedCheckpoint(Problem(str(path), "is missing or not as long as the manifest says"))
        with closing(self._shard(path)) as shard:
            shard.check_header()
        for piece in read_header(path):
            self._index.setdefault((piece.entry.state, piece.entry.name), []).append((path, piece))

    def _meant(self, state: str) -> str:
        return self._weights if state == WEIGHTS else state

    def _parts(self, state: str, name: str) -> list[tuple[Path, StoredSlice]]:
        state = self._meant(state)
        if (state, name) not in self._index:
            raise self._missing(f"{state}/{name}", "is not there")
        return self._index[state, name]

    def _opened(self, path: Path) -> OpenShard:
        if path not in self._open:
            self._open[path] = self._shard(path)
        return self._open[path]

    def _shard(self, path: Path) -> OpenShard:
        record = self.manifest.files[path.name]
        return OpenShard(path, Blocks(record) if record.block_bytes else None, self._last_block)

    def _missing(self, what: str, came: str, expected: str = "") -> CheckpointError:
        return CheckpointError(Problem(f"{self.directory}: {what}", came, expected))
