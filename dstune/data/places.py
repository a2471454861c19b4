"""Where the bytes of a source lie, on a disk or behind an address: opened for reading, never copied, never held whole.

Addresses go to pyarrow's filesystems (s3, gs, abfs, hdfs) and else to fsspec's (hf, memory, sftp, … by the packages installed).
Credentials come from the environment alone: for S3 the AWS_* variables, `AWS_ENDPOINT_URL` among them.
"""

import functools
import glob
import io
import os
import posixpath
import re
import urllib.parse
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import pyarrow as pa
from pyarrow import fs

from dstune.errors import ConfigError, Problem

_LOCAL_BUFFER_BYTES = 1 << 18
_REMOTE_BUFFER_BYTES = 8 << 20
"""Each read of an address is a request: fewer and larger."""
_CONNECT_SECONDS, _REQUEST_SECONDS = 10, 60
_BY_ARROW = ("gs", "gcs", "abfs", "abfss", "hdfs", "viewfs")


class Stamp(NamedTuple):
    """Equal while a file is what it was."""

    size: int
    """Bytes."""
    version: str
    """Time of change, with the inode on a disk and the ETag in an object store."""


class Place(Protocol):
    """A file that can be opened again and again. Reading and opening raise OSError."""

    def head(self, count: int) -> bytes:
        """Its first bytes, fewer where it is shorter."""
        ...

    def open(self) -> io.BufferedReader:
        """Its bytes, from the start."""
        ...

    def open_arrow(self) -> pa.NativeFile:
        """The same for pyarrow's readers, with random access."""
        ...

    def stamp(self) -> Stamp:
        """Which version of the file stands there now. Raises OSError."""
        ...


@dataclass(frozen=True)
class LocalFile:
    """A file on a disk."""

    path: Path

    def head(self, count: int) -> bytes:
        with self.path.open("rb") as file:
            return file.read(count)

    def open(self) -> io.BufferedReader:
        return io.BufferedReader(io.FileIO(self.path), _LOCAL_BUFFER_BYTES)

    def open_arrow(self) -> pa.NativeFile:
        return pa.memory_map(str(self.path))

    def stamp(self) -> Stamp:
        status = self.path.stat()
        return Stamp(status.st_size, f"{status.st_ino}-{status.st_mtime_ns}")


@dataclass(frozen=True)
class RemoteFile:
    """A file behind an address."""

    address: str

    def head(self, count: int) -> bytes:
        with self.open_arrow() as file:
            return file.read(count)

    def open(self) -> io.BufferedReader:
        return io.BufferedReader(self.open_arrow(), _REMOTE_BUFFER_BYTES)  # pyright: ignore[reportArgumentType]

    def open_arrow(self) -> pa.NativeFile:
        system, path = filesystem(self.address)
        return system.open_input_file(path)

    def stamp(self) -> Stamp:
        system, path = filesystem(self.address)
        (info,) = system.get_file_info([path])
        if info.type != fs.FileType.File:
            raise FileNotFoundError(2, "there is no such file", self.address)
        if isinstance(system, fs.PyFileSystem):
            return Stamp(info.size, str(system.handler.fs.ukey(path)))
        with system.open_input_stream(path, compression=None) as stream:
            tag = (stream.metadata() or {}).get("ETag", b"")
        return Stamp(info.size, f"{info.mtime_ns}-{bytes(tag).decode('ascii', 'replace')}")


def is_address(written: str) -> bool:
    """Whether a source names its file by an address rather than a path."""
    return "://" in written


def filesystem(address: str) -> tuple[fs.FileSystem, str]:
    """The filesystem behind an address, and the path within it. Raises ConfigError for a kind that cannot be opened here."""
    scheme, _, rest = address.partition("://")
    user, at, _ = rest.partition("/")[0].rpartition("@")
    if at and ":" in user:
        shown = address.replace(user, "…")
        raise ConfigError(Problem(shown, "a password in an address", "none", "credentials come from the environment"))
    if scheme in ("s3", "s3a"):
        bucket, _, key = rest.partition("/")
        return _s3(bucket), f"{bucket}/{key}".rstrip("/")
    if scheme == "file":
        return fs.LocalFileSystem(), urllib.parse.unquote(rest)
    if scheme in _BY_ARROW:
        host, _, path = rest.partition("/")
        return _by_arrow(f"{'gs' if scheme == 'gcs' else scheme}://{host}"), _within(scheme, host, path)
    return _by_fsspec(address)


def _within(scheme: str, host: str, path: str) -> str:
    return f"{host}/{path}".rstrip("/") if scheme in ("gs", "gcs") else f"/{path}"


def _s3(bucket: str) -> fs.FileSystem:
    """As the environment says now; a connection is kept for as long as it says the same."""
    environment = os.environ
    endpoint = environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL") or ""
    region = environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION")
    if region is None:
        region = "us-east-1" if endpoint else _region(bucket)
    anonymous = environment.get("AWS_NO_SIGN_REQUEST", "").lower() in ("1", "yes", "true")
    return _connected(region, endpoint, anonymous, environment.get("AWS_ACCESS_KEY_ID"))


@functools.lru_cache(maxsize=32)
def _connected(region: str, endpoint: str, anonymous: bool, key: str | None) -> fs.FileSystem:
    """`key` only tells connections apart: pyarrow reads the credentials itself."""
    parts = urllib.parse.urlsplit(endpoint)
    return fs.S3FileSystem(
        region=region,
        scheme=parts.scheme or "https",
        endpoint_override=parts.netloc or None,
        anonymous=anonymous,
        connect_timeout=_CONNECT_SECONDS,
        request_timeout=_REQUEST_SECONDS,
    )


@functools.lru_cache(maxsize=32)
def _region(bucket: str) -> str:
    try:
        return fs.resolve_s3_region(bucket)
    except OSError as error:
        came = f"the bucket's region cannot be asked for: {first_line(error)}"
        raise ConfigError(Problem(f"s3://{bucket}", came, do="set AWS_REGION, or AWS_ENDPOINT_URL")) from None


@functools.lru_cache(maxsize=32)
def _by_arrow(root: str) -> fs.FileSystem:
    try:
        return fs.FileSystem.from_uri(root)[0]
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ConfigError(Problem(root, f"cannot be opened: {first_line(error)}")) from None


def _by_fsspec(address: str) -> tuple[fs.FileSystem, str]:
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(address)
    except ImportError as error:
        raise ConfigError(Problem(address, f"this kind of address wants a package: {error}")) from None
    except (ValueError, OSError) as error:
        known = "a path, http(s)://, s3://, gs://, hf:// or what fsspec knows"
        raise ConfigError(Problem(address, f"this kind of address: {first_line(error)}", known)) from None
    return fs.PyFileSystem(fs.FSSpecHandler(system)), path


def find(address: str, wanted: Iterable[str]) -> list[str]:
    """The addresses of the files that `address` names: itself, a pattern's matches, or those below it that end in `wanted`.

    Sorted; empty where there are none. Raises ConfigError, and OSError where the other side cannot be asked.
    """
    system, path = filesystem(address)
    written = address.removesuffix("/")
    prefix = written.removesuffix(path) if written.endswith(path) else address.partition("://")[0] + "://"
    if glob.has_magic(path):
        start = posixpath.dirname(re.split(r"[*?\[]", path, maxsplit=1)[0])
        matches = _pattern(path)
        deep = "/" in path[len(start) :].lstrip("/") or "**" in path
        found = [file for file in _below(system, start, deep) if matches.fullmatch(file)]
    else:
        (info,) = system.get_file_info([path])
        if info.type == fs.FileType.File:
            return [address]
        found = _below(system, path, deep=True) if info.type == fs.FileType.Directory else []
        found = [file for file in found if plain_suffix(file) in wanted]
    return [prefix + file for file in sorted(found)]


def _below(system: fs.FileSystem, start: str, deep: bool) -> list[str]:
    selected = system.get_file_info(fs.FileSelector(start, allow_not_found=True, recursive=deep))
    return [info.path for info in selected if info.type == fs.FileType.File]


def _pattern(path: str) -> re.Pattern[str]:
    """`*`, `?` and `[…]` within a name, `**` over any number of directories."""
    pieces = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", path)
    meant = {"**/": "(?:[^/]+/)*", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.compile("".join(meant.get(piece) or _literal(piece) for piece in pieces))


def _literal(piece: str) -> str:
    if piece.startswith("[") and piece.endswith("]"):
        return re.sub(r"^\[!", "[^", piece)
    return re.escape(piece)


def plain_suffix(name: str) -> str:
    """`.jsonl` of `a.jsonl.gz`, in small letters."""
    name = posixpath.basename(name).lower()
    for packed in (".gz", ".zst", ".zstd"):
        name = name.removesuffix(packed)
    return posixpath.splitext(name)[1]


def first_line(error: Exception) -> str:
    """What an error says, short enough for a message."""
    return (str(error) or type(error).__name__).partition("\n")[0][:300]
