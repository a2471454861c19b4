"""The commit: all workers' shards durable and hashed, then one rename. A failure anywhere leaves nothing, and all workers know it."""

import hashlib
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from dstune.atomic import commit_directory, dump_json, durable_file
from dstune.checkpoint.layout import FileRecord, Manifest, tile
from dstune.checkpoint.resolve import Checkpoint, verify
from dstune.checkpoint.shard_writer import write_shard
from dstune.checkpoint.shards import StoredSlice, entries, read_header
from dstune.errors import CheckpointError, DstuneError, Problem
from dstune.loggers import get_logger
from dstune.paths import CheckpointPaths, step_directory
from dstune.protocols import Control, Slice

_log = get_logger(__name__)


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
    temporary = checkpoints / _agreed(control, "prepare", lambda: _prepare(checkpoints, step), only_first=True)[0]
    shard = CheckpointPaths(temporary).shard(control.rank, control.world_size)
    try:
        records = _agreed(control, "write", lambda: asdict(write(shard, step)))
        written = [FileRecord(**record) for record in records]
        sizes = _agreed(control, "commit", lambda: _commit(temporary, final, intent, written), only_first=True)
    except CheckpointError:
        # Every worker has left the directory: the error was agreed by all.
        if control.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return CommitRecord(step, final, sizes[0], time.monotonic() - began)


def _agreed(control: Control, act: str, work: Callable[[], Any], only_first: bool = False) -> list[Any]:
    """Each worker's (or only worker 0's) result of `work`, on all; CheckpointError on all where one raised.

    NOTE: nobody may leave alone between two collectives, or the others would wait for it: hence every exception is caught.
    """
    answer: dict[str, Any] = {}
    if control.rank == 0 or not only_first:
        try:
            answer = {"value": work()}
        except Exception as error:  # noqa: BLE001
            _log.error("checkpoint: cannot %s", act, exc_info=not isinstance(error, (OSError, DstuneError)))
            answer = {"error": _words(error), "time": time.time(), "rank": control.rank, "node": socket.gethostname()}
    answers = [control.broadcast(answer)] if only_first else control.gather(answer)
    failures = sorted((answer for answer in answers if "error" in answer), key=lambda answer: answer["time"])
    if failures:
        first = failures[0]
        where = f"checkpoint: {act}, worker {first['rank']} on {first['node']}"
        raise CheckpointError(Problem(where, first["error"], do="The checkpoints committed before are untouched."))
    return [answer["value"] for answer in answers]


def _words(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    return str(error) if isinstance(error, DstuneError) else repr(error)


def _prepare(checkpoints: Path, step: int) -> str:
    """A fresh temporary directory's name; what interrupted saves and deletions left behind is removed."""
    checkpoints.mkdir(parents=True, exist_ok=True)
    for pattern in ("step-*.tmp-*", ".step-*.deleting"):
        for leftover in checkpoints.glob(pattern):
            shutil.rmtree(leftover)
    final = step_directory(checkpoints, step)
    token = secrets.token_hex(4)
    if final.exists():
        if not verify(Checkpoint(step, final)):
            raise CheckpointError(Problem(str(final), "is committed already", "a step that was not saved yet"))
        final.rename(final.with_name(f"{final.name}.damaged-{token}"))
    temporary = final.with_name(f"{final.name}.tmp-{token}")
    temporary.mkdir()
    return temporary.name


def _commit(directory: Path, final: Path, intent: Intent, records: list[FileRecord]) -> int:
    """Worker 0's part: look at every shard, write state and manifest, rename. Returns the checkpoint's size in bytes."""
    paths = CheckpointPaths(directory)
    files: dict[str, FileRecord] = {}
    headers: list[list[StoredSlice]] = []
    for rank, record in enumerate(records):
        shard = paths.shard(rank, len(records))
        if not shard.is_file() or shard.stat().st_size != record.bytes:
            came = f"worker {rank} wrote it, worker 0 does not see it"
            raise CheckpointError(Problem(str(shard), came, "a directory that all workers share"))
        files[shard.name] = record
        headers.append(read_header(shard))
    tensors, problems = tile(entries(headers))
    if problems:
        raise CheckpointError("the workers' slices do not make whole parameters: " + "; ".join(problems[:5]))
    files[paths.state.name] = _write(paths.state, dump_json(dict(intent.state)))
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    manifest = Manifest(intent.step, len(records), now, files, tensors, intent.fingerprints, intent.metrics)
    _write(paths.manifest, manifest.dump())
    commit_directory(directory, final)
    return manifest.total_bytes


def _write(path: Path, text: str) -> FileRecord:
    content = text.encode("utf-8")
    with durable_file(path) as file:
        file.write(content)
    return FileRecord(len(content), hashlib.sha256(content).hexdigest())
