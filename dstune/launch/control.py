"""Stop requests: one file in the run directory, written by whoever wants a stop, polled by worker 0 at the end of a step."""

import json
import os
import time
from typing import Any

from dstune.atomic import write_json
from dstune.paths import RunPaths

USER = "stop"
"""The reason of `dstune stop`: it holds for the next drive too, until a resume takes it back."""


def request_stop(paths: RunPaths, reason: str) -> None:
    """Ask the run to commit and stop at the end of a step. The first request stands; a user's replaces another."""
    current = stop_requested(paths)
    if current is not None and (reason != USER or current["reason"] == USER):
        return
    paths.control.mkdir(parents=True, exist_ok=True)
    write_json(paths.stop_request, {"reason": reason, "time": round(time.time(), 3), "pid": os.getpid()})


def stop_requested(paths: RunPaths) -> dict[str, Any] | None:
    """The request that stands, `{"reason", "time", "pid"}`, or None."""
    try:
        return json.loads(paths.stop_request.read_text("utf-8"))
    except FileNotFoundError:
        return None


def clear(paths: RunPaths) -> None:
    """Take every request back (a resume, or a request that has been answered)."""
    paths.stop_request.unlink(missing_ok=True)


def clear_stale(paths: RunPaths) -> None:
    """Before a drive: forget what a signal asked of an earlier driver; what a user asked for still holds."""
    request = stop_requested(paths)
    if request is not None and request["reason"] != USER:
        clear(paths)
