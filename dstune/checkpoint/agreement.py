"""Acts that all workers do, or worker 0 alone, and whose failure is everybody's: nobody waits for one that gave up."""

import socket
import time
from collections.abc import Callable
from typing import Any

from dstune.errors import CheckpointError, DstuneError, Problem
from dstune.loggers import get_logger
from dstune.protocols import Control

_log = get_logger(__name__)


def agreed(control: Control, act: str, work: Callable[[], Any], only_first: bool = False) -> list[Any]:
    """Each worker's (or only worker 0's) result of `work`, on all; CheckpointError on all where one raised.

    A collective call; results are JSON-like.
    NOTE: nobody may leave alone between two collectives, or the others would wait for it: hence every exception is caught.
    """
    answer: dict[str, Any] = {}
    if control.rank == 0 or not only_first:
        try:
            answer = {"value": work()}
        except Exception as error:  # noqa: BLE001
            _log.error("checkpoint: cannot %s", act, exc_info=not isinstance(error, (OSError, DstuneError)))
            answer = {"error": _words(error), "time": time.time(), "rank": control.rank, "node": socket.gethostname()}
    answers = [control.broadcast(answer)] if only_first else control.gather(answer)
    failures = sorted((answer for answer in answers if "error" in answer), key=lambda answer: answer["time"])
    if failures:
        first = failures[0]
        where = f"checkpoint: {act}, worker {first['rank']} on {first['node']}"
        raise CheckpointError(Problem(where, first["error"], do="The checkpoints committed before are untouched."))
    return [answer["value"] for answer in answers]


def _words(error: Exception) -> str:
    if isinstance(error, OSError):
        text = error.strerror or str(error)
        return f"{text} ({error.filename})" if error.filename else text
    return str(error) if isinstance(error, DstuneError) else repr(error)
