"""A model whose training states are larger than this machine's memory takes steps from NVMe, saves, and goes on from what it saved.

Two workers over gloo, a thread each, preset zero3-nvme. What training keeps of a parameter is 18 bytes: 2 of the bf16 weight in
memory, and on the disk fp32 masters, AdamW's two moments and the gradient's sum; `--factor` times the machine's memory in all. The run
takes `--steps` steps, saves and ends; new workers load that and take as many again. With `--compare` a third run, not interrupted, must
have the same losses. The disk is asked first: it takes 28 bytes a parameter (20 with `--weights-only`), as the first checkpoint is
removed when it has been loaded.
"""

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from tools.benchmarks import planned

_HIDDEN = 2048
_LAYER = 12 * _HIDDEN**2
"""Parameters of a layer of `planned.llama`, nearly."""
_STATES = 18
"""Bytes a parameter that training keeps."""
_SWAPPED = 16
"""Those of them that DeepSpeed swaps."""
_SAVED = 12
"""Those that a checkpoint has; the weights alone are 4."""
_ROOM = 2 << 30
"""Bytes of the disk that are left alone."""
_MAPPED_FROM = 1 << 20
"""Larger tensors are given back to the system one by one; glibc keeps up to 32 MB in a heap that grew by a sixth from step to step."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/bench very-large", description=__doc__)
    parser.add_argument("--factor", type=float, default=1.25, help="states of the machine's memory (default 1.25)")
    parser.add_argument("--states", type=float, default=None, help="GB of states, in place of --factor")
    parser.add_argument("--hidden", type=int, default=_HIDDEN)
    parser.add_argument("--steps", type=int, default=2, help="before the save, and again after it")
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to use; default: the system's")
    parser.add_argument("--weights-only", action="store_true", help="save the fp32 weights alone: a third of the room")
    parser.add_argument("--compare", action="store_true", help="also a run that is not interrupted")
    args = parser.parse_args()
    if args.compare and args.weights_only:
        parser.error("--compare wants whole checkpoints: without its moments AdamW goes on otherwise")
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(_MAPPED_FROM))
    states = args.states * 1e9 if args.states else args.factor * _memory_bytes()
    layers = max(1, math.ceil(states / _STATES / (_LAYER * (args.hidden / _HIDDEN) ** 2)))
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        _require_disk(Path(name), int(states), args.weights_only)
        print(json.dumps(_Bench(Path(name), args, layers).run(), indent=2), flush=True)
    return 0


def _memory_bytes() -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
    return int(lines["MemTotal"].split()[0]) * 1024


def _require_disk(folder: Path, states: int, weights_only: bool) -> None:
    wanted = states // _STATES * (_SWAPPED + (4 if weights_only else _SAVED)) + _ROOM
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise SystemExit(
            f"{folder}: {free / 1e9:.0f} GB are free, and {states / 1e9:.0f} GB of states take {wanted / 1e9:.0f} GB there, "
            "swapped and saved. Name another disk (--folder), fewer (--states GB), or save less (--weights-only)."
        )


class _Bench:
    def __init__(self, folder: Path, args: argparse.Namespace, layers: int) -> None:
        self.folder, self.args, self.layers = folder, args, layers

    def run(self) -> dict[str, Any]:
        run = self._make("interrupted", self.args.steps)
        first = self._train(run)
        self._lengthen(run, 2 * self.args.steps)
        second = self._train(run, loads=next((run / "checkpoints").glob("step-*")))
        steps = _lines(run)
        found = self._facts(run) | {
            "losses": [one["loss"] for one in steps],
            "step_seconds": [one["step_seconds"] for one in steps],
            "resident_bytes_per_worker": max(one["peak_memory_bytes"] for one in steps),
            "swapped_bytes": max(first["swapped"], second["swapped"]),
            "seconds": {"train_and_save": first["seconds"], "resume_and_train": second["seconds"]},
            "measured": time.strftime("%Y-%m-%d"),
        }
        assert [one["step"] for one in steps] == list(range(1, 2 * self.args.steps + 1))
        if self.args.compare:
            shutil.rmtree(run / "checkpoints")
            whole = self._make("whole", 2 * self.args.steps)
            self._train(whole)
            found["same_losses_as_uninterrupted"] = [one["loss"] for one in _lines(whole)] == found["losses"]
        return found

    def _make(self, name: str, steps: int) -> Path:
        (self.folder / name).mkdir()
        swap = {"nvme_path": str(self.folder / name / "swap")}
        layer = int(_LAYER * (self.args.hidden / _HIDDEN) ** 2)
        # Of what a worker handles at once it holds several copies: a layer here, and four of them gathered.
        zero = {
            "offload_optimizer": swap,
            "sub_group_size": layer,
            "reduce_bucket_size": layer,
            "stage3_prefetch_bucket_size": layer,
            "stage3_max_live_parameters": 4 * layer,
            "stage3_max_reuse_distance": 4 * layer,
        }
        train = {"global_batch_size": 2, "micro_batch_size": 1, "max_steps": steps, "schedule": "constant"}
        return planned.make_run(
            self.folder / name,
            planned.llama(self.args.hidden, self.layers),
            train,
            2,
            self.args.max_length,
            deepspeed={"preset": "zero3-nvme", "overrides": {"zero_optimization": zero}},
            checkpoint={"every": 10**6, "keep": 1, "weights_only": self.args.weights_only, "background": False},
        )

    def _lengthen(self, run: Path, steps: int) -> None:
        from dstune.launch import rundir

        rundir.change(rundir.find(run), [f"train.max_steps={steps}"])

    def _train(self, run: Path, loads: Path | None = None) -> dict[str, Any]:
        """`loads`: the checkpoint that is gone on from, which is removed when a step was taken from it."""
        largest, done = [0], threading.Event()
        swap = run.parents[1] / "swap"

        def look() -> None:
            while not done.wait(1.0):
                largest.append(sum(_size(file) for file in swap.rglob("*.swp")))
                if loads is not None and loads.is_dir() and _num_steps(run) > self.args.steps:
                    shutil.rmtree(loads)

        watcher = threading.Thread(target=look)
        watcher.start()
        began = time.perf_counter()
        try:
            planned.spawn("dstune.cli.main", 2, ["worker", str(run)])
        finally:
            done.set()
            watcher.join()
        return {"seconds": round(time.perf_counter() - began, 1), "swapped": max(largest)}

    def _facts(self, run: Path) -> dict[str, Any]:
        (manifest,) = (run / "checkpoints").glob("step-*/manifest.json")
        shapes = json.loads(manifest.read_text(encoding="utf-8"))["tensors"]["fp32"]
        parameters = sum(math.prod(shape) for shape in shapes.values())
        return {
            "parameters": parameters,
            "states_bytes": _STATES * parameters,
            "memory_bytes": _memory_bytes(),
            "states_per_memory": round(_STATES * parameters / _memory_bytes(), 3),
            "checkpoint_bytes": sum(_size(file) for file in manifest.parent.iterdir()),
        }


def _lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def _num_steps(run: Path) -> int:
    return (run / "metrics.jsonl").read_bytes().count(b"\n")


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:  # swapped files come and go
        return 0


if __name__ == "__main__":
    sys.exit(main())
