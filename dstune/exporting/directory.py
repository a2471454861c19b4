"""The directory of an export: written beside its place, flushed, renamed into it."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from dstune.atomic import commit_directory
from dstune.errors import Problem, RunFailed, UsageError


def require_new(out: Path) -> None:
    """Raises UsageError where `out` is there: an export replaces nothing."""
    if os.path.lexists(out):  # a link that leads nowhere is in the way too
        raise UsageError(Problem(str(out), "exists already", do="Name another directory, or remove this one."))


@contextlib.contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A place to write in, which becomes `out` at the end; nothing is left of it after an error.

    Raises UsageError where `out` exists, RunFailed where it cannot be written.
    """
    require_new(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir()
        yield temporary
        _flush(temporary)
        commit_directory(temporary, out)
    except FileExistsError:
        raise UsageError(Problem(str(out), "was made by someone else meanwhile")) from None
    except OSError as error:
        raise RunFailed(Problem(str(out), f"could not be written: {error.strerror or error}")) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _flush(directory: Path) -> None:
    """Make every file durable before the directory gets its name."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
