"""A run's checkpoints in an object store, or behind any address: uploaded whole or not there, verified, fetched, removed.

Objects carry the names that the files have on a disk (`step-00000200/shard-…`), a file above `piece_bytes` in pieces. A store has
no rename: a checkpoint is there when its manifest is, which is put last and removed first. Requests are tried again by the
client (`AWS_MAX_ATTEMPTS`); credentials come from the environment alone.
"""

import hashlib
import json
import math
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from dstune.atomic import commit_directory, dump_json, durable_file
from dstune.checkpoint.agreement import agreed
from dstune.checkpoint.audit import Finding
from dstune.checkpoint.hashing import OnBytes
from dstune.checkpoint.keeping import Found, Rules, decide, presumed, surplus
from dstune.checkpoint.layout import FileRecord, Manifest, load_manifest, read_manifest
from dstune.checkpoint.objects import BLOCK_BYTES, Objects, Unavailable
from dstune.checkpoint.resolve import Checkpoint
from dstune.checkpoint.verified import digest
from dstune.errors import CheckpointError, ConfigError, Problem
from dstune.loggers import get_logger
from dstune.paths import CheckpointPaths, step_directory, step_of
from dstune.protocols import Control

log = get_logger(__name__)

_PIECE_BYTES = 64 << 30
"""pyarrow's uploads end at 10,000 parts of 10 MiB, 98 GiB."""
_PIECE = re.compile(r"(.+)\.part-\d{5}-of-\d{5}")
_MAX_THREADS = 8
_MANIFEST = CheckpointPaths(Path()).manifest.name
_OWNER = "owner.json"


@dataclass(frozen=True)
class Published:
    """A checkpoint that is in the store now."""

    bytes: int
    """Sent now: 0 where it was there already."""
    seconds: float


class Store:
    """The checkpoints of one run behind `address`. Raises ConfigError for an address that cannot be opened here."""

    def __init__(self, address: str, piece_bytes: int = _PIECE_BYTES, owner: str | None = None) -> None:
        """`owner`: who may put checkpoints there, as `claim` wrote it; without it nobody is asked."""
        self.address = address.rstrip("/")
        self._piece_bytes, self._owner = piece_bytes, owner
        self._objects = Objects(self.address)

    def address_of(self, step: int) -> str:
        """Where a checkpoint is, as a person writes it."""
        return f"{self.address}/{_name(step)}"

    # --- what is there -----------------------------------------------------------------------------------------------

    def committed(self) -> list[int]:
        """Every step with a manifest, oldest first. Raises Unavailable."""
        return sorted(step for step, objects in self._steps().items() if _MANIFEST in objects)

    def manifest(self, step: int) -> Manifest:
        """Raises CheckpointError where it is damaged, Unavailable where it cannot be read."""
        return read_manifest(self._manifest_bytes(step), f"{self.address_of(step)}/{_MANIFEST}")

    def found(self, rules: Rules) -> list[Found]:
        """What is known of each committed step without reading shards, oldest first. Raises Unavailable."""
        found: list[Found] = []
        for step, objects in sorted(self._steps().items()):
            if _MANIFEST not in objects:
                continue
            try:
                manifest, findings = self._look(step, objects)
            except Unavailable:
                if step in self.committed():
                    raise
                continue  # another process has removed it meanwhile
            value = manifest.metrics.get(rules.best or "") if manifest else None
            found.append(Found(step, False if findings else None, value))
        return found

    def verify(self, step: int, part: slice | None = None, on_bytes: OnBytes | None = None) -> list[Finding]:
        """What is wrong with a checkpoint, by reading every byte (or those of a `part` of its files); empty where nothing is.

        Raises Unavailable.
        """
        manifest, findings = self.glance(step)
        if manifest is None or findings:
            return findings
        objects = self._steps().get(step, {})
        wanted = sorted(manifest.files)[part or slice(None)]
        keep = None if on_bytes is None else lambda block: on_bytes(len(block))
        return self._each(wanted, lambda name: self._read(manifest, name, objects, keep))

    def glance(self, step: int) -> tuple[Manifest | None, list[Finding]]:
        """The manifest, None where it cannot be used, and what shows to be wrong without reading shards. Raises Unavailable."""
        return self._look(step, self._steps().get(step, {}))

    def _look(self, step: int, objects: Mapping[str, int]) -> tuple[Manifest | None, list[Finding]]:
        try:
            manifest = self.manifest(step)
        except Unavailable:
            raise
        except CheckpointError as error:
            return None, [Finding(_MANIFEST, "changed", error.problems[0].came)]
        return manifest, _layout(manifest, step, objects)

    def stamp(self, step: int) -> str | None:
        """A hash of every object's name, size and time of change; None where the store does not tell them. Raises Unavailable."""
        found = self._objects.changes(_name(step))
        facts = {name: (size, time) for name, (size, time) in found.items() if time is not None}
        return digest(facts) if facts and len(facts) == len(found) else None

    def size(self, step: int) -> int:
        """The bytes of all its objects. Raises Unavailable."""
        return sum(self._steps().get(step, {}).values())

    def unfinished(self) -> dict[int, int]:
        """Steps of which something is there but no manifest (an upload or a removal that was cut short), and their bytes."""
        return {step: sum(found.values()) for step, found in self._steps().items() if _MANIFEST not in found}

    def probe(self) -> None:
        """Write an object and delete it. Raises ConfigError where that fails: key, bucket, endpoint, rights."""
        name = f".probe-{secrets.token_hex(8)}"
        try:
            self._objects.put(name, b"dstune may write here\n")
            self._objects.delete(name)
            self.committed()
        except Unavailable as error:
            came = f"cannot be used: {error.problems[0].came}"
            do = "Are the address, the endpoint and the credentials (environment variables) right, on every node?"
            raise ConfigError(Problem(f"checkpoint.dir: {self.address}", came, do=do)) from None

    # --- whose it is -------------------------------------------------------------------------------------------------

    def claim(self, host: str) -> None:
        """From now on `owner` alone puts checkpoints there: a run that still goes on elsewhere is refused at its next save."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self._objects.put(_OWNER, dump_json({"owner": self._owner, "host": host, "time": now}).encode("utf-8"))

    def require_ours(self) -> None:
        """Raises CheckpointError where somebody else claimed it since."""
        if self._owner is None or _OWNER not in self._objects.sizes():
            return
        written = b"".join(self._objects.blocks(_OWNER))
        try:
            found = json.loads(written)
            owner, host, taken = found["owner"], found["host"], found["time"]
        except (ValueError, KeyError, TypeError):
            owner, host, taken = None, "somebody", "a time that cannot be read"
        if owner != self._owner:
            came = f"this run was taken over by {host} (at {taken})"
            do = "Let it go on there; or move this run directory away, and `dstune train` with the run file takes it back."
            raise CheckpointError(Problem(self.address, came, do=do))

    # --- into the store ----------------------------------------------------------------------------------------------

    def publish(self, directory: Path, control: Control) -> Published:
        """Upload a checkpoint: each worker its own shard, then, when all are whole in the store, worker 0 the manifest.

        A collective call. `directory` holds the manifest and, at least, this worker's shard (on worker 0 state.json too). What a save
        that failed has left in the store is removed first. Raises CheckpointError on every worker where it fails on any: then the
        checkpoint is not in the store, and those that were there still are.
        """
        began = time.monotonic()
        if not agreed(control, "prepare the upload", lambda: self._make_room(directory), only_first=True)[0]:
            return Published(0, time.monotonic() - began)
        own = slice(control.rank, None, control.world_size)
        sent = agreed(control, "upload", lambda: self._send(directory, own))
        agreed(control, "finish the upload", lambda: self._seal(directory), only_first=True)
        return Published(sum(sent), time.monotonic() - began)

    def upload(self, directory: Path) -> None:
        """`publish` by one process that has all files of the checkpoint in `directory`. Raises CheckpointError."""
        if self._make_room(directory):
            self._send(directory, slice(None))
            self._seal(directory)

    def _make_room(self, directory: Path) -> bool:
        """Remove what is in the way; False where this very checkpoint is there already."""
        self.require_ours()
        manifest = load_manifest(directory)
        steps = self._steps()
        for step in [step for step, objects in steps.items() if _MANIFEST not in objects]:
            log.info("%s was never finished: removing it", self.address_of(step))
            self.remove(step)
        if _MANIFEST in (there := steps.get(manifest.step, {})):
            same = self._manifest_bytes(manifest.step) == CheckpointPaths(directory).manifest.read_bytes()
            if same and not _layout(manifest, manifest.step, there):
                return False
            log.warning("%s is replaced by the one that was saved now", self.address_of(manifest.step))
            self.remove(manifest.step)
        return True

    def _send(self, directory: Path, part: slice) -> int:
        """Upload this part of the files; how many bytes."""
        manifest = load_manifest(directory)
        names = sorted(manifest.files)[part]
        for name in names:
            self._upload(directory / name, manifest.step, manifest.files[name])
        return sum(manifest.files[name].bytes for name in names)

    def _upload(self, source: Path, step: int, record: FileRecord) -> None:
        """Raises CheckpointError where the file is not what its record says: what was written is not what would be kept."""
        digest, left = hashlib.sha256(), record.bytes
        pieces = max(1, math.ceil(record.bytes / self._piece_bytes))
        with source.open("rb", buffering=0) as file:
            for number in range(pieces):
                name = source.name if pieces == 1 else f"{source.name}.part-{number:05d}-of-{pieces:05d}"
                with self._objects.writing(f"{_name(step)}/{name}") as write:
                    stop = max(0, left - self._piece_bytes)
                    while left > stop and (block := file.read(min(BLOCK_BYTES, left - stop))):
                        digest.update(block)
                        write(block)
                        left -= len(block)
        if left or digest.hexdigest() != record.sha256:
            raise CheckpointError(
                Problem(str(source), "is not what was written there: its SHA-256 is not the manifest's")
            )

    def _seal(self, directory: Path) -> None:
        """Put the manifest, now that every object is seen to be there, at its full size."""
        manifest = load_manifest(directory)
        self._refuse(manifest.step, _layout(manifest, manifest.step, self._steps().get(manifest.step, {})))
        self._objects.put(f"{_name(manifest.step)}/{_MANIFEST}", CheckpointPaths(directory).manifest.read_bytes())

    # --- out of the store --------------------------------------------------------------------------------------------

    def fetch(self, step: int, checkpoints: Path) -> Checkpoint:
        """Bring a checkpoint into the directory `checkpoints`, each file's hash looked at while it comes; there whole, or not at all.

        A damaged one of the same step there is moved aside. Raises CheckpointError where what came is damaged, Unavailable.
        """
        began = time.monotonic()
        written = self._manifest_bytes(step)
        manifest = read_manifest(written, f"{self.address_of(step)}/{_MANIFEST}")
        objects = self._steps().get(step, {})
        final, token = step_directory(checkpoints, step), secrets.token_hex(4)
        temporary = final.with_name(f"{final.name}.tmp-{token}")
        self._refuse(step, _layout(manifest, step, objects))
        try:
            temporary.mkdir(parents=True)
            self._fetch_files(temporary, manifest, objects)
            with durable_file(CheckpointPaths(temporary).manifest) as file:
                file.write(written)
            if final.exists():
                final.rename(final.with_name(f"{final.name}.damaged-{token}"))
            commit_directory(temporary, final)
        except OSError as error:
            raise Unavailable(Problem(str(checkpoints), f"cannot be written: {error.strerror or error}")) from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        seconds = time.monotonic() - began
        log.info("fetched step %d from %s: %.1f MB in %.1f s", step, self.address, manifest.total_bytes / 1e6, seconds)
        return Checkpoint(step, final)

    def _fetch_files(self, directory: Path, manifest: Manifest, objects: Mapping[str, int]) -> None:
        def get(name: str) -> Finding | None:
            with durable_file(directory / name) as file:
                return self._read(manifest, name, objects, file.write)

        self._refuse(manifest.step, self._each(sorted(manifest.files), get))

    def _refuse(self, step: int, findings: Sequence[Finding]) -> None:
        if findings:
            raise CheckpointError(Problem(self.address_of(step), "; ".join(map(str, findings))))

    # --- out of the way ----------------------------------------------------------------------------------------------

    def remove(self, step: int) -> bool:
        """Remove a checkpoint, its manifest first: cut short, it is no checkpoint any more, and the next save removes the rest.

        False where another process did it meanwhile (`dstune checkpoint prune`, or the training). Raises Unavailable.
        """
        there = self._steps().get(step, {})
        try:
            if _MANIFEST in there:
                self._objects.delete(f"{_name(step)}/{_MANIFEST}")
            if there:
                self._objects.delete_below(_name(step))
        except Unavailable as error:
            if _MANIFEST in self._steps().get(step, {}):
                raise
            log.info("%s is removed by another process too: %s", self.address_of(step), error)
            return False
        return bool(there)

    def prune(self, rules: Rules, control: Control) -> list[int]:
        """Remove the committed steps that no rule keeps; returns them. A collective call.

        Nothing goes before a newer checkpoint in the store was read back whole; the workers share the reading. Raises
        CheckpointError on every worker where the store fails.
        """
        known = agreed(control, "look for old uploads", lambda: list(map(asdict, self.found(rules))), only_first=True)[
            0
        ]
        found = [Found(**one) for one in known]
        part = slice(control.rank, None, control.world_size)
        while old := surplus(decide(presumed(found), rules)):
            newest = max(one.step for one in found if one.whole is not False)
            shares = agreed(control, "read an upload back", lambda step=newest: self._problems(step, part))
            problems = [problem for share in shares for problem in share]
            if not problems:
                return agreed(control, "remove old uploads", lambda steps=old: self._remove(steps), only_first=True)[0]
            log.warning("%s is damaged and does not count: %s", self.address_of(newest), "; ".join(problems))
            found = [replace(one, whole=False) if one.step == newest else one for one in found]
        return []

    def _problems(self, step: int, part: slice) -> list[str]:
        return [str(finding) for finding in self.verify(step, part)]

    def _remove(self, steps: Iterable[int]) -> list[int]:
        return [step for step in steps if self.remove(step)]

    # --- requests ----------------------------------------------------------------------------------------------------

    def _steps(self) -> dict[int, dict[str, int]]:
        """For every step of which something is there: its objects' names and sizes."""
        steps: dict[int, dict[str, int]] = {}
        for name, size in self._objects.sizes().items():
            folder, _, file = name.rpartition("/")
            if "/" not in folder and (step := step_of(Path(folder))) is not None:
                steps.setdefault(step, {})[file] = size
        return steps

    def _read(
        self, manifest: Manifest, name: str, objects: Mapping[str, int], keep: Callable[[bytes], object] | None = None
    ) -> Finding | None:
        """Read a file's objects to the end, handing every block on; what is wrong with the bytes that came."""
        digest = hashlib.sha256()
        for piece in _pieces(name, objects):
            for block in self._objects.blocks(f"{_name(manifest.step)}/{piece}"):
                digest.update(block)
                if keep is not None:
                    keep(block)
        if digest.hexdigest() == manifest.files[name].sha256:
            return None
        return Finding(name, "changed", "its SHA-256 is not the manifest's", _workers(manifest).get(name))

    def _manifest_bytes(self, step: int) -> bytes:
        return b"".join(self._objects.blocks(f"{_name(step)}/{_MANIFEST}"))

    def _each(self, names: Iterable[str], look: Callable[[str], Finding | None]) -> list[Finding]:
        """What `look` says of each file, where it says something; several at a time."""
        with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
            return [said for said in pool.map(look, names) if said]


def _name(step: int) -> str:
    return step_directory(Path(), step).name


def _layout(manifest: Manifest, step: int, objects: Mapping[str, int]) -> list[Finding]:
    """The manifest is of another step or names other files than a checkpoint has; objects that are missing, cut or foreign."""
    findings: list[Finding] = []
    if manifest.step != step:
        findings.append(Finding(_MANIFEST, "foreign", f"is of step {manifest.step}"))
    workers = _workers(manifest)
    expected = {*workers, CheckpointPaths(Path()).state.name}
    if expected != set(manifest.files):
        findings.append(Finding(_MANIFEST, "inconsistent", f"names {sorted(manifest.files)}"))
    for name in sorted({_file_of(name) for name in objects} - expected - {_MANIFEST}):
        findings.append(Finding(name, "foreign", "does not belong to this checkpoint"))
    for name, record in sorted(manifest.files.items()):
        pieces = _pieces(name, objects)
        size, worker = sum(objects[piece] for piece in pieces), workers.get(name)
        if not pieces:
            findings.append(Finding(name, "missing", "is missing", worker))
        elif size != record.bytes:
            findings.append(Finding(name, "size", f"{size} bytes instead of {record.bytes}", worker))
    return findings


def _workers(manifest: Manifest) -> dict[str, int]:
    """Which worker's shard each name is."""
    paths = CheckpointPaths(Path())
    return {paths.shard(rank, manifest.world_size).name: rank for rank in range(manifest.world_size)}


def _file_of(name: str) -> str:
    """The file that an object is, or is a piece of."""
    match = _PIECE.fullmatch(name)
    return match.group(1) if match else name


def _pieces(name: str, objects: Mapping[str, int]) -> list[str]:
    """The objects of a file, in order; none where one is missing."""
    if name in objects:
        return [name]
    found = sorted(piece for piece in objects if _file_of(piece) == name)
    count = int(found[0].rpartition("-of-")[2]) if found else 0
    expected = [f"{name}.part-{number:05d}-of-{count:05d}" for number in range(count)]
    return expected if found == expected else []
