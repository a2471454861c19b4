"""The sides of `tools/bench checkpoint` that need no workers: reading everything back; exporting, each in a process of its own."""

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dstune.atomic import write_json
from dstune.checkpoint.audit import audit
from dstune.checkpoint.host_memory import HostMemory
from dstune.checkpoint.resolve import committed
from dstune.config.load import load_run
from dstune.paths import RunPaths
from dstune.planning.plan import Plan

_BLOCK_BYTES = 16 << 20


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def verify(run: RunPaths, rounds: int) -> dict[str, Any]:
    """Our reading with hashes; the same files read past the page cache without; SHA-256 of memory on as many threads."""
    directory = committed(run.checkpoints)[-1].directory
    files = sorted(directory.glob("shard-*"))
    total = sum(path.stat().st_size for path in files)
    sizes = [path.stat().st_size for path in files]
    times: dict[str, list[float]] = {"verify": [], "read": [], "sha256": []}
    for _ in range(rounds):
        times["verify"].append(_timed(lambda: _audited(directory)))
        times["read"].append(_timed(lambda: _together(files, _read)))
        times["sha256"].append(_timed(lambda: _together(sizes, _hash)))
    rates = {name: total / statistics.median(values) / 1e9 for name, values in times.items()}
    limit = min(rates["read"], rates["sha256"])
    return {
        "bytes": total,
        "GB_per_second": {name: round(rate, 3) for name, rate in rates.items()},
        "of_the_slower": round(rates["verify"] / limit, 3),
    }


def _together(items: list[Any], work: Callable[[Any], None]) -> None:
    with ThreadPoolExecutor(len(items)) as pool:
        list(pool.map(work, items))


def _audited(directory: Path) -> None:
    (look,) = audit([directory], past_cache=True)
    assert not look.findings, look.findings


def _read(path: Path) -> None:
    memory = HostMemory(_BLOCK_BYTES)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    offset = 0
    while count := os.preadv(descriptor, [memory.view], offset):
        offset += count
        if count < _BLOCK_BYTES:
            break
    os.close(descriptor)


def _hash(size: int) -> None:
    import hashlib

    memory, digest = HostMemory(_BLOCK_BYTES), hashlib.sha256()
    for _ in range(size // _BLOCK_BYTES):
        digest.update(memory.view)


def export(run: RunPaths, rounds: int) -> dict[str, Any]:
    """fp32 safetensors of the last checkpoint by each side: seconds without imports, peak memory above the imports'."""
    found: dict[str, list[dict[str, float]]] = {"dstune": [], "deepspeed": []}
    for _ in range(rounds):
        for side, results in found.items():
            words = [sys.executable, "-m", "tools.benchmarks.checkpoint_sides", f"export_{side}", str(run.root)]
            said = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
            results.append(json.loads(said.stdout.splitlines()[-1]))
    medians = {
        side: {name: round(statistics.median(one[name] for one in results), 3) for name in results[0]}
        for side, results in found.items()
    }
    return medians | {"ratio": round(medians["dstune"]["seconds"] / medians["deepspeed"]["seconds"], 3)}


def export_dstune(run: RunPaths) -> Callable[[Path], object]:
    """Our side, all imported."""
    from dstune.exporting import state_dict

    loaded = load_run(run.config).config
    directory = committed(run.checkpoints)[-1].directory
    base = Path(Plan.read(run.plan(1)).base)
    return lambda out: state_dict.export(directory, out, loaded, base, threads=2)


def export_deepspeed(run: RunPaths) -> Callable[[Path], object]:
    """DeepSpeed's side, all imported."""
    from deepspeed.utils import zero_to_fp32

    source = str(run.root / "deepspeed")
    convert = zero_to_fp32.convert_zero_checkpoint_to_fp32_state_dict
    return lambda out: convert(source, str(out), safe_serialization=True, tag="last")


def _measured(run: RunPaths, work: Callable[[Path], object]) -> dict[str, float]:
    import torch

    torch.set_num_threads(2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out = run.root / f"exported-{os.getpid()}"
    seconds = _timed(lambda: work(out))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    shutil.rmtree(out)
    return {"seconds": round(seconds, 3), "peak_GiB_above_imports": round(peak / (1 << 20), 3)}


def main(mode: str, run_directory: str, *more: str) -> None:
    run = RunPaths(Path(run_directory))
    if mode == "verify":
        write_json(Path(more[0]), verify(run, int(more[1])))
    elif mode == "export":
        write_json(Path(more[0]), export(run, int(more[1])))
    else:
        made = export_dstune(run) if mode == "export_dstune" else export_deepspeed(run)
        print(json.dumps(_measured(run, made)))


if __name__ == "__main__":
    main(*sys.argv[1:])
