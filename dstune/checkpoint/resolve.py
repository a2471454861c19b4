"""Which checkpoints exist, which are whole, and which is the newest whole one. No pointer file is ever read."""

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from dstune.checkpoint.layout import FileRecord, Manifest, load_manifest, tile
from dstune.checkpoint.shards import entries, read_header
from dstune.errors import CheckpointError, Problem
from dstune.loggers import get_logger
from dstune.paths import CheckpointPaths, step_of

log = get_logger(__name__)

_HASH_BLOCK_BYTES = 8 << 20
_MAX_THREADS = 8


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint: a directory with a final name. Whether it is whole is `verify`'s to say."""

    step: int
    directory: Path


def committed(checkpoints: Path) -> list[Checkpoint]:
    """Every directory with a committed checkpoint's name, oldest step first."""
    if not checkpoints.is_dir():
        return []
    found = [
        Checkpoint(step, path)
        for path in checkpoints.iterdir()
        if (step := step_of(path)) is not None and path.is_dir()
    ]
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def verify(checkpoint: Checkpoint) -> list[str]:
    """What is wrong with a checkpoint, each with the file's name; empty where every byte is as it was written.

    Nothing is parsed before its hash was right, the manifest's own included.
    """
    try:
        manifest = load_manifest(checkpoint.directory)
    except CheckpointError as error:
        return [str(error)]
    problems = _naming_problems(checkpoint, manifest)
    problems += file_problems(checkpoint.directory, manifest, manifest.files)
    return problems or _content_problems(checkpoint, manifest)


def newest_whole(checkpoints: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint in which nothing is wrong, and why each newer one was passed over."""
    passed_over: list[str] = []
    for checkpoint in reversed(committed(checkpoints)):
        problems = verify(checkpoint)
        if not problems:
            return checkpoint, passed_over
        passed_over.append(f"{checkpoint.directory.name} passed over: {'; '.join(problems)}")
    return None, passed_over


def file_problems(directory: Path, manifest: Manifest, names: Iterable[str], from_disk: bool = False) -> list[str]:
    """Files among `names` that are missing, cut or changed. `from_disk`: past the page cache, where the system can."""

    def look(name: str) -> str | None:
        try:
            return _file_problem(directory / name, manifest.files[name], from_disk)
        except OSError as error:
            return f"{name}: {error.strerror or error}"

    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
        return [problem for problem in pool.map(look, sorted(names)) if problem]


def _file_problem(path: Path, record: FileRecord, from_disk: bool) -> str | None:
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if size != record.bytes:
            return f"{path.name}: {size} bytes instead of {record.bytes}"
        if from_disk:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        digest = hashlib.sha256()
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return None if digest.hexdigest() == record.sha256 else f"{path.name}: its SHA-256 is not the manifest's"


def _naming_problems(checkpoint: Checkpoint, manifest: Manifest) -> list[str]:
    """The manifest belongs to this step, and names exactly the shards that there are."""
    there = {path.name for path in checkpoint.directory.glob("*.safetensors")}
    return naming_problems(manifest, checkpoint.step, there)


def naming_problems(manifest: Manifest, step: int, there: Iterable[str]) -> list[str]:
    """Where the manifest is of another step, names other files than a checkpoint has, or `there` are more than it names."""
    problems: list[str] = []
    if manifest.step != step:
        problems.append(f"manifest.json: is of step {manifest.step}")
    paths = CheckpointPaths(Path())
    expected = {paths.shard(rank, manifest.world_size).name for rank in range(manifest.world_size)}
    expected.add(paths.state.name)
    if expected != set(manifest.files):
        problems.append(f"manifest.json: names {sorted(manifest.files)}")
    return problems + [f"{name}: does not belong to this checkpoint" for name in sorted(set(there) - expected)]


def _content_problems(checkpoint: Checkpoint, manifest: Manifest) -> list[str]:
    """The shards, now known to be the ones that were written, hold every element that the manifest promises."""
    paths = CheckpointPaths(checkpoint.directory)
    try:
        headers = [read_header(paths.shard(rank, manifest.world_size)) for rank in range(manifest.world_size)]
    except CheckpointError as error:
        return [str(error)]
    shapes, problems = tile(entries(headers))
    if shapes != manifest.tensors:
        problems.append("manifest.json: names other tensors than the shards hold")
    return problems


def choose(checkpoints: Path, wanted: str, metric: str | None) -> Checkpoint:
    """The checkpoint that `wanted` names: a step, `newest` (whole), or `best` by `metric` (the lowest). It is whole.

    Raises CheckpointError where there is none such, or it is damaged.
    """
    where = str(checkpoints)
    if wanted == "newest":
        newest, passed_over = newest_whole(checkpoints)
        if newest is None:
            raise CheckpointError(Problem(where, "; ".join(passed_over) or "nothing is committed"))
        for reason in passed_over:
            log.warning("%s; step %d is the newest whole one", reason, newest.step)
        return newest
    found = committed(checkpoints)
    if wanted == "best":
        values = [(load_manifest(one.directory).metrics.get(metric or "loss"), one) for one in found]
        known = [(value, -one.step, one) for value, one in values if value is not None]
        if not known:
            raise CheckpointError(
                Problem(where, f"no checkpoint has a value of {metric or 'loss'!r}", "a validation set")
            )
        chosen = min(known)[2]
    else:
        steps = [one for one in found if str(one.step) == wanted]
        if not steps:
            known_steps = ", ".join(str(one.step) for one in found) or "none"
            raise CheckpointError(Problem(where, f"no committed step {wanted!r}", f"one of: {known_steps}"))
        chosen = steps[0]
    if problems := verify(chosen):
        raise CheckpointError(Problem(str(chosen.directory), "; ".join(problems)))
    return chosen
