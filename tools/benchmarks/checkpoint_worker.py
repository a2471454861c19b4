"""One worker of `tools/bench checkpoint`: saves among steps, or loads into fresh engines, ours and DeepSpeed's by turns."""

import gc
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dstune.atomic import write_json
from dstune.checkpoint import origin
from dstune.checkpoint.direct import BLOCK_BYTES
from dstune.checkpoint.home import Home
from dstune.checkpoint.host_memory import HostMemory
from dstune.checkpoint.loading import Loading
from dstune.checkpoint.pages import whole_pages
from dstune.config.load import load_run
from dstune.config.schema import RunConfig
from dstune.data.shards import Prepared
from dstune.engine.world import World
from dstune.engine.zero import ZeroEngine
from dstune.model import attention
from dstune.model.build import build
from dstune.model.config import load_config
from dstune.model.loss import summed_token_loss
from dstune.paths import RunPaths
from dstune.planning.plan import Plan
from dstune.training.books import RunBooks
from dstune.training.loop import Loop
from dstune.training.saver import CheckpointSaver
from dstune.training.state import TrainState


class _Bench:
    def __init__(self, run_directory: str) -> None:
        torch.set_num_threads(1)
        self.paths = RunPaths(Path(run_directory))
        self.config: RunConfig = load_run(self.paths.config).config
        self.plan = Plan.read(self.paths.plan(1))
        self.ds_config: dict[str, Any] = json.loads(self.paths.ds_config(1).read_text())
        self.world = World.from_environment()
        self.world.init()
        self.control = self.world.control()
        self.theirs = self.paths.root / "deepspeed"

    def engine(self, **more: Any) -> ZeroEngine:
        config, plan, train = self.config, self.plan, self.config.train
        kernel = attention.choose(config.model, load_config(config.model, Path(plan.base)), plan.layout)
        settings = {"lr": train.lr, "betas": train.betas, "eps": train.eps, "weight_decay": train.weight_decay}
        ds_config = self.ds_config | more
        module = build(config.model, Path(plan.base), kernel, train.seed, ds_config)
        return ZeroEngine(module, ds_config=ds_config, world=self.world, **settings)

    def state(self, step: int = 0) -> TrainState:
        return TrainState(
            prepared_fingerprint=self.plan.prepared_fingerprint,
            seed=self.config.train.seed,
            global_batch_size=self.config.train.global_batch_size,
            total_steps=self.plan.total_steps,
            step=step,
        )

    def timed(self, work: Callable[[], object]) -> float:
        """Seconds until all workers have done `work`."""
        dist.barrier()
        began = time.perf_counter()
        work()
        dist.barrier()
        return time.perf_counter() - began

    def trained(self) -> tuple[ZeroEngine, Loop, CheckpointSaver]:
        """An engine that made a step."""
        engine = self.engine()
        saver = CheckpointSaver(
            self.config.checkpoint,
            Home(self.paths.checkpoints),
            engine,
            self.control,
            behind=self.world.control(),
            fingerprints={},
            events=RunBooks(self.paths).events,
        )
        loop = Loop(
            config=self.config,
            plan=self.plan,
            engine=engine,
            loss=lambda module, batch: summed_token_loss(module, batch)[0],
            prepared=Prepared.open(self.plan.prepared),
            validator=None,
            control=self.control,
            state=self.state(),
            saver=saver,
            books=RunBooks(self.paths),
            device=self.world.device,
            pad_id=0,
        )
        loop._step()
        return engine, loop, saver

    def make(self) -> dict[str, Any]:
        """One checkpoint of each side, for the parts that only read."""
        engine, loop, saver = self.trained()
        saver.save(loop.state, {})
        saver.settle()
        engine.module.save_checkpoint(str(self.theirs), tag="last")
        total = sum(self.control.gather(self._bytes(engine)))
        return {"parameters": total // 12, "bytes": total}

    def save(self, steps: int, rounds: int) -> dict[str, Any]:
        engine, loop, saver = self.trained()
        stood: list[float] = []

        def ours() -> None:
            began = time.perf_counter()
            saver.save(loop.state, {})
            stood.append(time.perf_counter() - began)

        def deepspeed(tag: str) -> None:
            engine.module.save_checkpoint(str(self.theirs), tag=tag)

        def segment(save: Callable[[], None] | None) -> float:
            """Seconds of `steps` steps with a save behind the first."""

            def run() -> None:
                for number in range(steps):
                    loop._step()
                    if number == 0 and save is not None:
                        save()
                saver.settle()

            return self.timed(run)

        ours()  # both sides once before anything counts: memory is reserved, files are compiled
        saver.settle()
        deepspeed("first")
        times: dict[str, list[float]] = {"none": [], "dstune": [], "deepspeed": []}
        copies, whole, direct = list[float](), list[float](), list[float]()
        memory = HostMemory(max(1, self._bytes(engine)))
        for number in range(rounds):
            self._forget()
            times["none"].append(segment(None))
            times["dstune"].append(segment(ours))
            times["deepspeed"].append(segment(lambda n=number: deepspeed(f"round-{n}")))
            shutil.rmtree(self.theirs / f"round-{number}", ignore_errors=True)
            copies.append(self.timed(lambda: self._copy(engine, memory)))
            loop._step()
            whole.append(self.timed(lambda: (saver.save(loop.state, {}), saver.settle())))
            direct.append(self.timed(lambda: self._write_direct(memory)))
        deepspeed("last")
        total = sum(self.control.gather(self._bytes(engine)))
        median = {name: statistics.median(values) for name, values in times.items()}
        extra = {name: median[name] - median["none"] for name in ("dstune", "deepspeed")}
        standstill = statistics.median(max(each) for each in zip(*self.control.gather(stood[1:]), strict=True))
        return {
            "parameters": total // 12,
            "bytes": total,
            "steps": steps,
            "seconds_of_these_steps": {name: [round(value, 2) for value in values] for name, values in times.items()},
            "extra_seconds_per_save": {name: round(value, 3) for name, value in extra.items()},
            "extra_ratio": round(extra["dstune"] / extra["deepspeed"], 3),
            "standstill_seconds": round(standstill, 3),
            "copy_seconds": round(statistics.median(copies), 3),
            "standstill_over_copy": round(standstill / statistics.median(copies), 3),
            "whole_save_GB_per_second": round(total / statistics.median(whole) / 1e9, 3),
            "direct_write_GB_per_second": round(total / statistics.median(direct) / 1e9, 3),
            "whole_over_direct": round(statistics.median(direct) / statistics.median(whole), 3),
        }

    def _forget(self) -> None:
        """Let older checkpoints of ours go, outside of what is timed."""
        dist.barrier()
        if self.world.rank == 0:
            for old in sorted(self.paths.checkpoints.glob("step-*"))[:-1]:
                shutil.rmtree(old)
        dist.barrier()

    def _bytes(self, engine: ZeroEngine) -> int:
        return sum(piece.tensor.numel() * piece.tensor.element_size() for piece in engine.slices())

    def _copy(self, engine: ZeroEngine, memory: HostMemory) -> None:
        at = 0
        for piece in engine.slices():
            raw = piece.tensor.view(torch.uint8)
            memory.tensor[at : at + len(raw)].copy_(raw)
            at += len(raw)

    def _write_direct(self, memory: HostMemory) -> None:
        path = self.paths.root / f"direct-{self.world.rank}"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT)
        size = whole_pages(len(memory.tensor))
        for first in range(0, size, BLOCK_BYTES):
            os.pwrite(descriptor, memory.view[first : min(first + BLOCK_BYTES, size)], first)
        os.fsync(descriptor)
        os.close(descriptor)
        path.unlink()

    def resume(self, rounds: int, theirs: str, universal: bool) -> dict[str, Any]:
        seconds: dict[str, list[float]] = {"dstune": [], "deepspeed": []}
        config = {"checkpoint": {"load_universal": True}} if universal else {}
        for _ in range(rounds):
            engine = self.engine()
            self._cache(self.paths.checkpoints)
            seconds["dstune"].append(self.timed(lambda e=engine: self._resume(e)))
            del engine
            gc.collect()  # an engine and its hooks hold each other
            other = self.engine(**config)
            self._cache(Path(theirs))
            seconds["deepspeed"].append(self.timed(lambda e=other: e.module.load_checkpoint(theirs, tag="last")))
            del other
            gc.collect()
        medians = {f"{side}_seconds": round(statistics.median(values), 3) for side, values in seconds.items()}
        return medians | {"rounds": {side: [round(value, 3) for value in each] for side, each in seconds.items()}}

    def _cache(self, directory: Path) -> None:
        """Have the page cache hold the files: DeepSpeed's are there because they were written through it, ours are not."""
        if self.world.rank == 0:
            memory = bytearray(16 << 20)
            for path in directory.rglob("*"):
                if path.is_file():
                    with path.open("rb", buffering=0) as file:
                        while file.readinto(memory):
                            pass

    def _resume(self, engine: ZeroEngine) -> None:
        """Look for the newest checkpoint, as the driver does, and load it, every byte checked."""
        directory = ""
        if self.world.rank == 0:
            newest = origin.newest(self.paths.checkpoints, None, blocks=False).checkpoint
            assert newest is not None
            directory = str(newest.directory)
        loading = Loading(Path(self.control.broadcast(directory)), self.control)
        engine.load(loading.fill, 1)
        loading.settle()


def main(mode: str, run_directory: str, result: str, *more: str) -> None:
    bench = _Bench(run_directory)
    if mode == "make":
        found = bench.make()
    elif mode == "save":
        found = bench.save(int(more[0]), int(more[1]))
    else:
        found = bench.resume(int(more[0]), more[1], more[2] == "True")
    if bench.world.rank == 0:
        write_json(Path(result), found)
    bench.world.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
