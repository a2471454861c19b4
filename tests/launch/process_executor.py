"""An executor of plain processes, and a run directory for the stub worker: what driver tests need, without a Ray."""

import json
import os
import socket
import threading
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from dstune.atomic import write_json
from dstune.launch.fence import started
from dstune.paths import RunPaths
from dstune.protocols import AttemptOutcome
from tests.spawn import start_worker

ROOT = Path(__file__).parent.parent.parent


class ProcessExecutor:
    """One process a rank; the first that fails ends the others. `room`: what `available_workers` says."""

    def __init__(self, room: int = 2) -> None:
        self.room = room
        self.worlds: list[int] = []
        self._processes: list[BaseProcess] = []
        self._killed = threading.Event()

    def available_workers(self) -> int:
        return self.room

    def run(self, run_directory: str, attempt: int, world_size: int, environment: Mapping[str, str]) -> AttemptOutcome:
        self.worlds.append(world_size)
        base = os.environ | {"WORLD_SIZE": str(world_size), "OMP_NUM_THREADS": "1"} | dict(environment)
        work = (_work, Path(run_directory), attempt)
        self._processes = [start_worker(*work, environment=base | {"RANK": str(rank)}) for rank in range(world_size)]
        if self._killed.is_set():
            self.kill()
        here = socket.gethostname()
        pids = [process.pid for process in self._processes]
        seats = [{"rank": rank, "node": here, "pid": pid, "started": started(pid)} for rank, pid in enumerate(pids)]
        write_json(RunPaths(Path(run_directory)).workers(attempt), seats)
        return self._join()

    def kill(self) -> None:
        self._killed.set()
        for process in self._processes:
            process.kill()

    def close(self) -> None:
        self.kill()

    def _join(self) -> AttemptOutcome:
        failed: dict[int, int] = {}
        waiting = dict(enumerate(self._processes))
        while waiting and not failed:
            for rank, process in list(waiting.items()):
                process.join(0.05)
                if process.exitcode is None:
                    continue
                del waiting[rank]
                if process.exitcode:
                    failed[rank] = process.exitcode
        for process in waiting.values():
            process.kill()
            process.join()
        if not failed:
            return AttemptOutcome("finished")
        died = [
            f"worker {rank} on node {socket.gethostname()} died: signal {-code}"
            for rank, code in failed.items()
            if code < 0
        ]
        return AttemptOutcome("failed", "; ".join(died), tuple(failed))


def _work(run_directory: Path, attempt: int) -> None:
    from tests.launch import stub_worker  # torch comes with it, which nobody else here needs

    # A fork of a driver holds its lock; no real worker does.
    open_files = [entry for entry in Path("/proc/self/fd").iterdir() if entry.exists()]
    for entry in [one for one in open_files if one.samefile(RunPaths(run_directory).lock)]:
        os.close(int(entry.name))
    stub_worker.main(run_directory, attempt)


def stub_run(root: Path, **stub: Any) -> RunPaths:
    """A run directory of `stub` (see stub_worker)."""
    paths = RunPaths(root)
    paths.make()
    write_json(root / "stub.json", {"steps": 20, "commit_every": 5, "seconds": 0.01} | stub)
    return paths


def hurry(paths: RunPaths) -> None:
    """Let the steps of a stub that starts from now on take no time."""
    file = paths.root / "stub.json"
    write_json(file, json.loads(file.read_text()) | {"seconds": 0.0})


def planner(paths: RunPaths) -> Any:
    """A `make_plan` that writes what the stub worker reads."""

    def make_plan(attempt: int, world_size: int, resume_from: Path | None, start_step: int) -> None:
        source = str(resume_from) if resume_from else None
        write_json(paths.plan(attempt), {"world_size": world_size, "resume_from": source, "start_step": start_step})

    return make_plan


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps(paths: RunPaths) -> list[int]:
    return [record["step"] for record in lines(paths.metrics)]


def events(paths: RunPaths, kind: str) -> list[dict[str, Any]]:
    return [record for record in lines(paths.events) if record["event"] == kind]
