"""A planned attempt of a small run, and the workers of it: what the benchmarks that train have in common."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_WATCH_SECONDS = 0.01


def make_run(
    folder: Path,
    model: dict[str, Any],
    train: dict[str, Any],
    workers: int,
    max_length: int,
    model_settings: Mapping[str, Any] = {},
    **more: Any,
) -> Path:
    """The run directory of a planned attempt, as the launcher would write it; `model` overrides a tiny Llama's config.

    Inside `folder`; `model_settings`: more of its section; `more`: values of any section. DSTUNE_CACHE is set to a directory there.
    """
    from ruamel.yaml import YAML

    from dstune import api
    from dstune.config.load import load_run
    from dstune.launch import rundir, start
    from dstune.planning.deepspeed import merged

    document = {
        "name": "bench",
        "model": {"path": "builtin:tiny-llama", "overrides": model, **model_settings},
        "data": {"sources": [{"path": "builtin:instructions"}], "max_length": max_length, "num_processes": 2},
        "train": train,
        "cluster": {"workers": workers},
    }
    path = folder / "bench.yaml"
    with path.open("w", encoding="utf-8") as file:
        YAML().dump(merged(document, more), file)
    os.environ["DSTUNE_CACHE"] = str(folder / "cache")
    run = load_run(path)
    prepared = api.prepare(run)
    paths = rundir.create(run)
    start.Planner(run, paths, start.data_facts(run.config, prepared), by_ray=False)(1, workers, None, 0)
    return paths.root


def llama(hidden: int, layers: int) -> dict[str, Any]:
    """A Llama's shape of `hidden` channels: heads of 64, the feed-forward eight thirds as wide."""
    heads = hidden // 64
    return {
        "hidden_size": hidden,
        "intermediate_size": hidden * 8 // 3 // 16 * 16,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": 64,
    }


def spawn(
    module: str, workers: int, arguments: list[str], threads: int = 1, watch: Callable[[list[int]], None] | None = None
) -> None:
    """Run `python -m module arguments` as `workers` ranks of one gloo group. Raises SystemExit where one fails.

    What they print goes to stderr. `threads`: of each; `watch`: called with their process ids a hundred times a second.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env=os.environ
            | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(workers),
                "LOCAL_WORLD_SIZE": str(workers),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": str(threads),
                "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            },
            cwd=ROOT,
            stdout=sys.stderr,
        )
        for rank in range(workers)
    ]
    while watch is not None and any(process.poll() is None for process in processes):
        watch([process.pid for process in processes])
        time.sleep(_WATCH_SECONDS)
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit(f"workers ended with {codes}")
