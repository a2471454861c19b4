"""Where bytes lie, on a disk or behind an address: opened for reading, never copied, never held whole.

Addresses go to pyarrow's filesystems (s3, gs, abfs, hdfs) and else to fsspec's (hf, memory, sftp, … by the packages installed).
Credentials come from the environment alone: for S3 the AWS_* variables, `AWS_ENDPOINT_URL` and
`AWS_MAX_ATTEMPTS` (how often a request is tried, with growing pauses) among them.
"""

import contextlib
import datetime
import functools
import glob
import io
import os
import posixpath
import re
import urllib.parse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import pyarrow as pa
from pyarrow import fs

from dstune.errors import ConfigError, DstuneError, Problem, first_line

_LOCAL_BUFFER_BYTES = 1 << 18
_REMOTE_BUFFER_BYTES = 8 << 20
"""Each read of an address is a request: fewer and larger."""
_CONNECT_SECONDS, _REQUEST_SECONDS = 10, 60
_MAX_ATTEMPTS = 5
_BY_ARROW = ("abfs", "abfss", "hdfs", "viewfs")


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
        with as_os_errors():
            there = filesystem(self.address)
            return there.system.open_input_file(there.path)

    def stamp(self) -> Stamp:
        with as_os_errors():
            there = filesystem(self.address)
            (info,) = there.system.get_file_info([there.path])
            if info.type != fs.FileType.File:
                raise FileNotFoundError(2, "there is no such file", self.address)
            if isinstance(there.system, fs.PyFileSystem):
                return Stamp(info.size, str(there.system.handler.fs.ukey(there.path)))
            with there.system.open_input_stream(there.path, compression=None) as stream:
                tag = (stream.metadata() or {}).get("ETag", b"")
            return Stamp(info.size, f"{info.mtime_ns}-{bytes(tag).decode('ascii', 'replace')}")


class _There(NamedTuple):
    """What is behind an address."""

    system: fs.FileSystem
    path: str
    """Within the filesystem."""
    root: str
    """An address is `root` and the path without its `base`."""
    base: str = ""

    def address(self, path: str) -> str:
        return self.root + path.removeprefix(self.base)


@contextlib.contextmanager
def as_os_errors() -> Iterator[None]:
    """What a connection's own library raises becomes an OSError; errors of ours and of Python's stay what they are."""
    try:
        yield
    except (OSError, DstuneError):
        raise
    except Exception as error:
        if isinstance(error, pa.ArrowException) or type(error).__module__.partition(".")[0] not in (
            "builtins",
            "dstune",
        ):
            raise OSError(first_line(error)) from error
        raise


def filesystem(address: str) -> _There:
    """The filesystem behind an address. Raises ConfigError for a kind that cannot be opened here."""
    scheme, _, rest = address.partition("://")
    host, _, path = rest.partition("/")
    user, at, _ = host.rpartition("@")
    if at and ":" in user:
        shown = address.replace(user, "…")
        raise ConfigError(Problem(shown, "a password in an address", "none", "credentials come from the environment"))
    if scheme in ("s3", "s3a", "gs", "gcs"):
        if not host:
            raise ConfigError(Problem(address, "no bucket in this address", f"{scheme}://BUCKET/…"))
        return _There(_s3(host) if scheme in ("s3", "s3a") else _gs(), rest.rstrip("/"), f"{scheme}://")
    if scheme == "file":
        return _There(fs.LocalFileSystem(), rest, "file://")
    if scheme in _BY_ARROW:
        system, base = _by_arrow(f"{scheme}://{host}")
        base = base.rstrip("/")
        return _There(system, f"{base}/{path}".rstrip("/"), f"{scheme}://{host}", base)
    return _by_fsspec(address)


def _s3(bucket: str) -> fs.FileSystem:
    """As the environment says now; a connection is kept for as long as it says the same."""
    environment = os.environ
    endpoint = environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL") or ""
    region = environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION")
    if region is None:
        region = "us-east-1" if endpoint else _region(bucket)
    anonymous = environment.get("AWS_NO_SIGN_REQUEST", "").lower() in ("1", "yes", "true")
    attempts = _attempts(environment.get("AWS_MAX_ATTEMPTS", ""))
    return _connected(region, endpoint, anonymous, environment.get("AWS_ACCESS_KEY_ID"), attempts)


def _attempts(written: str) -> int:
    if written and not (written.isdecimal() and int(written)):
        raise ConfigError(Problem("AWS_MAX_ATTEMPTS", repr(written), "how often a request is tried: 1 or more"))
    return int(written or _MAX_ATTEMPTS)


@functools.lru_cache(maxsize=32)
def _connected(region: str, endpoint: str, anonymous: bool, key: str | None, attempts: int) -> fs.FileSystem:
    """`key` only tells connections apart: pyarrow reads the credentials itself."""
    parts = urllib.parse.urlsplit(endpoint)
    return fs.S3FileSystem(
        region=region,
        scheme=parts.scheme or "https",
        endpoint_override=parts.netloc or None,
        anonymous=anonymous,
        connect_timeout=_CONNECT_SECONDS,
        request_timeout=_REQUEST_SECONDS,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=attempts),
    )


@functools.lru_cache(maxsize=32)
def _region(bucket: str) -> str:
    try:
        return fs.resolve_s3_region(bucket)
    except OSError as error:
        came = f"the bucket's region cannot be asked for: {first_line(error)}"
        raise ConfigError(Problem(f"s3://{bucket}", came, do="set AWS_REGION, or AWS_ENDPOINT_URL")) from None


@functools.lru_cache(maxsize=1)
def _gs() -> fs.FileSystem:
    return fs.GcsFileSystem(retry_time_limit=datetime.timedelta(seconds=_REQUEST_SECONDS))


@functools.lru_cache(maxsize=32)
def _by_arrow(root: str) -> tuple[fs.FileSystem, str]:
    try:
        return fs.FileSystem.from_uri(root)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ConfigError(Problem(root, f"cannot be opened: {first_line(error)}")) from None


def _by_fsspec(address: str) -> _There:
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(address)
    except ImportError as error:
        raise ConfigError(Problem(address, f"this kind of address wants a package: {error}")) from None
    except (ValueError, OSError) as error:
        known = "a path, http(s)://, s3://, gs://, hf:// or what fsspec knows"
        raise ConfigError(Problem(address, f"this kind of address: {first_line(error)}", known)) from None
    written = address.removesuffix("/")
    root = written.removesuffix(path) if written.endswith(path) else address.partition("://")[0] + "://"
    return _There(fs.PyFileSystem(fs.FSSpecHandler(system)), path, root)


def find(address: str, wanted: Iterable[str]) -> list[str]:
    """The addresses of the files that `address` names: itself, a pattern's matches, or those below it that end in `wanted`.

    Sorted; empty where there are none. Raises ConfigError, and OSError where the other side cannot be asked.
    """
    with as_os_errors():
        there = filesystem(address)
        if glob.has_magic(there.path):
            start = posixpath.dirname(re.split(r"[*?\[]", there.path, maxsplit=1)[0])
            deep = "/" in there.path[len(start) :].lstrip("/") or "**" in there.path
            matches = _pattern(there.path)
            found = [file for file in _below(there.system, start, deep) if matches.fullmatch(file)]
        else:
            (info,) = there.system.get_file_info([there.path])
            if info.type == fs.FileType.File:
                return [address]
            below = _below(there.system, there.path, deep=True) if info.type == fs.FileType.Directory else []
            found = [file for file in below if plain_suffix(file) in wanted]
        return [there.address(file) for file in sorted(found)]


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
