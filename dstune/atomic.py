"""Files and directories that exist whole or not at all: written beside their place, flushed to the disk, renamed into it."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

_HASH_BLOCK_BYTES = 1 << 20


def fsync_directory(directory: Path) -> None:
    """Make the names in `directory` durable (a rename is only safe once its parent is flushed)."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def durable_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file opened for writing that is flushed to the disk before it is closed; its name is not yet durable."""
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` by `content`: after a crash at any moment it holds the old bytes or the new ones."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with durable_file(temporary) as file:
            file.write(content)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of `text` in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def dump_json(value: Any) -> str:
    """JSON as every file of dstune has it: two spaces, UTF-8, keys in their given order, no NaN, a newline at the end."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """`write_text` of `value` as JSON."""
    write_text(path, dump_json(value))


def append_line(path: Path, line: str) -> None:
    """Add one line to a log of lines in a single write, so that two writers never mix within a line.

    Behind a line that a full disk has cut short it begins a new one. Raises OSError where it could not be written whole.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        written = ("\n" * torn + line + "\n").encode("utf-8")
        if os.write(descriptor, written) < len(written):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(descriptor)


def commit_directory(temporary: Path, final: Path) -> None:
    """Rename the finished directory `temporary` to `final`, durably. Its files must be flushed already (`durable_file`).

    Raises FileExistsError where `final` exists already: a commit never replaces a commit.
    """
    if final.exists():
        raise FileExistsError(f"{final} exists")
    fsync_directory(temporary)
    temporary.rename(final)
    fsync_directory(final.parent)


def remove_directory(directory: Path) -> None:
    """Delete a directory such that a crash in the middle leaves nothing under its own name."""
    doomed = directory.with_name(f".{directory.name}.{os.getpid()}.deleting")
    directory.rename(doomed)
    fsync_directory(directory.parent)
    remove_tree(doomed)


def remove_tree(path: Path) -> None:
    """Delete a directory and all in it; of a link, or a file, that alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def sha256_file(path: Path) -> str:
    """SHA-256 of the file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def read_json_lines(path: Path) -> Iterable[dict[str, Any]]:
    """The records of a log of lines that dstune itself wrote; what is none (a line cut by a full disk or a crash) is left out."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n") and (record := json_record(line)) is not None:
                yield record


def json_record(line: bytes) -> dict[str, Any] | None:
    """A line of such a log; None where it is damaged."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
