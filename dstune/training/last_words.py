"""What a worker leaves where it fails: its traceback for a person, and the facts by which the driver finds the cause."""

import socket
import time
import traceback

import torch

from dstune import loggers
from dstune.atomic import write_json, write_text
from dstune.errors import DstuneError
from dstune.paths import RunPaths

log = loggers.get_logger(__name__)

_COLLATERAL_MARKS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket Timeout", "NCCL")
"""What a worker says whose neighbour is gone: never the root of a failure."""


def leave_failure(paths: RunPaths, attempt: int, rank: int, error: BaseException) -> None:
    """Write the traceback for a person, and the facts for the driver (the earliest non-collateral failure is the cause)."""
    text = "".join(traceback.format_exception(error))
    log.error("%s", text)
    write_text(paths.rank_error(rank), text)
    facts = {
        "time": time.time(),
        "rank": rank,
        "node": socket.gethostname(),
        "kind": type(error).__name__,
        "message": str(error),
        "collateral": _is_collateral(error),
        "exit_status": error.exit_status if isinstance(error, DstuneError) and error.final else None,
    }
    write_json(paths.rank_failure(attempt, rank), facts)


def _is_collateral(error: BaseException) -> bool:
    if isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in _COLLATERAL_MARKS)
