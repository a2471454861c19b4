"""An executor of plain processes, and a run directory for the stub worker: what driver tests need, without a Ray."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dstune.atomic import write_json
from dstune.launch.fence import started
from dstune.paths import RunPaths
from dstune.protocols import AttemptOutcome

ROOT = Path(__file__).parent.parent.parent
_MAIN = "import sys; from pathlib import Path; from tests.launch import stub_worker; stub_worker.main(Path(sys.argv[1]), int(sys.argv[2]))"


class ProcessExecutor:
    """One process a rank; the first that fails ends the others. `room`: what `available_workers` says."""

    def __init__(self, room: int = 2) -> None:
        self.room = room
        self.worlds: list[int] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._killed = threading.Event()

    def available_workers(self) -> int:
        return self.room

    def run(self, run_directory: str, attempt: int, world_size: int, environment: Mapping[str, str]) -> AttemptOutcome:
        self.worlds.append(world_size)
        base = (
            os.environ
            | {"PYTHONPATH": str(ROOT), "WORLD_SIZE": str(world_size), "OMP_NUM_THREADS": "1"}
            | dict(environment)
        )
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-c", _MAIN, run_directory, str(attempt)],
                env=base | {"RANK": str(rank)},
                stderr=subprocess.DEVNULL,
            )
            for rank in range(world_size)
        ]
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
                try:
                    code = process.wait(0.05)
                except subprocess.TimeoutExpired:
                    continue
                del waiting[rank]
                if code:
                    failed[rank] = code
        for process in waiting.values():
            process.kill()
            process.wait()
        if not failed:
            return AttemptOutcome("finished")
        died = [
            f"worker {rank} on node {socket.gethostname()} died: signal {-code}"
            for rank, code in failed.items()
            if code < 0
        ]
        return AttemptOutcome("failed", "; ".join(died), tuple(failed))


def stub_run(root: Path, **stub: Any) -> RunPaths:
    """A run directory of `stub` (see stub_worker)."""
    paths = RunPaths(root)
    paths.make()
    write_json(root / "stub.json", {"steps": 20, "commit_every": 5, "seconds": 0.01} | stub)
    return paths


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
