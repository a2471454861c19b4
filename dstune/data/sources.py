"""Where records come from: files, globs, directories, addresses, hub ids and registries, opened by what they hold."""

import contextlib
import difflib
import functools
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

import pyarrow as pa

from dstune import atomic, paths, places
from dstune.config.schema import Source
from dstune.data import hub, registry, tables
from dstune.data.conversation import Refused
from dstune.data.json_stream import Lines, Record, parse_lines, read_json
from dstune.errors import ConfigError, DataError, DstuneError, Problem, first_line
from dstune.places import LocalFile, Place, RemoteFile, Stamp, plain_suffix

__all__ = ["Record", "SourceFile", "Stamp", "digest", "expand", "read", "read_pieces"]

_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow")
_DOCUMENT_SUFFIXES = (".txt", ".md", ".markdown", ".text")
_BUFFER_BYTES = 1 << 18
_DOWNLOAD_SECONDS = 60
_BUILTIN = "builtin:"
DEFAULT_RECORD_BYTES = 64 << 20
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_ARCHIVES = {b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"7z\xbc\xaf": "7z"}


@dataclass(frozen=True)
class SourceFile:
    """One file of a source."""

    place: Place | None
    """Where its bytes are; None for generated data."""
    name: str
    """As the run file writes it (a glob's or directory's match in the same way): what manifests and messages say."""
    source: Source
    """How it is read: the run file's source, or what a registry makes of it."""
    max_record_bytes: int = DEFAULT_RECORD_BYTES

    @property
    def path(self) -> Path | None:
        """Where it lies on this machine's disk; None where it does not."""
        return self.place.path if isinstance(self.place, LocalFile) else None

    @property
    def is_builtin(self) -> bool:
        """Generated, not read: there is no file to hash."""
        return self.place is None

    def open(self) -> io.BufferedReader:
        """Its bytes as they are stored, streamed. Raises OSError."""
        return self._stored().open()

    def stamp(self) -> Stamp:
        """Size and version: equal while the file is what it was. Raises OSError."""
        return self._stored().stamp()

    def _stored(self) -> Place:
        assert self.place is not None, "generated data has no bytes"
        return self.place


def digest(file: SourceFile) -> str:
    """SHA-256 of a file's bytes, streamed. Raises OSError."""
    found = hashlib.sha256()
    with file.open() as stream:
        while block := stream.read(_BUFFER_BYTES):
            found.update(block)
    return found.hexdigest()


def expand(source: Source, base: Path, max_record_bytes: int = DEFAULT_RECORD_BYTES) -> list[SourceFile]:
    """The files of `source`, sorted by name; relative paths start at `base`. Raises ConfigError where there is none, DataError
    and OSError where they cannot be looked at."""
    written = source.path
    make = functools.partial(SourceFile, source=source, max_record_bytes=max_record_bytes)
    if written.startswith(_BUILTIN):
        return [make(None, written)]
    if urllib.parse.urlsplit(written).scheme in ("http", "https"):
        return [make(LocalFile(_download(written)), written)]
    if paths.is_address(written):
        return [make(RemoteFile(address), address) for address in _addresses(source)]
    root = base / Path(written).expanduser()
    if entry := registry.file_of(source, root):
        return expand(registry.resolve(source, entry, written), base, max_record_bytes)
    if root.is_dir():
        found = _in_directory(root, source)
    elif root.is_file():
        found = [root]
    elif root.exists():
        raise ConfigError(Problem(written, "a device or a pipe", "a file, a directory or a pattern"))
    else:
        matches = glob.glob(str(root), recursive=True)  # noqa: PTH207 (Path.glob takes no absolute patterns)
        found = sorted(path for path in map(Path, matches) if path.is_file())
        if not found and not root.parent.is_dir() and hub.is_id(written, _suffixes(source)):
            return [make(LocalFile(path), f"{written}/{name}") for name, path in hub.files(source, _suffixes(source))]
    if not found:
        raise ConfigError(_missing(written, root, source))
    if source.subset is not None or source.revision is not None:
        came = f"`{'subset' if source.subset is not None else 'revision'}` for files on this machine"
        raise ConfigError(Problem(written, came, "a hub id (owner/name)", "remove it"))
    return [make(LocalFile(path), _name(path, written, base)) for path in found]


def _suffixes(source: Source) -> tuple[str, ...]:
    return (*_SUFFIXES, *_DOCUMENT_SUFFIXES) if source.format == "documents" else _SUFFIXES


def _addresses(source: Source) -> list[str]:
    try:
        found = places.find(source.path, _suffixes(source))
    except (OSError, ValueError) as error:
        if isinstance(error, DstuneError):
            raise
        do = "Are the address, the endpoint and the credentials (environment variables) right? AWS_NO_SIGN_REQUEST=1 opens public buckets."
        raise DataError(Problem(source.path, f"cannot be looked at: {first_line(error)}", do=do)) from None
    start = source.path.rstrip("/") + "/"
    found = [
        one for one in found if not one.startswith(start) or _is_wanted(Path(one.removeprefix(start)), source.split)
    ]
    if not found:
        came = "no file there" if source.split is None else f"no file of the split {source.split!r} there"
        raise ConfigError(Problem(source.path, came, "an address of a file, a pattern, or a directory of data files"))
    return found


def _name(path: Path, written: str, base: Path) -> str:
    return str(path) if Path(written).expanduser().is_absolute() else os.path.relpath(path, base)


def _missing(written: str, root: Path, source: Source) -> Problem:
    if root.is_dir():
        what = "no data file in this directory" if source.split is None else f"no file of the split {source.split!r}"
        return Problem(written, what, f"files that end in {', '.join(_suffixes(source))}")
    if glob.has_magic(written):
        return Problem(written, "no file matches", "a path relative to the run file, or an absolute one")
    parent = root.parent
    near = difflib.get_close_matches(root.name, [path.name for path in parent.iterdir()], 1) if parent.is_dir() else []
    do = f"did you mean {near[0]!r}?" if near else f"looked for {root}"
    return Problem(written, "there is no such file", "a path relative to the run file, or an absolute one", do)


def _in_directory(root: Path, source: Source) -> list[Path]:
    """Data files below `root`; of a `datasets` directory the Arrow files of its split."""
    split = source.split
    if (root / "dataset_dict.json").exists():
        if split is None or not (root / split).is_dir():
            splits = sorted(path.name for path in root.iterdir() if path.is_dir())
            raise ConfigError(Problem(str(root), f"split {split!r}", f"`split:` one of {', '.join(splits)}"))
        root, split = root / split, None
    if (root / "state.json").exists():
        return sorted(root.glob("data-*.arrow"))
    files = sorted(path for path in root.rglob("*") if path.is_file() and plain_suffix(path.name) in _suffixes(source))
    return [path for path in files if _is_wanted(path.relative_to(root), split)]


def _is_wanted(relative: Path, split: str | None) -> bool:
    return not hub.is_about(relative) and (split is None or hub.is_of_split(relative, split))


def read(file: SourceFile) -> Iterator[Record]:
    """Every record of the file, in order; what cannot be read as a record carries its error.

    Raises DataError where the file as a whole is unreadable (empty, cut short, unknown kind).
    """
    for piece in read_pieces(file):
        if isinstance(piece, Lines):
            yield from parse_lines(piece, file.max_record_bytes)
        else:
            yield piece


def read_pieces(file: SourceFile) -> Iterator[Record | Lines]:
    """The same, but JSON Lines as they stand, some at once, for `parse_lines` elsewhere."""
    if file.place is None:
        yield from _builtin(file)
        return
    stored_as = file.path.name if file.path else file.name
    suffix = plain_suffix(stored_as)
    try:
        magic = file.place.head(6)
        with contextlib.nullcontext() if file.path else places.as_os_errors(), file.open() as stream:
            if magic.startswith(b"PAR1") or suffix == ".parquet":
                with file.place.open_arrow() as table:
                    yield from tables.read_parquet(table, file.name, file.max_record_bytes)
            elif magic.startswith((b"ARROW1", b"\xff\xff\xff\xff")) or suffix == ".arrow":
                at_random = file.path or magic == b"ARROW1"  # from afar, a stream is read in large pieces
                with file.place.open_arrow() if at_random else pa.PythonFile(stream, "r") as table:
                    yield from tables.read_arrow(table, magic == b"ARROW1", file.name, file.max_record_bytes)
            elif magic.startswith(_GZIP):
                with gzip.GzipFile(fileobj=stream) as packed, io.BufferedReader(packed, _BUFFER_BYTES) as text:
                    yield from _text(file, text, suffix)  # pyright: ignore[reportArgumentType]
            elif magic.startswith(_ZSTD) or stored_as.lower().endswith((".zst", ".zstd")):
                with file.place.open_arrow() as packed:
                    yield from _zstd(file, packed, suffix)
            else:
                yield from _text(file, stream, suffix)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(Problem(file.name, f"not a whole gzip file: {error}", do="make it anew")) from None
    except OSError as error:
        said = error.strerror or first_line(error)
        raise DataError(Problem(file.name, f"cannot be read: {said}")) from None


def _zstd(file: SourceFile, packed: pa.NativeFile, suffix: str) -> Iterator[Record | Lines]:
    """pyarrow's reader, for it tells a frame that is cut short from one that ends."""
    unpacked = pa.CompressedInputStream(packed, "zstd")
    try:
        with io.BufferedReader(unpacked, _BUFFER_BYTES) as text:  # pyright: ignore[reportArgumentType]
            yield from _text(file, text, suffix)
    except OSError as error:
        if "ZSTD" not in str(error) and "compressed stream" not in str(error):
            raise
        came = f"not a whole zstd file: {first_line(error)}"
        raise DataError(Problem(file.name, came, do="make it anew")) from None


def _text(file: SourceFile, stream: io.BufferedReader, suffix: str) -> Iterator[Record | Lines]:
    head = stream.peek(_BUFFER_BYTES)
    if archive := next((kind for magic, kind in _ARCHIVES.items() if head.startswith(magic)), None):
        raise DataError(Problem(file.name, f"a {archive} archive", "the data files in it", "unpack it first"))
    if file.source.format == "documents" and suffix not in _SUFFIXES:
        yield _document(file, stream)
        return
    if suffix in (".csv", ".tsv"):
        yield from tables.read_csv(stream, file.name, file.max_record_bytes, "\t" if suffix == ".tsv" else None)
        return
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if suffix not in _SUFFIXES and start not in (b"[", b"{", b""):
        known = f"a file that ends in {', '.join(_SUFFIXES)} (.gz and .zst too), or holds JSON"
        do = "`format: documents` takes plain text, a document a file" if suffix in _DOCUMENT_SUFFIXES else ""
        raise DataError(Problem(file.name, f"unknown kind of file {suffix!r}", known, do))
    yield from read_json(stream, file.name, file.max_record_bytes, suffix in (".jsonl", ".ndjson"))


def _document(file: SourceFile, stream: io.BufferedReader) -> Record:
    """A text file as one record."""
    raw = stream.read(file.max_record_bytes + 1)
    if len(raw) > file.max_record_bytes:
        too_long = f"more than {file.max_record_bytes} bytes (`data.max_record_bytes`)"
        return Record(1, None, Refused("record_too_long", too_long))
    try:
        content = raw.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except UnicodeDecodeError as error:
        return Record(
            1, None, Refused("invalid_utf8", f"byte {error.start + 1} of the file (0x{raw[error.start]:02x})")
        )
    return Record(1, {file.source.columns.get("text", "text"): content})


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
