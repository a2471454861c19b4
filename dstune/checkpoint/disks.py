"""Which workers see the same disk: found by looking for each other's files, whatever the disks and the nodes are called."""

import contextlib
import secrets
import socket
from collections.abc import Sequence
from pathlib import Path

from dstune.checkpoint.agreement import agreed
from dstune.errors import CheckpointError, ConfigError, Problem
from dstune.protocols import Control


def leaders(directory: Path, control: Control) -> list[int]:
    """For each worker, by rank, the lowest rank that has the same `directory`: all 0 where they share one.

    A collective call; `directory` may be another path on each worker. Raises ConfigError on every worker where one of them cannot
    write there.
    """
    token = control.broadcast(secrets.token_hex(8))
    marks = [directory / f".seen-{token}-{rank:05d}" for rank in range(control.world_size)]

    def leave_mark() -> None:
        directory.mkdir(parents=True, exist_ok=True)
        marks[control.rank].touch()

    try:
        agreed(control, "write to the directory", leave_mark)
        # NOTE: nobody takes its mark away before all have looked.
        return agreed(control, "look at the directory", lambda: _first_seen(marks))
    except CheckpointError as error:
        came = f"{error.problems[0].where}: {error.problems[0].came}"
        raise ConfigError(Problem("checkpoint.dir", came, "a directory that every worker can write to")) from None
    finally:
        with contextlib.suppress(OSError):  # where no mark could be left, none is there to be taken away
            marks[control.rank].unlink()


def _first_seen(marks: Sequence[Path]) -> int:
    return next(rank for rank, mark in enumerate(marks) if mark.exists())


def require_shared(directory: Path, found: Sequence[int], control: Control) -> None:
    """Raises ConfigError on every worker where `directory` is not one that all share (`found`: what `leaders` said).

    A collective call.
    """
    nodes = control.gather(socket.gethostname())
    apart = [f"{rank} ({nodes[rank]})" for rank, leader in enumerate(found) if leader != 0]
    if not apart:
        return
    shown = ", ".join(apart[:4]) + (f" and {len(apart) - 4} more" if len(apart) > 4 else "")
    came = f"{directory} is on a disk of its own on each node: what worker 0 ({nodes[0]}) writes there, worker {shown} does not see"
    do = (
        "name a directory on a shared file system, or an object store (`checkpoint.dir: s3://BUCKET/…`): "
        "each node then only stages on its own disk (`checkpoint.staging`)"
    )
    raise ConfigError(Problem("checkpoint.dir", came, "a directory that all nodes share", do))
