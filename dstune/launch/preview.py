"""What a run would do and need, before it is started: `dstune plan`. No GPU and no weights are looked at, only sizes."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dstune.config.load import LoadedRun
from dstune.config.schema import RunConfig
from dstune.data.shards import Prepared
from dstune.errors import ConfigError
from dstune.launch import machine, rundir, start
from dstune.planning import choose, cost, deepspeed, hardware, plan
from dstune.planning.shapes import ModelShape

_SHOWN = 12
_FUSED_LOSS = "linear-cross-entropy"
_ASSUMED = "h100-80gb"
"""The device of machines that nobody named."""
_FAILURE_HOURS = 50_700
"""Mean hours of one GPU between failures: 419 in 54 days on 16,384 (Llama 3's report, section 3.3.4)."""
_SAVE_RATE = 2e9
"""Bytes/s that one machine writes to a checkpoint's disk, for the interval that is proposed."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the command line says of the machines; None: as the run file says, or this machine is."""

    workers: int | None = None
    nodes: int | None = None
    gpus_per_node: int | None = None
    gpu: str | None = None
    gpu_memory: int | None = None
    host_memory: int | None = None
    nvme: int | None = None
    price: float | None = None
    """Of one GPU and hour, in whatever currency."""
    failure_hours: float = _FAILURE_HOURS


def preview(run: LoadedRun, prepared: Prepared, asked: Asked) -> Mapping[str, Any]:
    """The plan of a first attempt, the ways to run with what they need, the size of the data, the DeepSpeed config.

    Raises UsageError for a device that nobody knows, ConfigError where transformers cannot build the model.
    """
    from dstune.model.footprint import footprint
    from dstune.model.kernels import choice as kernels

    config = run.config
    cluster = _cluster(config, asked)
    shape = footprint(config.model, run.base, config.train.freeze)
    used = kernels.planned(config.model, run.base, "cpu" if cluster.device.is_cpu else "cuda")
    load = _load(config, prepared, fused_loss=any(one.on for one in used if one.name == _FUSED_LOSS))
    found = choose.candidates(
        shape,
        cluster,
        load,
        _policies(run),
        micro_batch_size=config.train.micro_batch_size if config.train.micro_batch_size != "auto" else None,
        recompute=bool(config.model.activation_checkpointing) or None,
        usable=lambda preset: "" if preset != "zero3-nvme" or cluster.nvme else "no NVMe is named (--nvme SIZE)",
    )
    chosen = next((one for one in found if one.fits), None)
    paths = rundir.run_paths(run)
    made = plan.make(
        config,
        run.base,
        start.data_facts(config, prepared),
        attempt=1,
        world_size=cluster.workers,
        checkpoints=rundir.checkpoints_of(config, run.base, paths),
        resume_from=None,
        start_step=0,
    )
    this = _this_run(run, shape, cluster, load, made)
    tokens = int(prepared.rows_tokens.sum())
    share = config.train.global_batch_size / prepared.num_rows
    per_step = tokens * share
    return {
        "workers": made.world_size,
        "sequence_parallel": made.sequence_parallel,
        "micro_batch_size": made.micro_batch_size,
        "micro_batches": made.micro_batches,
        "global_batch_size": made.global_batch_size,
        "rows": made.num_rows,
        "examples": prepared.num_examples,
        "examples_per_step": round(prepared.num_examples * share, 1),
        "tokens": tokens,
        "tokens_per_step": round(per_step, 1),
        "steps": made.total_steps,
        "layout": made.layout,
        "prepared": made.prepared,
        "model": _model(shape),
        "machines": _machines(cluster, asked),
        "kernels": [asdict(one) for one in used],
        "this_run": _described(this, cluster, per_step, made.total_steps, asked),
        "best": _described(chosen, cluster, per_step, made.total_steps, asked) if chosen else None,
        "ways": [_row(one, per_step) for one in choose.shown(found, _SHOWN)],
        "deepspeed": deepspeed.make(config, run.base),
    }


def _cluster(config: RunConfig, asked: Asked) -> hardware.Cluster:
    section = config.cluster
    here = machine.gpus()
    nodes = asked.nodes or section.nodes or 1
    per_node = asked.gpus_per_node or section.gpus_per_node
    if asked.workers is not None:
        per_node = math.ceil(asked.workers / nodes)
    elif per_node is None:
        per_node = math.ceil(start.workers_range(section, len(here) or 1)[1] / nodes)
    host = asked.host_memory or machine.memory_bytes()
    if asked.gpu is not None or asked.gpu_memory is not None:
        device = hardware.find_device(asked.gpu or _ASSUMED, asked.gpu_memory)
    elif here:
        device = hardware.recognised(here[0].name, here[0].memory)
    elif section.gpus_per_node is not None:
        device = hardware.find_device(_ASSUMED)
    else:
        device = hardware.cpu(section.cpus_per_worker, host // per_node)
    return hardware.Cluster(nodes=nodes, per_node=per_node, device=device, host_memory=host, nvme=asked.nvme or 0)


def _load(config: RunConfig, prepared: Prepared, fused_loss: bool) -> choose.Load:
    lengths = np.asarray(prepared.rows_tokens, dtype=np.int64)
    counts = prepared.manifest["counts"]
    epoch_tokens = max(1, int(counts["epoch_tokens"]))
    return choose.Load(
        global_batch_size=config.train.global_batch_size,
        row_tokens=int(lengths.max()),
        supervised_share=int(counts["epoch_supervised_tokens"]) / epoch_tokens,
        squares_per_token=int(counts["epoch_squared_lengths"]) / epoch_tokens,
        dtype=config.model.dtype,
        optimizer=config.train.optimizer,
        fused_loss=fused_loss,
        ema=config.train.ema is not None,
    )


def _policies(run: LoadedRun) -> dict[str, dict[str, Any]]:
    """Every preset that could be taken, the user's own file or name first; the run's overrides over each."""
    section = run.config.deepspeed
    names = list(choose.PRESETS) if section.preset == "auto" else [section.preset, *choose.PRESETS]
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(names):
        try:
            found[name] = deepspeed.policy_of(name, section.overrides, run.base)
        except ConfigError:
            if name == section.preset:
                raise
    return found


def _this_run(
    run: LoadedRun, shape: ModelShape, cluster: hardware.Cluster, load: choose.Load, made: plan.Plan
) -> choose.Candidate:
    """What the run file as it stands comes to."""
    config = run.config
    (found,) = choose.candidates(
        shape,
        cluster,
        load,
        {config.deepspeed.preset: deepspeed.make(config, run.base)},
        micro_batch_size=made.micro_batch_size,
        recompute=bool(config.model.activation_checkpointing),
    )
    return found


def _model(shape: ModelShape) -> dict[str, Any]:
    return {
        "kind": shape.kind,
        "parameters": shape.parameters,
        "trained": shape.trained,
        "active_per_token": shape.active,
        "layers": shape.layers,
        "activations": "counted" if shape.counted else "estimated",
    }


def _machines(cluster: hardware.Cluster, asked: Asked) -> dict[str, Any]:
    return {
        "nodes": cluster.nodes,
        "workers_per_node": cluster.per_node,
        "device": _device_name(cluster, asked),
        "device_memory_bytes": cluster.device.memory,
        "host_memory_bytes": cluster.host_memory,
        "nvme_bytes": cluster.nvme,
    }


def _device_name(cluster: hardware.Cluster, asked: Asked) -> str:
    if cluster.device.is_cpu:
        return "cpu"
    here = machine.gpus()
    return asked.gpu or (here[0].name if here and asked.gpu_memory is None else _ASSUMED)


def _row(one: choose.Candidate, per_step: float) -> dict[str, Any]:
    return {
        "preset": one.preset,
        "micro_batch_size": one.micro_batch_size,
        "activation_checkpointing": one.recompute,
        "fits": one.fits,
        "why": one.refused,
        "device_bytes": one.memory.peak,
        "host_bytes": one.memory.host_peak,
        "nvme_bytes": one.memory.nvme,
        "step_seconds": round(one.seconds.step, 4),
        "tokens_per_second": round(per_step / one.seconds.step, 1),
    }


def _described(
    one: choose.Candidate, cluster: hardware.Cluster, per_step: float, steps: int, asked: Asked
) -> dict[str, Any]:
    hours = one.seconds.step * steps / 3600
    memory = one.memory
    save = memory.checkpoint_bytes / (_SAVE_RATE * cluster.nodes)
    mean = asked.failure_hours / cluster.workers
    every = cost.checkpoint_interval(save, mean)
    return {
        **_row(one, per_step),
        "device_parts": dict(memory.device),
        "host_parts": dict(memory.host),
        "seconds": {name: round(value, 4) for name, value in asdict(one.seconds).items()},
        "hours": round(hours, 3),
        "device_hours": round(hours * cluster.workers, 3),
        "price": None if asked.price is None else round(hours * cluster.workers * asked.price, 2),
        "checkpoint": {
            "bytes": memory.checkpoint_bytes,
            "host_copy_bytes_per_node": memory.checkpoint_copy * cluster.per_node,
            "save_seconds": round(save, 2),
            "best_interval_seconds": round(every, 1),
            "best_interval_steps": max(1, round(every / one.seconds.step)),
            "goodput": round(cost.goodput(save, every, 120.0, mean), 5),
        },
    }
