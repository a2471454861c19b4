"""One worker of `tools/bench step`: dstune's loop and a bare DeepSpeed loop take turns in this process, each with its own collectives."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.comm import comm

from dstune.atomic import write_json
from dstune.batch import collate
from dstune.config.load import load_run
from dstune.data import order
from dstune.data.shards import Prepared
from dstune.engine.construction import complete
from dstune.engine.world import World
from dstune.engine.zero import ZeroEngine
from dstune.model import attention
from dstune.model.build import build
from dstune.model.config import load_config
from dstune.model.kernels import choice
from dstune.model.loss import summed_token_loss
from dstune.paths import RunPaths
from dstune.planning.plan import Plan
from dstune.training.books import RunBooks
from dstune.training.loop import Loop
from dstune.training.schedule import learning_rate
from dstune.training.state import TrainState
from tools.benchmarks.step import summary


def main(run_directory: str, steps: int, warmup: int) -> None:
    torch.set_num_threads(1)
    paths = RunPaths(Path(run_directory))
    config, plan = load_run(paths.config).config, Plan.read(paths.plan(1))
    ds_config = json.loads(paths.ds_config(1).read_text())
    world = World.from_environment()
    world.init()
    deepspeeds_own = comm.cdb
    control = world.control()
    prepared = Prepared.open(plan.prepared)
    kernel = attention.choose(config.model, load_config(config.model, Path(plan.base)), plan.layout)

    def model(attention: str) -> Any:
        return build(config.model, Path(plan.base), attention, config.train.seed, ds_config)

    ours_model = model(kernel)
    token_loss = choice.put_in(
        choice.chosen(config.model, ours_model, world.device.type), ours_model, world.device.type
    )

    train = config.train
    settings = {"lr": train.lr, "betas": train.betas, "eps": train.eps, "weight_decay": train.weight_decay}
    loop = Loop(
        config=config,
        plan=plan,
        engine=ZeroEngine(ours_model, ds_config=ds_config, world=world, **settings),
        loss=lambda module, batch: token_loss(module, batch)[0],
        prepared=prepared,
        validator=None,
        control=control,
        state=TrainState(
            prepared_fingerprint=plan.prepared_fingerprint,
            seed=train.seed,
            global_batch_size=train.global_batch_size,
            total_steps=plan.total_steps,
        ),
        saver=_NoSaver(),
        books=RunBooks(paths),
        device=world.device,
        pad_id=0,
    )
    collectives = (comm.cdb, deepspeeds_own)
    theirs_attention = kernel if config.model.kernels == "off" else "sdpa"
    bare_model = model(theirs_attention)
    adamw = torch.optim.AdamW(bare_model.parameters(), fused=True, **settings)
    bare, _, _, _ = deepspeed.initialize(
        model=bare_model, optimizer=adamw, config=complete(ds_config, torch.bfloat16), dist_init_required=False
    )
    ours, theirs = list[float](), list[float]()
    our_losses, their_losses = list[float](), list[float]()
    for step in range(steps + warmup):
        batches, supervised = _batches(prepared, plan, train.seed, step, world)
        sides = [lambda: _ours(loop), lambda b=batches, s=supervised, n=step: _bare(bare, adamw, b, s, train, plan, n)]
        taken = {}
        for side in (0, 1) if step % 2 else (1, 0):
            comm.cdb = collectives[side]
            dist.barrier()
            started = time.perf_counter()
            loss = sides[side]()
            taken[side] = (time.perf_counter() - started, loss)
        if step >= warmup:
            ours.append(taken[0][0])
            theirs.append(taken[1][0])
            our_losses.append(taken[0][1])
            their_losses.append(taken[1][1])
    if world.rank == 0:
        parameters = sum(p.ds_numel for p in bare_model.parameters())
        facts = {
            "workers": world.world_size,
            "parameters": parameters,
            "tokens_per_step": int(prepared.rows_tokens[:8].mean() * plan.global_batch_size),
            "micro_batches": plan.micro_batches,
            "attention": {"dstune": kernel, "bare": theirs_attention},
            "kernels": config.model.kernels,
            "steps": steps,
        }
        write_json(paths.root.parent.parent / "result.json", summary(ours, theirs, (our_losses, their_losses), facts))
    world.close()


class _NoSaver:
    """`loop.Saver` of a loop that saves nothing."""

    def save(self, state: TrainState, metrics: Any) -> None:
        """Nothing."""

    def failed(self) -> bool:
        return False

    def settle(self) -> None:
        """Nothing is under way."""


def _batches(prepared: Prepared, plan: Plan, seed: int, step: int, world: World) -> tuple[list[Any], int]:
    rows = order.rows_of_step(plan.num_rows, seed, plan.global_batch_size, plan.total_positions, step)
    shares = order.share(rows, world.rank, world.world_size, plan.micro_batch_size)
    batches = [collate(prepared, micro, plan.layout, 0).to(world.device) for micro in shares]
    return batches, int(prepared.rows_supervised[rows].sum())


def _ours(loop: Loop) -> float:
    loop._step()
    return loop.state.losses[-1]


def _bare(engine: Any, adamw: Any, batches: list[Any], supervised: int, train: Any, plan: Plan, step: int) -> float:
    for group in adamw.param_groups:
        group["lr"] = learning_rate(train, step, plan.total_steps)
    total = torch.zeros(())
    for number, batch in enumerate(batches):
        engine.set_gradient_accumulation_boundary(number == len(batches) - 1)
        loss = summed_token_loss(engine, batch)[0]
        engine.backward(loss * (dist.get_world_size() / supervised), scale_wrt_gas=False)
        total += loss.detach()
    engine.step()
    dist.all_reduce(total)
    return total.item() / supervised


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
