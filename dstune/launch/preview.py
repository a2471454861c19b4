"""What a run would do and need, before it is started: `dstune plan`. No GPU and no weights are looked at, only sizes."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field

from dstune.config import load
from dstune.config.load import LoadedRun
from dstune.config.schema import ClusterSection, RunConfig
from dstune.config.section import SECTION
from dstune.config.units import MOST_WORKERS, size_bytes
from dstune.data.shards import Prepared
from dstune.data.task import is_seq2seq
from dstune.data.tokenizer_files import has_tokenizer
from dstune.errors import ConfigError, Problem, UsageError
from dstune.launch import machine, rundir, start
from dstune.launch.forecast import Forecast, Rows, enough_machines, enough_sharing, forecast, nvme_path
from dstune.launch.sizes import sizes
from dstune.loggers import get_logger
from dstune.planning import choose, deepspeed, hardware, plan, reachable, reasons, saving
from dstune.planning.shapes import ModelShape

log = get_logger(__name__)

_SHOWN = 12
_ASSUMED = "h100-80gb"
"""The device of machines that nobody named."""
_UNNAMED_NVME = "/NAME/THE/NVME/IN/deepspeed.overrides"
_ASSUMED_STEPS = 1000
"""Of a run whose data is not here, and that names no `max_steps`."""


_Count = Annotated[int, Field(ge=1, le=MOST_WORKERS)]
_Bytes = Annotated[int, BeforeValidator(size_bytes)]


class Asked(BaseModel):
    """What the command line, or a call of `api.plan`, says of the machines; None: as the run file says, or this machine is."""

    model_config = SECTION

    workers: _Count | None = None
    nodes: _Count | None = None
    gpus_per_node: _Count | None = None
    gpu: str | None = None
    gpu_memory: _Bytes | None = None
    """A size (`80GB`), or bytes; likewise the other two."""
    host_memory: _Bytes | None = None
    nvme: _Bytes | None = None
    network: float | None = Field(default=None, ge=1e3, le=1e15, allow_inf_nan=False)
    """Bytes/s of one machine to the others."""
    price: float | None = Field(default=None, gt=0, le=1e12, allow_inf_nan=False)
    """Of one GPU and hour, in whatever currency."""
    node_hours: float | None = Field(default=None, ge=1e-3, le=1e12, allow_inf_nan=False)
    """Mean hours of one machine between failures."""
    without_data: bool = False
    """Take every row as full instead of preparing the data."""

    @classmethod
    def of(cls, **said: Any) -> "Asked":
        """The fields by name. Raises UsageError for values that are none of a machine's."""
        return load.said(cls, said, lambda field: _FLAGS.get(field, f"--{field.replace('_', '-')}"))


_FLAGS = {"node_hours": "--mtbf", "without_data": "--no-data", "network": "--network (as bytes/s)"}
"""What the command line calls a field, where that is another name."""


def does_without_data(run: LoadedRun, asked: Asked) -> bool:
    """Whether the data is left alone: because that was asked for, or because the model's directory has no tokenizer to prepare it."""
    if asked.without_data or run.config.data.prepared is not None:
        return asked.without_data
    lacks = not has_tokenizer(run.config.model, run.base)
    if lacks:
        log.warning("%s has no tokenizer: every row is taken as full, every token as a target", run.config.model.path)
    return lacks


def preview(run: LoadedRun, prepared: Prepared | None, asked: Asked) -> Mapping[str, Any]:
    """The plan of a first attempt, the ways to run with what they need, the size of the data, the DeepSpeed config.

    `prepared` None: the data is not here, and every row is taken as full. Raises UsageError for a device that nobody knows, ConfigError
    where transformers cannot build the model, FitError where there are fewer rows than workers.
    """
    from dstune.model import compiling, fp8
    from dstune.model.kernels import choice as kernels

    config = run.config
    cluster = _cluster(config, asked)
    plan.require_rows(config, cluster.workers)
    counted = sizes(config, run.base, cluster.device.kind)
    rows, facts = _rows(run, prepared)
    seen = forecast(run, counted, rows, cluster)
    made = plan.make(
        seen.config,
        run.base,
        facts,
        attempt=1,
        world_size=cluster.workers,
        checkpoints=rundir.checkpoints_of(config, run.base, rundir.run_paths(run)),
        resume_from=None,
        start_step=0,
    )
    used = kernels.planned(config.model, run.base, cluster.device.kind)
    best = seen.found[0]
    per_step = seen.tokens_per_step
    steps = None if prepared is None and config.train.max_steps is None else made.total_steps
    return {
        "fits": seen.this.fits,
        "workers": made.world_size,
        "sequence_parallel": made.sequence_parallel,
        "tensor_parallel": made.tensor_parallel,
        "micro_batch_size": made.micro_batch_size,
        "micro_batches": made.micro_batches,
        "global_batch_size": made.global_batch_size,
        "data": None if prepared else f"not looked at: full rows of {rows.longest} tokens",
        "rows": made.num_rows,
        "examples": rows.examples,
        "examples_per_step": round(rows.examples * config.train.global_batch_size / rows.num_rows, 1),
        "tokens": rows.tokens,
        "tokens_per_step": round(per_step, 1),
        "steps": steps,
        "layout": made.layout,
        "prepared": made.prepared if prepared else None,
        "model": _model(counted.shape),
        "machines": _machines(cluster, config, asked),
        "kernels": [asdict(one) for one in used],
        "compile": _with(
            compiling.planned(config.model, run.base),
            reasons.reckoned_compiled(counted.shape, seen.load, cluster.device),
        ),
        "fp8": _with(
            fp8.planned(config.model, run.base, cluster.device), reasons.reckoned_fp8(seen.load, cluster.device)
        ),
        "this_run": _described(seen.this, seen, steps, asked) | {"chosen_because": seen.why},
        "best": _described(best, seen, steps, asked) if best.fits else None,
        "nearest": None if best.fits else _nearest(seen),
        "enough_machines": None if seen.this.fits else _enough(enough_machines(run, counted, rows, cluster)),
        "enough_sharing": None if seen.this.fits else _enough(enough_sharing(run, counted, rows, cluster, _can_share)),
        "why": reasons.why(seen.found, cluster.device.is_cpu),
        "ways": [_row(one, per_step) for one in choose.shown(seen.found, _SHOWN)],
        "deepspeed": _deepspeed(seen, run.base),
    }


def _can_share(run: LoadedRun) -> bool:
    try:
        start.require_sharing(run)
    except ConfigError as error:
        log.debug("rows are not shared: %s", error)
        return False
    return True


def _with(said: str, reckoned: str) -> str:
    return said if said == "off" else f"{said}; {reckoned}"


def _deepspeed(seen: Forecast, base: Path) -> dict[str, Any]:
    """The whole config; where a plan for NVMe is chosen and nobody named its directory yet, with a place to write one."""
    config = seen.config
    if seen.this.memory.nvme and nvme_path(config) is None and config.deepspeed.preset in choose.PRESETS:
        overrides = {"zero_optimization": {"offload_optimizer": {"nvme_path": _UNNAMED_NVME}}}
        section = config.deepspeed.model_copy(
            update={"overrides": deepspeed.merged(config.deepspeed.overrides, overrides)}
        )
        config = config.model_copy(update={"deepspeed": section})
    made = deepspeed.make(config, base)
    if came := reachable.left_out(made, seen.cluster.workers):
        log.warning("%s", came)
    return reachable.fitted(made, seen.cluster.workers)


def _rows(run: LoadedRun, prepared: Prepared | None) -> tuple[Rows, plan.DataFacts]:
    if prepared is not None:
        return Rows.of(prepared), start.data_facts(run.config, prepared)
    config = run.config
    batch, steps = config.train.global_batch_size, config.train.max_steps or _ASSUMED_STEPS
    layout: plan.Layout = "seq2seq" if is_seq2seq(config.model, run.base) else "packed"
    facts = plan.DataFacts(
        directory=Path(),
        fingerprint="",
        num_rows=batch * steps,
        total_positions=batch * steps,
        has_validation=False,
        layout=layout,
    )
    return Rows.assumed(config, batch * steps), facts


def _cluster(config: RunConfig, asked: Asked) -> hardware.Cluster:
    section, here = config.cluster, machine.usable()
    nodes, per_node = _places(section, asked, len(here) or 1)
    named = asked.gpu or section.gpu
    is_here = named is None and asked.gpu_memory is None
    if not is_here:
        device = hardware.find_device(named or _ASSUMED, asked.gpu_memory)
    elif here:
        device = hardware.recognised(here[0].name, here[0].memory)
    elif section.gpus_per_node is not None or asked.gpus_per_node is not None:
        device, is_here = hardware.find_device(_ASSUMED), False
    else:
        device = machine.processor(section.cpus_per_worker or 1, per_node)
    said = asked.host_memory or section.host_memory
    assumed = hardware.assumed_host_memory(device, per_node)
    return hardware.Cluster(
        nodes=nodes,
        per_node=per_node,
        device=device,
        host_memory=said or (machine.memory_bytes() if is_here else assumed),
        host_assumed=not (said or is_here),
        network=asked.network / per_node if asked.network else hardware.NETWORK,
        network_assumed=asked.network is None,
        nvme=asked.nvme or machine.nvme_bytes(config),
        cores=machine.cores_of_worker(section, elsewhere=not is_here),
    )


def _places(section: ClusterSection, asked: Asked, here: int) -> tuple[int, int]:
    """Machines, and workers on each: as many on one as on the other. `here`: workers of a machine like this one.

    Raises UsageError where so many workers are on no such machines.
    """
    nodes, per_node = asked.nodes or section.nodes or 1, asked.gpus_per_node
    if asked.workers is None and (per_node := per_node or section.gpus_per_node) is not None:
        return nodes, per_node
    workers = asked.workers or start.workers_range(section, here)[1]
    said = f"--workers {workers}" if asked.workers is not None else f"cluster.workers {workers}"
    if per_node is not None:
        _require_whole(said, workers, per_node, f"machines of {per_node} workers")
        if asked.nodes not in (None, workers // per_node):
            came = f"with --nodes {nodes} and --gpus-per-node {per_node}"
            raise UsageError(Problem(said, came, f"{nodes * per_node} workers, or one of the three left away"))
        return workers // per_node, per_node
    if asked.workers is not None or section.workers != "auto":
        _require_whole(said, workers, nodes, f"{nodes} machines, each with as many")
    return nodes, math.ceil(workers / nodes)


def _require_whole(where: str, workers: int, parts: int, places: str) -> None:
    if less := workers % parts:
        possible = [count for count in (workers - less, workers - less + parts) if count]
        raise UsageError(Problem(where, f"on {places}", f"{' or '.join(map(str, possible))} workers"))


def _model(shape: ModelShape) -> dict[str, Any]:
    return {
        "kind": shape.kind,
        "parameters": shape.parameters,
        "trained": shape.trained,
        "active_per_token": shape.active,
        "layers": shape.layers,
        "activations": "counted" if shape.counted else "estimated",
    }


def _machines(cluster: hardware.Cluster, config: RunConfig, asked: Asked) -> dict[str, Any]:
    return {
        "nodes": cluster.nodes,
        "workers_per_node": cluster.per_node,
        "device": _device_name(cluster, config, asked),
        "device_memory_bytes": cluster.device.memory,
        "host_memory_bytes": cluster.host_memory,
        "host_memory_assumed": cluster.host_assumed,
        "network_bytes_per_second": None if cluster.nodes == 1 else cluster.network * cluster.per_node,
        "network_assumed": cluster.network_assumed,
        "nvme_bytes": cluster.nvme,
        "cores_per_worker": cluster.cores,
    }


def _device_name(cluster: hardware.Cluster, config: RunConfig, asked: Asked) -> str:
    if cluster.device.is_cpu:
        return "cpu"
    here = machine.usable()
    return asked.gpu or config.cluster.gpu or (here[0].name if here and asked.gpu_memory is None else _ASSUMED)


def _row(one: choose.Candidate, per_step: float) -> dict[str, Any]:
    return {
        "preset": one.preset,
        "micro_batch_size": one.micro_batch_size,
        "micro_batches": one.micro_batches,
        "activation_checkpointing": one.recompute,
        "sequence_parallel": one.sequence_parallel,
        "fits": one.fits,
        "why": one.refused,
        "device_bytes": one.memory.peak,
        "host_bytes": one.memory.host_peak,
        "nvme_bytes": one.memory.nvme,
        "step_seconds": round(one.seconds.step, 4),
        "tokens_per_second": round(per_step / one.seconds.step, 1),
    }


def _nearest(seen: Forecast) -> dict[str, Any]:
    close = choose.nearest(seen.found)
    return _row(close, seen.tokens_per_step) | {"lacks": reasons.lacking(close)}


def _enough(more: Forecast | None) -> dict[str, Any] | None:
    return None if more is None else {"nodes": more.cluster.nodes, **_row(more.this, more.tokens_per_step)}


def _described(one: choose.Candidate, seen: Forecast, steps: int | None, asked: Asked) -> dict[str, Any]:
    """`steps` None: nobody knows how many."""
    cluster, memory = seen.cluster, one.memory
    hours = None if steps is None else one.seconds.step * steps / 3600
    device_hours = None if hours is None else hours * cluster.workers
    used = memory.host_peak + (memory.peak if cluster.device.is_cpu else 0)
    section = seen.config.checkpoint
    save = saving.saving(
        memory,
        cluster,
        kept=section.keep + (section.best is not None),
        node_hours=asked.node_hours or saving.GPU_HOURS_BETWEEN_FAILURES / cluster.per_node,
        host_room=cluster.host_memory - used * cluster.per_node if section.background is not False else -1,
    )
    return {
        **_row(one, seen.tokens_per_step),
        "device_parts": dict(memory.device),
        "host_parts": dict(memory.host),
        "host_bytes_per_node": memory.host_peak * cluster.per_node,
        "nvme_bytes_per_node": memory.nvme * cluster.per_node,
        "seconds": {name: round(value, 4) for name, value in asdict(one.seconds).items()},
        "hours": None if hours is None else round(hours, 3),
        "device_hours": None if device_hours is None else round(device_hours, 3),
        "price": None if asked.price is None or device_hours is None else round(device_hours * asked.price, 2),
        "checkpoint": {
            name: round(value, 5) if isinstance(value, float) else value for name, value in asdict(save).items()
        }
        | {"interval_steps": max(1, round(save.interval_seconds / one.seconds.step))},
    }
