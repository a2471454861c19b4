"""The plan of one attempt: a run's config joined with a number of workers. The launcher writes it, the workers read it."""

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from dstune.atomic import write_json
from dstune.config.schema import RunConfig
from dstune.errors import ConfigError, FitError, Problem
from dstune.paths import RunPaths
from dstune.planning.deepspeed import AUTO_PRESET, usual_preset

Layout = Literal["packed", "padded", "packed-seq2seq", "seq2seq"]
_AUTO_MICRO_BATCH_TOKENS = 8192


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """What the plan needs to know of a prepared directory."""

    directory: Path
    fingerprint: str
    num_rows: int
    total_positions: int
    """Rows to take over the whole run, epochs and the short last batch settled."""
    has_validation: bool
    layout: Layout


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything a worker wants to know beside config.yaml. Paths are absolute."""

    attempt: int
    world_size: int
    sequence_parallel: int = 1
    """Workers in a row that take the same rows, each a piece of every one."""
    tensor_parallel: int = 1
    """Workers in a row that take the same rows, each with a part of the model."""
    micro_batch_size: int
    """Rows per forward pass and worker (or group of workers that share rows)."""
    micro_batches: int
    """Forward passes per step and worker, the same on every worker."""
    global_batch_size: int
    num_rows: int
    total_positions: int
    total_steps: int
    layout: Layout
    prepared: str
    prepared_fingerprint: str
    has_validation: bool
    base: str
    """What relative paths in config.yaml are relative to."""
    checkpoints: str
    """A directory; where there is a store, they are staged there."""
    store: str | None
    """The address that checkpoints are uploaded to."""
    store_owner: str | None
    """As whom: a run that was taken over elsewhere uploads no more."""
    resume_from: str | None
    start_step: int
    cpus_per_worker: int
    gpus: bool = False
    """Whether each worker is to have one: then none trains without."""
    preset: str = AUTO_PRESET
    """What `deepspeed.preset` came to; the whole config is beside the plan."""
    activation_checkpointing: bool | Literal["offload"] = False
    """What `model.activation_checkpointing` came to."""
    why: str = ""
    """Why these were chosen, for a person; empty where the run file left no choice."""
    predicted: Mapping[str, Any] | None = None
    """`peak_memory_bytes`, `step_seconds` and `tokens_per_second` as the planner expects them in metrics.jsonl; None where the
    machines are not known."""

    @property
    def group(self) -> int:
        """Workers in a row that take the same rows."""
        return self.sequence_parallel * self.tensor_parallel

    @property
    def planned_bytes(self) -> int | None:
        """What a worker is expected to take at most."""
        return None if self.predicted is None else int(self.predicted["peak_memory_bytes"])

    @classmethod
    def read(cls, path: Path) -> "Plan":
        """A plan that an earlier version wrote lacks what has a default."""
        value = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{f.name: value[f.name] for f in fields(cls) if f.default is MISSING or f.name in value})

    def settle(self, config: RunConfig) -> RunConfig:
        """The run's config with what this plan chose where it says `auto`."""
        return settled(config, self.preset, self.micro_batch_size, self.activation_checkpointing)


def make(
    config: RunConfig,
    base: Path,
    data: DataFacts,
    *,
    attempt: int,
    world_size: int,
    checkpoints: Path,
    store: str | None = None,
    store_owner: str | None = None,
    resume_from: Path | None,
    start_step: int,
    cpus_per_worker: int = 1,
    gpus: bool = False,
    why: str = "",
    predicted: Mapping[str, Any] | None = None,
) -> Plan:
    """Join `config` (settled: what it leaves to `auto` takes the usual) with `world_size` workers.

    Raises FitError as `require_rows`, ConfigError as `require_shareable`.
    """
    batch = config.train.global_batch_size
    require_rows(config, world_size)
    shared = config.cluster.group
    require_shareable(config, data.layout)
    micro = micro_batch_size(config, world_size)
    return Plan(
        attempt=attempt,
        world_size=world_size,
        sequence_parallel=config.cluster.sequence_parallel,
        tensor_parallel=config.cluster.tensor_parallel,
        micro_batch_size=micro,
        micro_batches=math.ceil(math.ceil(batch * shared / world_size) / micro),
        global_batch_size=batch,
        num_rows=data.num_rows,
        total_positions=data.total_positions,
        total_steps=math.ceil(data.total_positions / batch),
        layout=data.layout,
        prepared=str(data.directory),
        prepared_fingerprint=data.fingerprint,
        has_validation=data.has_validation,
        base=str(base),
        checkpoints=str(checkpoints),
        store=store,
        store_owner=store_owner,
        resume_from=str(resume_from) if resume_from else None,
        start_step=start_step,
        cpus_per_worker=cpus_per_worker,
        gpus=gpus,
        preset=usual_preset(config),
        activation_checkpointing=again if (again := config.model.activation_checkpointing) != "auto" else False,
        why=why,
        predicted=predicted,
    )


def settled(config: RunConfig, preset: str, micro_batch: int, activation_checkpointing: bool | str) -> RunConfig:
    """`config` with `deepspeed.preset`, `train.micro_batch_size` and `model.activation_checkpointing` as given."""
    changes: dict[str, tuple[str, Any]] = {
        "deepspeed": ("preset", preset),
        "train": ("micro_batch_size", micro_batch),
        "model": ("activation_checkpointing", activation_checkpointing),
    }
    sections = {name: getattr(config, name).model_copy(update=dict([change])) for name, change in changes.items()}
    return config.model_copy(update=sections)


def require_rows(config: RunConfig, world_size: int) -> None:
    """Raises FitError where the workers are no whole number of groups that share rows, or the global batch has no row for each group."""
    batch, shared = config.train.global_batch_size, config.cluster.group
    if world_size % shared:
        key = "cluster.sequence_parallel" if config.cluster.tensor_parallel == 1 else "cluster.tensor_parallel"
        came = f"{world_size} workers, of which {shared} share each row"
        do = f"set cluster.workers (or nodes and gpus_per_node), or lower {key}"
        raise FitError(Problem(key, came, f"a multiple of {shared} workers", do))
    if world_size // shared > batch:
        problem = Problem(
            "train.global_batch_size",
            f"{batch} rows for {world_size} workers" + (f" in groups of {shared}" if shared > 1 else ""),
            "a row for each worker at least" if shared == 1 else "a row for each group at least",
            do="raise train.global_batch_size, or lower cluster.workers",
        )
        raise FitError(problem)


def require_shareable(config: RunConfig, layout: Layout) -> None:
    """Raises ConfigError where workers would share rows that cannot be cut."""
    shared = config.cluster.sequence_parallel
    if shared > 1 and layout != "packed":
        came = f"{shared} workers would share rows of the layout {layout}"
        raise ConfigError(Problem("cluster.sequence_parallel", came, "1, or packed rows of a causal model"))


def micro_batch_size(config: RunConfig, world_size: int) -> int:
    """The rows of a forward pass: as asked, else what keeps one near 8,192 tokens a worker; never more than a worker's share."""
    share = math.ceil(config.train.global_batch_size * config.cluster.group / world_size)
    asked = config.train.micro_batch_size
    if asked == "auto":
        asked = max(1, _AUTO_MICRO_BATCH_TOKENS * config.cluster.sequence_parallel // config.data.max_length)
    return min(asked, share)


def write(plan: Plan, ds_config: dict[str, Any], paths: RunPaths) -> None:
    """Put both files of an attempt into the run directory."""
    paths.attempt(plan.attempt).mkdir(parents=True, exist_ok=True)
    write_json(paths.ds_config(plan.attempt), ds_config)
    write_json(paths.plan(plan.attempt), asdict(plan))
