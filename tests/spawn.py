"""Run a plain function on several gloo workers: fresh processes, a free port chosen by the kernel, one thread each."""

import json
import os
import pickle
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

_MAIN = """
import os, pickle, sys
with open(sys.argv[1], "rb") as file:
    function, arguments = pickle.load(file)
result = function(*arguments)
with open(sys.argv[2], "wb") as file:
    pickle.dump(result, file)
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)  # gloo's threads may still wait for a rank that has ended, and abort where Python takes them down
"""


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


def run_workers(function: Any, world_size: int, *arguments: Any, seconds: float = 300) -> list[Any]:
    """Call `function(*arguments)` on every rank; results by rank. The first failing rank's stderr is the error."""
    with tempfile.TemporaryDirectory() as folder:
        task = Path(folder) / "task"
        task.write_bytes(pickle.dumps((function, arguments)))
        results = [Path(folder) / f"result-{rank}" for rank in range(world_size)]
        logs = [Path(folder) / f"log-{rank}" for rank in range(world_size)]
        port = free_port()
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", _MAIN, str(task), str(results[rank])],
                env=worker_environment(rank, world_size, port),
                stdout=logs[rank].open("wb"),
                stderr=subprocess.STDOUT,
            )
            for rank in range(world_size)
        ]
        try:
            codes = [process.wait(timeout=seconds) for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if any(codes):
            texts = [
                f"--- rank {rank} exit {code}\n{logs[rank].read_text()[-4000:]}" for rank, code in enumerate(codes)
            ]
            raise AssertionError("\n".join(texts))
        return [pickle.loads(result.read_bytes()) for result in results]


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
