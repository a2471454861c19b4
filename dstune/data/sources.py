"""Where records come from: files, globs, directories and addresses of a run file's `sources`, opened by what they hold."""

import difflib
import glob
import gzip
import hashlib
import io
import os
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dstune import atomic, paths
from dstune.config.schema import Source
from dstune.data import tables
from dstune.data.json_stream import Record, read_json
from dstune.errors import ConfigError, DataError, Problem

__all__ = ["Record", "SourceFile", "expand", "read"]

_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow")
_BUFFER_BYTES = 1 << 18
_DOWNLOAD_SECONDS = 60
_BUILTIN = "builtin:"
DEFAULT_RECORD_BYTES = 64 << 20


@dataclass(frozen=True)
class SourceFile:
    """One file of a source."""

    path: Path
    """Where it is; for `builtin:instructions` the name itself."""
    name: str
    """As the run file writes it (a glob's or directory's match in the same way): what manifests and messages say."""
    source: Source
    max_record_bytes: int = DEFAULT_RECORD_BYTES

    @property
    def is_builtin(self) -> bool:
        """Generated, not read: there is no file to hash."""
        return self.name.startswith(_BUILTIN)


def expand(source: Source, base: Path, max_record_bytes: int = DEFAULT_RECORD_BYTES) -> list[SourceFile]:
    """The files of `source`, sorted by name; relative paths start at `base`. Raises ConfigError where there is none."""
    written = source.path
    if written.startswith(_BUILTIN):
        return [SourceFile(Path(written), written, source, max_record_bytes)]
    if urllib.parse.urlsplit(written).scheme in ("http", "https"):
        return [SourceFile(_download(written), written, source, max_record_bytes)]
    if "://" in written:
        raise ConfigError(Problem(written, "this kind of address", "a path, or http(s)://", "copy the file here first"))
    root = base / Path(written).expanduser()
    if root.is_dir():
        found = _in_directory(root, source.split)
    elif root.is_file():
        found = [root]
    elif root.exists():
        raise ConfigError(Problem(written, "a device or a pipe", "a file, a directory or a pattern"))
    else:
        matches = glob.glob(str(root), recursive=True)  # noqa: PTH207 (Path.glob takes no absolute patterns)
        found = sorted(path for path in map(Path, matches) if path.is_file())
    if not found:
        raise ConfigError(_missing(written, root))
    return [SourceFile(path, _name(path, written, base), source, max_record_bytes) for path in found]


def _name(path: Path, written: str, base: Path) -> str:
    return str(path) if Path(written).expanduser().is_absolute() else os.path.relpath(path, base)


def _missing(written: str, root: Path) -> Problem:
    if root.is_dir():
        return Problem(written, "no data file in this directory", f"files that end in {', '.join(_SUFFIXES)}")
    if glob.has_magic(written):
        return Problem(written, "no file matches", "a path relative to the run file, or an absolute one")
    parent = root.parent
    near = difflib.get_close_matches(root.name, [path.name for path in parent.iterdir()], 1) if parent.is_dir() else []
    do = f"did you mean {near[0]!r}?" if near else f"looked for {root}"
    return Problem(written, "there is no such file", "a path relative to the run file, or an absolute one", do)


def _in_directory(root: Path, split: str | None) -> list[Path]:
    """Data files below `root`; of a `datasets` directory the Arrow files of its split."""
    if (root / "dataset_dict.json").exists():
        if split is None or not (root / split).is_dir():
            splits = sorted(path.name for path in root.iterdir() if path.is_dir())
            raise ConfigError(Problem(str(root), f"split {split!r}", f"`split:` one of {', '.join(splits)}"))
        root, split = root / split, None
    if (root / "state.json").exists():
        return sorted(root.glob("data-*.arrow"))
    files = sorted(path for path in root.rglob("*") if path.is_file() and _suffix(path) in _SUFFIXES)
    return [path for path in files if split is None or _of_split(path.relative_to(root), split)]


def _of_split(relative: Path, split: str) -> bool:
    """`train` is in `train.jsonl`, `train-00000-of-00002.parquet` and `train/part.json`."""
    return split in relative.parts or relative.name == split or relative.name.startswith((f"{split}.", f"{split}-"))


def _suffix(path: Path) -> str:
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix


def read(file: SourceFile) -> Iterator[Record]:
    """Every record of the file, in order; what cannot be read as a record carries its error.

    Raises DataError where the file as a whole is unreadable (empty, cut short, unknown kind).
    """
    if file.is_builtin:
        yield from _builtin(file)
        return
    suffix = _suffix(file.path)
    try:
        with file.path.open("rb") as raw:
            magic = raw.read(6)
        if magic.startswith(b"PAR1") or suffix == ".parquet":
            yield from tables.read_parquet(file.path, file.name)
        elif magic.startswith((b"ARROW1", b"\xff\xff\xff\xff")) or suffix == ".arrow":
            yield from tables.read_arrow(file.path, file.name)
        else:
            with _open(file.path, magic) as stream:
                yield from _text(file, stream, suffix)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(Problem(file.name, f"not a whole gzip file: {error}", do="make it anew")) from None
    except OSError as error:
        raise DataError(Problem(file.name, f"cannot be read: {error.strerror or error}")) from None


def _open(path: Path, magic: bytes) -> io.BufferedReader:
    if magic.startswith(b"\x1f\x8b"):
        return io.BufferedReader(gzip.GzipFile(path), _BUFFER_BYTES)
    return io.BufferedReader(io.FileIO(path), _BUFFER_BYTES)


def _text(file: SourceFile, stream: io.BufferedReader, suffix: str) -> Iterator[Record]:
    if suffix in (".csv", ".tsv"):
        yield from tables.read_csv(stream, file.name, file.max_record_bytes, "\t" if suffix == ".tsv" else None)
        return
    start = stream.peek(_BUFFER_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if suffix not in _SUFFIXES and start not in (b"[", b"{", b""):
        known = f"a file that ends in {', '.join(_SUFFIXES)} (.gz too), or holds JSON"
        raise DataError(Problem(file.name, f"unknown kind of file {suffix!r}", known))
    yield from read_json(stream, file.name, file.max_record_bytes, suffix in (".jsonl", ".ndjson"))


def _builtin(file: SourceFile) -> Iterator[Record]:
    from dstune.data import builtin

    if file.name != "builtin:instructions":
        raise ConfigError(Problem(file.name, "no such built-in data", "builtin:instructions"))
    for line, value in enumerate(builtin.records(file.source.split), start=1):
        yield Record(line, value)


def _download(address: str) -> Path:
    """The file behind an address, fetched once into the cache; delete it there to fetch it again."""
    parts = urllib.parse.urlsplit(address)
    folder = paths.cache_directory() / "downloads" / hashlib.sha256(address.encode()).hexdigest()[:16]
    target = folder / (Path(parts.path).name or "data.json")
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with (
            urllib.request.urlopen(address, timeout=_DOWNLOAD_SECONDS) as answer,
            atomic.durable_file(temporary) as out,
        ):
            while block := answer.read(1 << 20):
                out.write(block)
        temporary.replace(target)
    except (urllib.error.URLError, OSError) as error:
        temporary.unlink(missing_ok=True)
        raise DataError(
            Problem(address, f"cannot be fetched: {error}", do="fetch it yourself and give its path")
        ) from None
    return target
