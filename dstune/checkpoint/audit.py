"""What is wrong with a checkpoint: which file, whose shard, how, and which parameters lie in the damaged part."""

import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from dstune.checkpoint import damage, owner
from dstune.checkpoint.checking import Changed, Content, Span, checked, compared
from dstune.checkpoint.hashing import OnBytes, Unreadable, hashed
from dstune.checkpoint.header import read_whole
from dstune.checkpoint.layout import Manifest, Part, load_manifest, tile
from dstune.errors import CheckpointError
from dstune.paths import CheckpointPaths, step_of

Kind = Literal["missing", "size", "changed", "unreadable", "foreign", "inconsistent"]
_SHOWN_PARTS = 3


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    file: str
    kind: Kind
    message: str
    worker: int | None = None
    """Whose shard it is; None for files that belong to no worker."""
    lost: tuple[Part, ...] = ()
    """What lies in the damaged part, where that can be told."""

    def __str__(self) -> str:
        place = self.file if self.worker is None else f"{self.file} (worker {self.worker})"
        if not self.lost:
            return f"{place}: {self.message}"
        more = f" and {len(self.lost) - _SHOWN_PARTS} more" if len(self.lost) > _SHOWN_PARTS else ""
        return f"{place}: {self.message}; lost: {', '.join(map(str, self.lost[:_SHOWN_PARTS]))}{more}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Audit:
    """One directory's findings; none where it is whole, as far as it was looked at."""

    directory: Path
    manifest: Manifest | None
    """None where it cannot be used."""
    findings: tuple[Finding, ...]


def audit(directories: Iterable[Path], *, past_cache: bool = False, on_bytes: OnBytes | None = None) -> Iterator[Audit]:
    """Read every byte of these checkpoints, several files at once, and take their SHA-256; what is wrong with each, in order.

    Nothing is parsed before its hash was right, the manifest's own included; of a damaged shard the header alone, to say what
    is lost, and only where it agrees with the manifest.
    """
    looks = [glance(directory) for directory in directories]
    to_read = [_readable(look) for look in looks]
    paths = [look.directory / name for look, names in zip(looks, to_read, strict=True) for name in names]
    contents = hashed(paths, past_cache=past_cache, on_bytes=on_bytes)
    for look, names in zip(looks, to_read, strict=True):
        found = [next(contents) for _ in names]
        if look.manifest is None:
            yield look
            continue
        records = [look.manifest.files[name] for name in names]
        judged = [compared(content, record) for content, record in zip(found, records, strict=True)]
        yield _judged(look, look.manifest, dict(zip(names, judged, strict=True)))


def check(directory: Path, *, past_cache: bool = False, blocks: bool = True) -> Audit:
    """The same of one checkpoint by its blocks' hashes, eight times as fast on a core, and on several for one file.

    `blocks` false: only files without such hashes are read. The others are for those who check them while they load them.
    """
    look = glance(directory)
    if look.manifest is None:
        return look
    records = look.manifest.files
    names = [name for name in _readable(look) if blocks or not records[name].block_bytes]
    files = [(directory / name, records[name]) for name in names]
    return _judged(look, look.manifest, dict(zip(names, checked(files, past_cache=past_cache), strict=True)))


def glance(directory: Path) -> Audit:
    """What shows without reading: the manifest (against its own hash), names and sizes."""
    try:
        manifest = load_manifest(directory)
    except CheckpointError as error:
        came = error.problems[0].came
        kind: Kind = "missing" if came == "is missing" else "changed"
        return Audit(directory, None, (Finding(CheckpointPaths(directory).manifest.name, kind, came),))
    workers = _workers(directory, manifest)
    findings = _naming(directory, manifest, workers)
    if said := owner.strange(directory.parent, manifest.fingerprints):
        findings.append(Finding(CheckpointPaths(directory).manifest.name, "foreign", said))
    for name in sorted(manifest.files):
        findings += _size(directory, manifest, name, workers.get(name))
    return Audit(directory, manifest, tuple(findings))


def file_findings(directory: Path, manifest: Manifest, names: Iterable[str], *, past_cache: bool) -> list[Finding]:
    """What is wrong with these of the manifest's files alone: missing, cut or changed. For workers that share the reading."""
    workers, names = _workers(directory, manifest), sorted(names)
    findings = [found for name in names for found in _size(directory, manifest, name, workers.get(name))]
    whole = [name for name in names if name not in {found.file for found in findings}]
    contents = checked([(directory / name, manifest.files[name]) for name in whole], past_cache=past_cache)
    for name, content in zip(whole, contents, strict=True):
        findings += _content(directory, manifest, name, workers.get(name), content)
    return findings


def _readable(look: Audit) -> list[str]:
    """The files worth reading, the largest first: those of the right size."""
    if look.manifest is None:
        return []
    wrong = {finding.file for finding in look.findings}
    records = look.manifest.files
    return sorted((name for name in records if name not in wrong), key=lambda name: -records[name].bytes)


def _judged(look: Audit, manifest: Manifest, contents: Mapping[str, Content]) -> Audit:
    workers = _workers(look.directory, manifest)
    findings = list(look.findings)
    for name in sorted(contents):
        findings += _content(look.directory, manifest, name, workers.get(name), contents[name])
    if not findings and len(contents) == len(manifest.files):
        findings = _tiling(look.directory, manifest)
    return Audit(look.directory, manifest, tuple(findings))


def _workers(directory: Path, manifest: Manifest) -> dict[str, int]:
    """Which worker's shard each name is."""
    paths = CheckpointPaths(directory)
    return {paths.shard(rank, manifest.world_size).name: rank for rank in range(manifest.world_size)}


def _naming(directory: Path, manifest: Manifest, shards: Mapping[str, int]) -> list[Finding]:
    """The manifest belongs to this step, and names exactly the shards that there are."""
    paths = CheckpointPaths(directory)
    findings: list[Finding] = []
    if step_of(directory) not in (None, manifest.step):
        findings.append(Finding(paths.manifest.name, "foreign", f"is of step {manifest.step}"))
    expected = {*shards, paths.state.name}
    if expected != set(manifest.files):
        findings.append(Finding(paths.manifest.name, "inconsistent", f"names {sorted(manifest.files)}"))
    others = {path.name for path in directory.glob("*.safetensors")} - expected
    return findings + [Finding(name, "foreign", "does not belong to this checkpoint") for name in sorted(others)]


def _size(directory: Path, manifest: Manifest, name: str, worker: int | None) -> list[Finding]:
    expected = manifest.files[name].bytes
    try:
        found = (directory / name).stat()
        if not stat.S_ISREG(found.st_mode):
            return [Finding(name, "unreadable", "is no file", worker)]
        size = found.st_size
    except FileNotFoundError:
        size = None
    except OSError as error:
        return [Finding(name, "unreadable", error.strerror or str(error), worker)]
    if size == expected:
        return []
    if size is None:
        lost = () if worker is None else damage.nowhere_else(directory, manifest, name)
        return [Finding(name, "missing", "is missing", worker, lost)]
    lost = () if worker is None or size > expected else damage.between(directory, manifest, name, size, expected)
    return [Finding(name, "size", f"{size} bytes instead of {expected}", worker, lost)]


def _content(directory: Path, manifest: Manifest, name: str, worker: int | None, content: Content) -> list[Finding]:
    if content is None:
        return []
    if isinstance(content, Unreadable):
        lost = () if worker is None else damage.between(directory, manifest, name, content.first, content.last)
        message = f"cannot be read from byte {content.first} to {content.last}: {content.reason}"
        return [Finding(name, "unreadable", message, worker, lost)]
    message = "its SHA-256 is not the manifest's"
    if worker is None:
        return [Finding(name, "changed", message)]
    said, lost = damage.signs(directory, manifest, name, content.spans or _changed_blocks(directory, manifest, name))
    return [Finding(name, "changed", f"{message}; {said}", worker, lost)]


def _changed_blocks(directory: Path, manifest: Manifest, name: str) -> tuple[Span, ...]:
    """Where a shard with a wrong hash was changed; none where its record has no blocks."""
    record = manifest.files[name]
    content = next(checked([(directory / name, record)], past_cache=False)) if record.block_bytes else None
    return content.spans if isinstance(content, Changed) else ()


def _tiling(directory: Path, manifest: Manifest) -> list[Finding]:
    """The shards, now known to be the ones that were written, hold every element that the manifest promises."""
    paths = CheckpointPaths(directory)
    try:
        headers = [read_whole(paths.shard(rank, manifest.world_size)) for rank in range(manifest.world_size)]
    except CheckpointError as error:
        problem = error.problems[0]
        return [Finding(Path(problem.where).name, "inconsistent", problem.came)]
    for rank, header in enumerate(headers):
        if header.step != manifest.step:
            name = paths.shard(rank, manifest.world_size).name
            return [Finding(name, "foreign", f"its header says step {header.step}", rank)]
    shapes, problems = tile(piece.entry for header in headers for piece in header.slices)
    found = [Finding(paths.manifest.name, "inconsistent", problem) for problem in problems]
    if shapes != manifest.tensors:
        said = "names other tensors than the shards hold"
        found.append(Finding(paths.manifest.name, "inconsistent", said))
    return found
