"""A worker without a model: it keeps the files that a real one would, one step every few milliseconds, by the run's stub.json.

stub.json: {"steps": N, "commit_every": n, "seconds": s, "checks": it reads what it resumes from, "fail": {"rank", "step", "kind",
"attempts"}, "die": {"rank", "step", "attempts"}}.
Ranks go on by themselves except for the end: rank 0 alone keeps the books.
"""

import json
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import torch

from dstune.atomic import append_line, write_json
from dstune.checkpoint import commit as checkpoint_commit
from dstune.checkpoint.reader import Reader
from dstune.errors import DataError
from dstune.launch import control, fence
from dstune.paths import RunPaths, step_directory
from dstune.protocols import Slice
from dstune.records.sinks import EventLog


def main(run_directory: Path, attempt: int) -> None:
    paths = RunPaths(run_directory)
    fence.hold(paths)
    rank = int(os.environ["RANK"])
    stub = json.loads((run_directory / "stub.json").read_text())
    plan = json.loads(paths.plan(attempt).read_text())
    pause = threading.Event()
    try:
        if stub.get("checks") and plan["resume_from"]:
            Reader(Path(plan["resume_from"])).read("fp32", "weight")
        for step in range(plan["start_step"] + 1, stub["steps"] + 1):
            pause.wait(stub.get("seconds", 0.01) if not _waits_for_a_lost_neighbour(stub, rank, step, attempt) else 600)
            _mishaps(paths, stub, rank, step, attempt)
            stopping = control.stop_requested(paths)
            if rank == 0:
                _keep_books(paths, stub, attempt, step, stopping)
            if stopping:
                return
        if rank == 0:
            commit(paths, stub["steps"])
            write_json(paths.outcome(attempt), {"state": "succeeded", "step": stub["steps"], "reason": "done"})
    except Exception as error:
        paths.rank_error(rank).write_text(f"Traceback of rank {rank}\n{error}")
        final = {"exit_status": error.exit_status if isinstance(error, DataError) else None}
        record = {"time": time.time(), "rank": rank, "node": socket.gethostname(), "collateral": False}
        write_json(
            paths.rank_failure(attempt, rank), record | {"kind": type(error).__name__, "message": str(error)} | final
        )
        raise


def _keep_books(
    paths: RunPaths, stub: dict[str, Any], attempt: int, step: int, stopping: dict[str, Any] | None
) -> None:
    record = {"step": step, "loss": 1.0 / step, "world": int(os.environ["WORLD_SIZE"]), "attempt": attempt}
    append_line(paths.metrics, json.dumps(record | {"lr": 0.1, "tokens_per_second": 1.0}))
    if stopping or step % stub.get("commit_every", 5) == 0:
        commit(paths, step)
    if stopping:
        write_json(paths.outcome(attempt), {"state": "stopped", "step": step, "reason": stopping["reason"]})


class Alone:
    """A control group of one."""

    rank, world_size = 0, 1

    def barrier(self) -> None:
        pass

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def broadcast(self, value: Any) -> Any:
        return value


def commit(paths: RunPaths, step: int) -> None:
    """A real, whole checkpoint of one small tensor."""
    if step_directory(paths.checkpoints, step).exists():
        return
    pieces = [Slice("fp32", "weight", (4,), 0, torch.full((4,), float(step)))]
    checkpoint_commit.save(paths.checkpoints, step, pieces, {"step": step}, Alone(), {})
    EventLog(paths.events).event("commit", step=step)


def _waits_for_a_lost_neighbour(stub: dict[str, Any], rank: int, step: int, attempt: int) -> bool:
    """What a collective does where another worker failed at the last step."""
    mishaps = [stub[what] for what in ("fail", "die") if what in stub]
    return any(attempt in m["attempts"] and rank != m["rank"] and step > m["step"] for m in mishaps)


def _mishaps(paths: RunPaths, stub: dict[str, Any], rank: int, step: int, attempt: int) -> None:
    for what in ("fail", "die"):
        mishap = stub.get(what)
        if mishap and mishap["rank"] == rank and step == mishap["step"] and attempt in mishap["attempts"]:
            _await_books(paths, rank, step - 1)
            if what == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            raise {"ValueError": ValueError, "DataError": DataError}[mishap["kind"]]("bad luck")


def _await_books(paths: RunPaths, rank: int, step: int) -> None:
    """What a collective does too: nobody is at this step before worker 0 has the last one behind it (its commit as well)."""
    pause = threading.Event()
    while rank != 0 and not _noted(paths, step):
        pause.wait(0.01)


def _noted(paths: RunPaths, step: int) -> bool:
    return paths.metrics.exists() and any(f'"step": {step},' in line for line in paths.metrics.read_text().splitlines())
