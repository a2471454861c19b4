"""The commit: all workers' shards durable and hashed, then one rename. A failure anywhere leaves nothing, and all workers know it."""

import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dstune.atomic import commit_directory, dump_json, durable_file, remove_tree
from dstune.checkpoint import owner
from dstune.checkpoint.agreement import agreed
from dstune.checkpoint.layout import FileRecord, Manifest, SliceEntry, load_manifest, tile
from dstune.checkpoint.resolve import Checkpoint, verify
from dstune.checkpoint.shard_writer import write_shard
from dstune.checkpoint.shards import entries, read_header
from dstune.errors import CheckpointError, Problem
from dstune.paths import CheckpointPaths, step_directory
from dstune.protocols import Control, Slice


@dataclass(frozen=True)
class CommitRecord:
    """A checkpoint that now exists."""

    step: int
    directory: Path
    bytes: int
    seconds: float


WriteShard = Callable[[Path, int], FileRecord]


@dataclass(frozen=True)
class Intent:
    """What is committed beside the shards: worker 0's is written."""

    step: int
    state: Mapping[str, Any]
    fingerprints: Mapping[str, Any]
    metrics: Mapping[str, float]


def save(
    checkpoints: Path,
    step: int,
    slices: Iterable[Slice],
    state: Mapping[str, Any],
    control: Control,
    fingerprints: Mapping[str, Any],
    metrics: Mapping[str, float] | None = None,
) -> CommitRecord:
    """`commit` of these slices, from where they are."""
    intent = Intent(step, state, fingerprints, metrics or {})
    return commit(checkpoints, intent, lambda path, step: write_shard(path, slices, step), control)


def commit(checkpoints: Path, intent: Intent, write: WriteShard, control: Control) -> CommitRecord:
    """Commit the training state of a step: `write(path, step)` writes this worker's shard. A collective call.

    Raises CheckpointError on every worker where it fails on any (the earliest cause, with its worker); the
    temporary directory is gone then, and what was committed before is untouched.
    """
    began = time.monotonic()
    step = intent.step
    final = step_directory(checkpoints, step)
    temporary = checkpoints / agreed(control, "prepare", lambda: _prepare(checkpoints, step), only_first=True)[0]
    shard = CheckpointPaths(temporary).shard(control.rank, control.world_size)
    try:
        records = agreed(control, "write", lambda: asdict(write(shard, step)))
        written = [FileRecord(**record) for record in records]
        sizes = agreed(control, "commit", lambda: _commit(temporary, final, intent, written), only_first=True)
    except CheckpointError:
        # Every worker has left the directory: the error was agreed by all.
        if control.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return CommitRecord(step, final, sizes[0], time.monotonic() - began)


def _prepare(checkpoints: Path, step: int) -> str:
    """A fresh temporary directory's name; what interrupted saves and deletions left behind is removed."""
    checkpoints.mkdir(parents=True, exist_ok=True)
    for pattern in ("step-*.tmp-*", ".step-*.deleting"):
        for leftover in checkpoints.glob(pattern):
            remove_tree(leftover)
    final = step_directory(checkpoints, step)
    token = secrets.token_hex(4)
    if os.path.lexists(final):
        if not verify(Checkpoint(step, final)):
            raise CheckpointError(Problem(str(final), "is committed already", "a step that was not saved yet"))
        final.rename(final.with_name(f"{final.name}.{_what_it_is(checkpoints, final)}-{token}"))
    temporary = final.with_name(f"{final.name}.tmp-{token}")
    temporary.mkdir()
    return temporary.name


def _what_it_is(checkpoints: Path, found: Path) -> str:
    """Damaged ones are tidied away later; another run's checkpoint is not ours to delete."""
    try:
        return "foreign" if owner.strange(checkpoints, load_manifest(found).fingerprints) else "damaged"
    except CheckpointError:
        return "damaged"


def _commit(directory: Path, final: Path, intent: Intent, records: list[FileRecord]) -> int:
    """Worker 0's part: look at every shard, write state and manifest, rename. Returns the checkpoint's size in bytes."""
    paths = CheckpointPaths(directory)
    held: list[SliceEntry] = []
    for rank, record in enumerate(records):
        shard = paths.shard(rank, len(records))
        if not shard.is_file() or shard.stat().st_size != record.bytes:
            came = f"worker {rank} wrote it, worker 0 does not see it"
            raise CheckpointError(Problem(str(shard), came, "a directory that all workers share"))
        held += entries([read_header(shard)])
    manifest = seal(directory, intent, records, held)
    commit_directory(directory, final)
    return manifest.total_bytes


def seal(directory: Path, intent: Intent, records: Sequence[FileRecord], held: Iterable[SliceEntry]) -> Manifest:
    """Write state and manifest beside the shards, whose `records` come by rank and which hold the slices `held`.

    Raises CheckpointError where the slices leave gaps or overlap.
    """
    paths = CheckpointPaths(directory)
    tensors, problems = tile(held)
    if problems:
        raise CheckpointError("the workers' slices do not make whole parameters: " + "; ".join(problems[:5]))
    files = {paths.shard(rank, len(records)).name: record for rank, record in enumerate(records)}
    files[paths.state.name] = _write(paths.state, dump_json(dict(intent.state)))
    now = datetime.now(UTC).isoformat(timespec="seconds")
    manifest = Manifest(intent.step, len(records), now, files, tensors, intent.fingerprints, intent.metrics)
    _write(paths.manifest, manifest.dump())
    return manifest


def _write(path: Path, text: str) -> FileRecord:
    content = text.encode("utf-8")
    with durable_file(path) as file:
        file.write(content)
    return FileRecord(len(content), hashlib.sha256(content).hexdigest())
