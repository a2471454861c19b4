"""Run a plain function on several gloo workers: processes of their own, a free port chosen by the kernel, one thread each.

Importing torch, transformers and DeepSpeed takes a worker longer than most tests train: workers are forks of one process that
has imported them and done nothing else (warm.py). What only a new interpreter shows (its end; hashes of strings that differ from
worker to worker) is left to the runs under torchrun, srun and Ray.
"""

import json
import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np

_forks: BaseContext = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["tests.warm"])


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def worker_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]),
    }


def start_worker(
    function: Callable[..., object], *arguments: Any, environment: Mapping[str, str], log: str | Path = os.devnull
) -> BaseProcess:
    """Call `function(*arguments)` in a process with this environment; what it says, and why it failed, goes to `log`."""
    process = _forks.Process(target=_work, args=(function, arguments, dict(environment), str(log)))
    process.start()
    return process


def _work(function: Callable[..., object], arguments: Any, environment: dict[str, str], log: str) -> None:
    global _forks
    _forks = multiprocessing.get_context("fork")  # what a worker starts is as warm as itself
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.clear()
    os.environ.update(environment)
    np.random.seed()  # forks would draw alike where fresh processes do not
    function(*arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads may still wait for a rank that has ended, and abort where Python takes them down


def _keep_result(function: Callable[..., object], arguments: Any, result: Path) -> None:
    result.write_bytes(pickle.dumps(function(*arguments)))


def run_workers(function: Any, world_size: int, *arguments: Any, seconds: float = 300) -> list[Any]:
    """Call `function(*arguments)` on every rank; results by rank. The first failing rank's stderr is the error."""
    with tempfile.TemporaryDirectory() as folder:
        results = [Path(folder) / f"result-{rank}" for rank in range(world_size)]
        logs = [Path(folder) / f"log-{rank}" for rank in range(world_size)]
        port, end = free_port(), time.monotonic() + seconds
        processes: list[BaseProcess] = []
        try:
            for rank in range(world_size):
                environment = worker_environment(rank, world_size, port)
                work = (_keep_result, function, arguments, results[rank])
                processes.append(start_worker(*work, environment=environment, log=logs[rank]))
            for process in processes:
                process.join(max(0.0, end - time.monotonic()))
            codes = [process.exitcode for process in processes]  # None: still at it after all these seconds
        finally:
            for process in processes:
                process.kill()
                process.join()
        if any(code != 0 for code in codes):
            texts = [
                f"--- rank {rank} exit {code}\n{logs[rank].read_text()[-4000:]}" for rank, code in enumerate(codes)
            ]
            raise AssertionError("\n".join(texts))
        return [pickle.loads(result.read_bytes()) for result in results]


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
