"""Where a prepared directory comes to stand: built beside its place under a lock, renamed into it whole."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from dstune import atomic
from dstune.loggers import get_logger

log = get_logger(__name__)

_TEMPORARY = ".tmp"
_LOCK = ".lock"


def build_once(final: Path, build: Callable[[Path], None]) -> bool:
    """Make `final` by `build(temporary directory)`, unless it is there; True where this call made it.

    Of two processes one builds and the other waits for it. A killed build leaves nothing under `final`'s name; what it left
    beside it is deleted by the next build in the same cache. Raises what `build` raises, with nothing left behind.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    with _exclusive(final) as locked:
        if final.exists():
            return False
        if locked:
            _clean(final.parent, final)
        temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=_TEMPORARY, dir=final.parent))
        try:
            temporary.chmod(0o755)
            build(temporary)
            atomic.commit_directory(temporary, final)
        except OSError:
            # Where the file system has no locks, another process may have been faster with the same content.
            if not final.exists():
                raise
            return False
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return True


@contextlib.contextmanager
def _exclusive(final: Path) -> Iterator[bool]:
    """Hold the lock of `final`, waiting for whoever holds it; False where this file system knows no locks."""
    path = _lock_of(final)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            locked = _lock(descriptor, final)
            if locked and not _is_named(descriptor, path):
                continue
            try:
                yield locked
            finally:
                if locked:
                    path.unlink(missing_ok=True)
            return
        finally:
            os.close(descriptor)


def _lock(descriptor: int, final: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log.info("another process prepares %s; waiting for it", final.name)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


def _is_named(descriptor: int, path: Path) -> bool:
    """Whether the locked file still has its name: its last holder removes it, and then it locks nothing."""
    try:
        named = path.stat()
    except FileNotFoundError:
        return False
    held = os.fstat(descriptor)
    return (named.st_dev, named.st_ino) == (held.st_dev, held.st_ino)


def _lock_of(final: Path) -> Path:
    return final.with_name(f".{final.name}{_LOCK}")


def _clean(folder: Path, own: Path) -> None:
    """Delete what killed builds left: temporary directories whose lock nobody holds."""
    for leftover in folder.glob(f".*{_TEMPORARY}"):
        final = folder / leftover.name.removeprefix(".").removesuffix(_TEMPORARY).rpartition(".")[0]
        if final == own or _is_free(final):
            log.info("deleting %s, left by a preparation that was killed", leftover)
            shutil.rmtree(leftover, ignore_errors=True)


def _is_free(final: Path) -> bool:
    try:
        descriptor = os.open(_lock_of(final), os.O_RDWR)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    else:
        return True
    finally:
        os.close(descriptor)
