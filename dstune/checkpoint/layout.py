"""What a checkpoint is on disk: its manifest, and the rule that its slices tile every parameter exactly."""

import hashlib
import json
import math
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dstune.atomic import dump_json
from dstune.errors import CheckpointError, Problem
from dstune.paths import CheckpointPaths

FORMAT = "dstune-checkpoint"
VERSION = 1
_MAX_MANIFEST_BYTES = 1 << 30
MIN_BLOCK_BYTES = 256 << 10
HASH_DIGITS = 16
"""Of a block, in hexadecimal (`blocks.py`)."""


@dataclass(frozen=True)
class FileRecord:
    """One file of a checkpoint as it was written."""

    bytes: int
    sha256: str
    block_bytes: int = 0
    """Length of the blocks that have hashes of their own (`blocks.py`); 0: none have."""
    block_hashes: str = ""
    """One after the other."""

    def is_like(self, other: "FileRecord") -> bool:
        """Whether both are of the same bytes."""
        return (self.bytes, self.sha256) == (other.bytes, other.sha256)


@dataclass(frozen=True)
class SliceEntry:
    """One stored slice: elements `offset` to `offset + length` of the flattened parameter `name` of `shape`."""

    state: str
    name: str
    shape: tuple[int, ...]
    offset: int
    length: int


@dataclass(frozen=True)
class Part:
    """Elements `first` up to `last` of a flattened parameter in one state."""

    state: str
    name: str
    first: int
    last: int

    def __str__(self) -> str:
        return f"{self.state}/{self.name}[{self.first}:{self.last}]"


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`, written last. Holds nothing about ZeRO: any layout reads it."""

    step: int
    world_size: int
    """Workers that wrote it, and so the number of shards."""
    time: str
    """UTC, ISO 8601."""
    files: Mapping[str, FileRecord]
    """Every file but the manifest itself, by name."""
    tensors: Mapping[str, Mapping[str, tuple[int, ...]]]
    """For each state, every parameter's whole shape."""
    fingerprints: Mapping[str, Any]
    """What the run, model and data were (the caller's words)."""
    metrics: Mapping[str, float]
    """Measured at this step (`loss`, …), for `checkpoint.best`."""

    def dump(self) -> str:
        """The file's text. Its last field is a hash of all the others, so that a flipped bit shows here too."""
        content = {"format": FORMAT, "version": VERSION} | asdict(self)
        return dump_json(content | {"sha256": _digest(content)})

    @property
    def total_bytes(self) -> int:
        return sum(record.bytes for record in self.files.values())


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8")).hexdigest()


def load_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint. Raises CheckpointError where it is missing, damaged or of another version."""
    path = CheckpointPaths(directory).manifest
    try:
        return read_manifest(_file_content(path), str(path))
    except FileNotFoundError:
        raise CheckpointError(Problem(str(path), "is missing")) from None
    except OSError as error:
        raise CheckpointError(Problem(str(path), f"cannot be read: {error}")) from None


def _file_content(path: Path) -> bytes:
    """Raises OSError; also for what is no file (a pipe would keep its reader waiting for ever, a device never ends)."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError("is no file")
        if found.st_size > _MAX_MANIFEST_BYTES:
            raise OSError(f"{found.st_size} bytes are no manifest")
        return file.read()


def read_manifest(written: bytes, where: str) -> Manifest:
    """The manifest whose file, at `where`, holds `written`. Raises CheckpointError where it is damaged or of another version."""
    try:
        return _read(written.decode("utf-8"), where)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(Problem(where, f"cannot be read: {error}")) from None


def _read(text: str, where: str) -> Manifest:
    content = json.loads(text)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(Problem(where, "is no manifest of a dstune checkpoint"))
    if content.get("version") != VERSION:
        raise CheckpointError(Problem(where, f"version {content.get('version')!r}", f"version {VERSION}"))
    stated = content.pop("sha256", None)
    if stated != _digest(content) or text != dump_json(content | {"sha256": stated}):
        raise CheckpointError(Problem(where, "its content does not match its own hash: it is damaged"))
    try:
        return _parse(content)
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"it is not what dstune writes: {error!r}") from None


def _parse(content: Mapping[str, Any]) -> Manifest:
    """A right hash says that it came as it was written, not that dstune wrote it: nothing is believed that others rely on."""
    files = {_plain(name): _record(one) for name, one in content["files"].items()}
    return Manifest(
        step=_count(content["step"]),
        world_size=_count(content["world_size"], 1, len(files)),
        time=_text(content["time"]),
        files=files,
        tensors={
            state: {name: tuple(map(_count, shape)) for name, shape in shapes.items()}
            for state, shapes in content["tensors"].items()
        },
        fingerprints=dict(content["fingerprints"].items()),
        metrics={name: _finite(value) for name, value in content["metrics"].items()},
    )


def _record(one: Mapping[str, Any]) -> FileRecord:
    """A checkpoint of before block hashes has none."""
    num_bytes, block, hashes = (
        _count(one["bytes"]),
        _count(one.get("block_bytes", 0)),
        _text(one.get("block_hashes", "")),
    )
    if block and (block < MIN_BLOCK_BYTES or len(hashes) != -(-num_bytes // block) * HASH_DIGITS):
        raise ValueError(f"{len(hashes)} digits of hashes for {num_bytes} bytes in blocks of {block}")
    return FileRecord(num_bytes, _text(one["sha256"]), block, hashes)


def _count(value: Any, least: int = 0, most: int = 2**63 - 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{value!r} is no number from {least} to {most}")
    return value


def _finite(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no number")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    return value


def _plain(name: str) -> str:
    """A file's name that leads nowhere else."""
    if name in ("", "..") or name != Path(name).name or "\0" in name:
        raise ValueError(f"{name!r} is no name of a file")
    return name


def tile(entries: Iterable[SliceEntry]) -> tuple[dict[str, dict[str, tuple[int, ...]]], list[str]]:
    """The whole shapes by state and name, and what keeps the slices from covering each parameter exactly once.

    [0, 4) and [4, 10) tile a parameter of 10 elements; [0, 4) and [5, 10) leave a gap at 4; [0, 5) and [4, 10) overlap.
    """
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    problems: list[str] = []
    for (state, name), parts in _by_tensor(entries).items():
        shapes.setdefault(state, {})[name] = parts[0].shape
        if any(part.shape != parts[0].shape for part in parts):
            problems.append(f"{state}/{name}: shards disagree about its shape")
            continue
        reached = 0
        for part in parts:
            if part.offset != reached:
                word = "is missing" if part.offset > reached else "is there twice"
                problems.append(f"{state}/{name}: element {min(part.offset, reached)} {word}")
            reached = max(reached, part.offset + part.length)
        if reached != math.prod(parts[0].shape):
            problems.append(f"{state}/{name}: {reached} of {math.prod(parts[0].shape)} elements")
    return shapes, problems


def gaps(tensors: Mapping[str, Mapping[str, tuple[int, ...]]], entries: Iterable[SliceEntry]) -> Iterator[Part]:
    """What of `tensors` (whole shapes by state and name) is in none of the slices."""
    by_tensor = _by_tensor(entries)
    for state, shapes in tensors.items():
        for name, shape in shapes.items():
            reached = 0
            for part in by_tensor.get((state, name), []):
                if part.offset > reached:
                    yield Part(state, name, reached, part.offset)
                reached = max(reached, part.offset + part.length)
            if reached < math.prod(shape):
                yield Part(state, name, reached, math.prod(shape))


def _by_tensor(entries: Iterable[SliceEntry]) -> dict[tuple[str, str], list[SliceEntry]]:
    """The slices of each parameter's states, in the order of their offsets."""
    found: dict[tuple[str, str], list[SliceEntry]] = {}
    for entry in entries:
        found.setdefault((entry.state, entry.name), []).append(entry)
    return {key: sorted(parts, key=lambda part: part.offset) for key, parts in found.items()}
