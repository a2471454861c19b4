"""Tiny real runs for tests: a run file, an executor of plain processes, and what "exact" compares."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from dstune import worker
from dstune.checkpoint.reader import Reader
from dstune.config.load import load_run
from dstune.launch import rundir, start
from dstune.launch.attempts import DriveLimits
from dstune.launch.driver import DriveEnd, Observer
from dstune.paths import RunPaths, step_directory
from dstune.protocols import AttemptOutcome
from tests.spawn import free_port, read_lines, start_worker, worker_environment

TINY_LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
"""Put over builtin:tiny-llama: small enough that starting the processes is what takes the time."""


def write_run(folder: Path, name: str = "tiny", **sections: Mapping[str, Any]) -> Path:
    """A run file of 12 steps over 2 workers; each keyword replaces keys of that section."""
    document: dict[str, Any] = {
        "name": name,
        "model": {"path": "builtin:tiny-llama", "overrides": TINY_LLAMA},
        "data": {
            "sources": [{"path": "builtin:instructions", "limit": 400}],
            "max_length": 128,
            "num_processes": 1,
        },
        "train": {"global_batch_size": 4, "micro_batch_size": 2, "max_steps": 12, "lr": 1e-3, "warmup_steps": 2},
        "cluster": {"workers": 2},
        "checkpoint": {"every": 3, "keep": 100},
        "report": {"console": "plain"},
    }
    for section, values in sections.items():
        document.setdefault(section, {}).update(values)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.yaml"
    with path.open("w", encoding="utf-8") as file:
        YAML().dump(document, file)
    return path


class ProcessExecutor:
    """`protocols.Executor` with one plain process a worker, for tests of everything but Ray."""

    def __init__(self, workers: int, entry: Callable[..., object] = worker.main) -> None:
        self.workers, self.entry = workers, entry
        self.processes: list[BaseProcess] = []

    def available_workers(self) -> int:
        return self.workers

    def run(self, run_directory: str, attempt: int, world_size: int, environment: Mapping[str, str]) -> AttemptOutcome:
        port = free_port()
        self.processes = [
            start_worker(
                self.entry,
                run_directory,
                attempt,
                environment=worker_environment(rank, world_size, port) | dict(environment),
            )
            for rank in range(world_size)
        ]
        for process in self.processes:
            process.join()
        codes = [process.exitcode for process in self.processes]
        failed = tuple(rank for rank, code in enumerate(codes) if code)
        return AttemptOutcome("failed", f"exit codes {codes}", failed) if failed else AttemptOutcome("finished")

    def kill(self) -> None:
        for process in self.processes:
            process.kill()

    def close(self) -> None:
        self.kill()


def drive(
    run: str | Path,
    workers: int,
    *,
    new: bool,
    max_failures: int = 0,
    observe: Observer | None = None,
    entry: Callable[..., object] = worker.main,
) -> DriveEnd:
    """Start (or go on with) a run on plain processes, each of which calls `entry(run_directory, attempt)`."""
    if new:
        loaded = load_run(run)
        paths = rundir.create(loaded)
    else:
        paths = rundir.find(run)
        loaded = rundir.load(paths)
    prepared = start.open_prepared(loaded, paths)
    group = loaded.config.cluster.group
    limits = DriveLimits(workers_wanted=workers, workers_min=1, max_failures=max_failures, group=group)
    return start.drive_with(loaded, paths, prepared, ProcessExecutor(workers, entry), limits, observe or Observer())


def finished(run: Path, workers: int = 2) -> RunPaths:
    """A new run, driven to its end on plain processes."""
    end = drive(run, workers, new=True)
    assert end.state == "succeeded", end
    return rundir.find(run)


def metrics(paths: RunPaths, name: str) -> list[Any]:
    """One column of metrics.jsonl; every step once and in order is part of what is checked."""
    records = read_lines(paths.metrics)
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return [record[name] for record in records]


def weights_hash(paths: RunPaths, step: int) -> str:
    """SHA-256 over the fp32 masters of a checkpoint, by name, whatever the number of workers that wrote it."""
    return state_hash(step_directory(paths.checkpoints, step), "fp32")


def state_hash(checkpoint: Path, state: str) -> str:
    """SHA-256 over one state (`fp32`, `exp_avg`, …) of a checkpoint."""
    reader = Reader(checkpoint)
    digest = hashlib.sha256()
    for name in sorted(reader.tensors(state)):
        digest.update(name.encode())
        digest.update(reader.read(state, name).numpy().tobytes())
    return digest.hexdigest()


def assert_exact(one: RunPaths, other: RunPaths) -> None:
    """Losses to the last digit, digests and final weights are equal."""
    steps = len(read_lines(one.metrics))
    assert metrics(one, "loss") == metrics(other, "loss")
    assert metrics(one, "batch_digest") == metrics(other, "batch_digest")
    assert weights_hash(one, steps) == weights_hash(other, steps)


def dstune(*words: str | Path, cwd: Path | None = None, environment: Mapping[str, str] | None = None) -> Any:
    """Start a `dstune` command in a session of its own (so that all of it can be killed)."""
    return subprocess.Popen(
        [sys.executable, "-m", "dstune.cli.main", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=os.environ
        | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
        | dict(environment or {}),
        start_new_session=True,
    )
