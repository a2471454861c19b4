"""A run's checkpoints in an object store, or behind any address: uploaded whole or not there, verified, fetched, removed.

Objects carry the names that the files have on a disk (`step-00000200/shard-…`), a file above `piece_bytes` in pieces. A store has
no rename: a checkpoint is there when its manifest is, which is put last and removed first. Requests are tried again by the
client (`AWS_MAX_ATTEMPTS`); credentials come from the environment alone.
"""

import contextlib
import hashlib
import math
import os
import posixpath
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pyarrow import fs

from dstune import places
from dstune.atomic import commit_directory, durable_file
from dstune.checkpoint.agreement import agreed
from dstune.checkpoint.layout import FileRecord, Manifest, load_manifest, read_manifest
from dstune.checkpoint.resolve import Checkpoint, naming_problems
from dstune.errors import CheckpointError, ConfigError, Problem
from dstune.loggers import get_logger
from dstune.paths import CheckpointPaths, step_directory, step_of
from dstune.protocols import Control

log = get_logger(__name__)

_BLOCK_BYTES = 8 << 20
_BLOCKS_UNDER_WAY = 8
"""An upload waits for those that it has sent: memory stays at so many blocks, however slow the network."""
_PIECE_BYTES = 64 << 30
"""pyarrow's uploads end at 10,000 parts of 10 MiB, 98 GiB."""
_PIECE = re.compile(r"(.+)\.part-(\d{5})-of-(\d{5})")
_MAX_THREADS = 8
_MANIFEST = CheckpointPaths(Path()).manifest.name

Surplus = Callable[[Mapping[int, Manifest], int], Iterable[int]]
"""`surplus(manifests by step, newest whole step)`: the steps that may go."""


class Unavailable(CheckpointError):
    """The store, or this disk, does not do what it is asked now: nothing is known of the checkpoint."""


@dataclass(frozen=True)
class Published:
    """A checkpoint that is in the store now."""

    bytes: int
    """Sent now: 0 where it was there already."""
    seconds: float


class Store:
    """The checkpoints of one run behind `address`. Raises ConfigError for an address that cannot be opened here."""

    def __init__(self, address: str, piece_bytes: int = _PIECE_BYTES) -> None:
        self.address = address.rstrip("/")
        self._piece_bytes = piece_bytes
        there = places.filesystem(self.address)
        self._system, self._root = there.system, there.path
        self._holds_objects = self._system.type_name in ("s3", "gcs")

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

    def verify(self, step: int, part: slice | None = None) -> list[str]:
        """What is wrong with a checkpoint, by reading every byte (or those of a `part` of its files); empty where nothing is.

        Raises Unavailable.
        """
        try:
            manifest = self.manifest(step)
        except Unavailable:
            raise
        except CheckpointError as error:
            return [str(error)]
        objects = self._steps().get(step, {})
        problems = self._layout_problems(manifest, step, objects)
        wanted = sorted(manifest.files)[part or slice(None)] if not problems else []
        return problems + self._each(wanted, lambda name: self._read(step, name, objects, manifest.files[name]))

    def probe(self) -> None:
        """Write an object and delete it. Raises ConfigError where that fails: key, bucket, endpoint, rights."""
        path = f"{self._root}/.probe-{secrets.token_hex(8)}"
        try:
            self._put(path, b"dstune may write here\n")
            with self._asking():
                self._system.delete_file(path)
            self.committed()
        except Unavailable as error:
            came = f"cannot be used: {error.problems[0].came}"
            do = "Are the address, the endpoint and the credentials (environment variables) right, on every node?"
            raise ConfigError(Problem(f"checkpoint.dir: {self.address}", came, do=do)) from None

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
        manifest = load_manifest(directory)
        steps = self._steps()
        for step in [step for step, objects in steps.items() if _MANIFEST not in objects]:
            log.info("%s was never finished: removing it", self.address_of(step))
            self.remove(step)
        if _MANIFEST in (there := steps.get(manifest.step, {})):
            same = self._manifest_bytes(manifest.step) == CheckpointPaths(directory).manifest.read_bytes()
            if same and not self._layout_problems(manifest, manifest.step, there):
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
                with self._writing(self._path(step, name)) as write:
                    stop = max(0, left - self._piece_bytes)
                    while left > stop and (block := file.read(min(_BLOCK_BYTES, left - stop))):
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
        problems = self._layout_problems(manifest, manifest.step, self._steps().get(manifest.step, {}))
        if problems:
            raise CheckpointError(Problem(self.address_of(manifest.step), "; ".join(problems)))
        self._put(self._path(manifest.step, _MANIFEST), CheckpointPaths(directory).manifest.read_bytes())

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
        if problems := self._layout_problems(manifest, step, objects):
            raise CheckpointError(Problem(self.address_of(step), "; ".join(problems)))
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
        def get(name: str) -> str | None:
            with durable_file(directory / name) as file:
                return self._read(manifest.step, name, objects, manifest.files[name], file.write)

        if problems := self._each(sorted(manifest.files), get):
            raise CheckpointError(Problem(self.address_of(manifest.step), "; ".join(problems)))

    # --- out of the way ----------------------------------------------------------------------------------------------

    def remove(self, step: int) -> None:
        """Remove a checkpoint, its manifest first: cut short, it is no checkpoint any more. Raises Unavailable."""
        with self._asking():
            if _MANIFEST in self._steps().get(step, {}):
                self._system.delete_file(self._path(step, _MANIFEST))
            self._system.delete_dir(self._path(step))

    def prune(self, control: Control, surplus: Surplus) -> list[int]:
        """Remove the steps that `surplus` names, and damaged ones older than a whole one; the removed steps.

        A collective call. Nothing goes before a newer checkpoint in the store was read back whole; the workers share the reading.
        Raises CheckpointError on every worker where the store fails.
        """
        facts = agreed(control, "look for old uploads", lambda: self._old(surplus, None), only_first=True)[0]
        part = slice(control.rank, None, control.world_size)
        for newest in reversed(facts["steps"] if facts["old"] else []):
            shares = agreed(control, "read an upload back", lambda step=newest: self.verify(step, part))
            problems = [problem for share in shares for problem in share]
            if not problems:
                return agreed(
                    control, "remove old uploads", lambda step=newest: self._prune(surplus, step), only_first=True
                )[0]
            log.warning("%s is damaged and does not count: %s", self.address_of(newest), "; ".join(problems))
        return []

    def _old(self, surplus: Surplus, newest_whole: int | None) -> dict[str, list[int]]:
        steps, manifests = self.committed(), dict[int, Manifest]()
        damaged: list[int] = []
        for step in steps:
            try:
                manifests[step] = self.manifest(step)
            except Unavailable:
                raise
            except CheckpointError:
                damaged.append(step)
        newest = max(manifests, default=0) if newest_whole is None else newest_whole
        return {"steps": steps, "old": [step for step in (*damaged, *surplus(manifests, newest)) if step < newest]}

    def _prune(self, surplus: Surplus, newest_whole: int) -> list[int]:
        old = sorted(self._old(surplus, newest_whole)["old"])
        for step in old:
            self.remove(step)
        return old

    # --- requests ----------------------------------------------------------------------------------------------------

    def _path(self, step: int, name: str = "") -> str:
        return posixpath.join(self._root, _name(step), name).rstrip("/")

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        try:
            with places.as_os_errors():
                yield
        except OSError as error:
            do = "Is the network there, and are the credentials still good?"
            raise Unavailable(Problem(self.address, places.first_line(error), do=do)) from None

    def _steps(self) -> dict[int, dict[str, int]]:
        """For every step of which something is there: its objects' names and sizes."""
        with self._asking():
            if isinstance(self._system, fs.PyFileSystem):
                self._system.handler.fs.invalidate_cache()
            found = self._system.get_file_info(fs.FileSelector(self._root, allow_not_found=True, recursive=True))
        steps: dict[int, dict[str, int]] = {}
        for info in found:
            folder, name = posixpath.split(info.path)
            step = step_of(Path(folder))
            if (
                info.type == fs.FileType.File
                and step is not None
                and posixpath.dirname(folder).strip("/") == self._root.strip("/")
            ):
                steps.setdefault(step, {})[name] = info.size
        return steps

    def _layout_problems(self, manifest: Manifest, step: int, objects: Mapping[str, int]) -> list[str]:
        """Objects that are missing, cut or foreign."""
        whole = {_file_of(name) for name in objects} - {_MANIFEST}
        problems = naming_problems(manifest, step, whole)
        for name, record in sorted(manifest.files.items()):
            pieces = _pieces(name, objects)
            size = sum(objects[piece] for piece in pieces)
            if not pieces:
                problems.append(f"{name}: is missing")
            elif size != record.bytes:
                problems.append(f"{name}: {size} bytes instead of {record.bytes}")
        return problems

    def _read(
        self,
        step: int,
        name: str,
        objects: Mapping[str, int],
        record: FileRecord,
        keep: Callable[[bytes], object] | None = None,
    ) -> str | None:
        """Read a file's objects to the end, handing every block on; what is wrong with the bytes that came."""
        digest = hashlib.sha256()
        for piece in _pieces(name, objects):
            for block in self._blocks(self._path(step, piece)):
                digest.update(block)
                if keep is not None:
                    keep(block)
        return None if digest.hexdigest() == record.sha256 else f"{name}: its SHA-256 is not the manifest's"

    def _blocks(self, path: str) -> Iterator[bytes]:
        with self._asking():
            stream = self._system.open_input_stream(path, compression=None)
        with stream:
            while True:
                with self._asking():
                    block = stream.read(_BLOCK_BYTES)
                if not block:
                    return
                yield block

    def _manifest_bytes(self, step: int) -> bytes:
        return b"".join(self._blocks(self._path(step, _MANIFEST)))

    def _put(self, path: str, content: bytes) -> None:
        """Write a small file whole: an object is there when it was sent to its end, a file elsewhere needs a rename for that."""
        written = path if self._holds_objects else f"{path}.tmp"
        with self._writing(written) as write:
            write(content)
        if written != path:
            with self._asking():
                self._system.move(written, path)

    @contextlib.contextmanager
    def _writing(self, path: str) -> Iterator[Callable[[bytes], None]]:
        """Write an object block by block. It is there when the context was left without an error."""
        with self._asking():
            if not self._holds_objects:
                self._system.create_dir(posixpath.dirname(path), recursive=True)
            stream = self._system.open_output_stream(path, compression=None)
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

    def _each(self, names: Iterable[str], look: Callable[[str], str | None]) -> list[str]:
        """What `look` says of each file, where it says something; several at a time."""
        with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
            return [said for said in pool.map(look, names) if said]


def _name(step: int) -> str:
    return step_directory(Path(), step).name


def _file_of(name: str) -> str:
    """The file that an object is, or is a piece of."""
    match = _PIECE.fullmatch(name)
    return match.group(1) if match else name


def _pieces(name: str, objects: Mapping[str, int]) -> list[str]:
    """The objects of a file, in order; none where one is missing."""
    if name in objects:
        return [name]
    found = sorted(piece for piece in objects if _file_of(piece) == name)
    count = int(_PIECE.fullmatch(found[0]).group(3)) if found else 0
    expected = [f"{name}.part-{number:05d}-of-{count:05d}" for number in range(count)]
    return expected if found == expected else []
