"""What a run comes to on given machines, before it is started: the way it takes, why, and what it should need."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dstune.config.load import LoadedRun
from dstune.config.schema import RunConfig
from dstune.config.units import duration_seconds
from dstune.data.shards import Prepared
from dstune.errors import ConfigError, FitError, Problem
from dstune.launch.sizes import Sizes
from dstune.planning import choose, deepspeed, plan, reachable, reasons
from dstune.planning.hardware import Cluster
from dstune.planning.memory import DTYPE_BYTES
from dstune.planning.reachable import without_gpus


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The data, as far as a plan needs it."""

    num_rows: int
    examples: int
    tokens: int
    longest: int
    """Tokens of the longest row."""
    supervised_share: float
    squares_per_token: float
    """The sum of the examples' squared lengths over the tokens."""

    @classmethod
    def of(cls, prepared: Prepared) -> "Rows":
        counts = prepared.manifest["counts"]
        epoch_tokens = max(1, int(counts["epoch_tokens"]))
        lengths = np.asarray(prepared.rows_tokens, dtype=np.int64)
        return cls(
            num_rows=prepared.num_rows,
            examples=prepared.num_examples,
            tokens=int(lengths.sum()),
            longest=int(lengths.max()),
            supervised_share=int(counts["epoch_supervised_tokens"]) / epoch_tokens,
            squares_per_token=int(counts["epoch_squared_lengths"]) / epoch_tokens,
        )

    @classmethod
    def assumed(cls, config: RunConfig, num_rows: int) -> "Rows":
        """Of data that is not here: every row one full example, every token a target."""
        length = config.data.max_length
        return cls(
            num_rows=num_rows,
            examples=num_rows,
            tokens=num_rows * length,
            longest=length,
            supervised_share=1.0,
            squares_per_token=float(length),
        )


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """The ways to run, and the one that this run takes."""

    cluster: Cluster
    load: choose.Load
    found: Sequence[choose.Candidate]
    """Every way, whatever preset the run file names; the best first."""
    this: choose.Candidate
    """What the run file as it stands comes to; where `fits` is false, the nearest to fitting."""
    config: RunConfig
    """With that in place of every `auto`."""
    why: str
    """Why that way; empty where the run file leaves no choice."""
    tokens_per_step: float

    def predicted(self, steps: int) -> dict[str, Any]:
        """What metrics.jsonl should show of a run of `steps`: of a GPU's memory what its allocator counts, of a CPU's what is resident,
        with the copy that a checkpoint before the last step is written from.
        """
        memory, seconds = self.this.memory, self.this.seconds.step
        peak = memory.allocated
        if self.cluster.device.is_cpu:
            peak = memory.peak + memory.host_peak + (memory.checkpoint_copy if self._copies(steps) else 0)
        rate = round(self.tokens_per_step / seconds, 1)
        return {"peak_memory_bytes": peak, "step_seconds": round(seconds, 4), "tokens_per_second": rate}

    def _copies(self, steps: int) -> bool:
        """Whether checkpoints are written behind the training while it goes on."""
        section = self.config.checkpoint
        if section.background is False:
            return False
        every = section.every
        between = every if isinstance(every, int) else duration_seconds(every) / self.this.seconds.step
        left = min(room.free - room.needed for room in self.this.rooms)
        return between < steps and self.this.memory.checkpoint_copy * self.cluster.per_node <= left

    def require_fit(self) -> None:
        """Raises FitError where the planner was to choose and found nothing."""
        if not self.this.fits:
            nearest = f"nearest comes {reasons.named(self.this)}, which lacks {reasons.lacking(self.this)}"
            came = f"none of the presets fits {self.cluster.workers} workers; {nearest}"
            do = (
                "more or larger machines, a smaller data.max_length, or an adapter (model.adapter: {}) fit better; a preset that is "
                "named is tried whatever the planner thinks"
            )
            raise FitError(Problem("deepspeed.preset 'auto'", came, do=do))


def forecast(run: LoadedRun, sizes: Sizes, rows: Rows, cluster: Cluster) -> Forecast:
    """Every way to run on `cluster`, and the one that the run takes there. Raises ConfigError where that wants GPUs, and there are none."""
    config = run.config
    load = _load(config, rows, sizes.fused_loss)
    again = config.model.activation_checkpointing
    settled = choose.Settled(
        micro_batch_size=None if (size := config.train.micro_batch_size) == "auto" else size,
        recompute=None if again == "auto" else again,
        usual_micro_batch=plan.micro_batch_size(config, cluster.workers),
        sequence_parallel=(config.cluster.sequence_parallel,),
        tensor_parallel=config.cluster.tensor_parallel,
    )
    policies = _policies(run)
    named = policies.get(config.deepspeed.preset, {})
    if cluster.device.is_cpu and (problems := without_gpus(named)):
        raise ConfigError(problems)
    require_pieces(config, named or policies[deepspeed.AUTO_PRESET], sizes, cluster.workers)
    path = nvme_path(config)

    def usable(preset: str) -> str:
        policy = policies[preset]
        problems = [one for one in reachable.unreachable(policy) if path or not one.where.endswith(".nvme_path")]
        if problems:
            return str(problems[0]).splitlines()[0]
        if (policy.get("zero_optimization") or {}).get("stage") == 3 and config.cluster.tensor_parallel > 1:
            return "ZeRO-3 does not go with cluster.tensor_parallel"
        if not (reachable.uses_nvme(policy) or reachable.weights_on_nvme(policy)):
            return ""
        if reachable.unswappable(policy, config.train.optimizer):
            return f"{config.train.optimizer} cannot keep its states on NVMe"
        if few := reachable.few_buffers(policy, config.train.optimizer):
            return str(few[0]).splitlines()[0]
        return "" if cluster.nvme else "no NVMe is named (--nvme SIZE)"

    def ways(names: Sequence[str]) -> list[choose.Candidate]:
        chosen = {name: policies[name] for name in names}
        return choose.candidates(sizes.shape, cluster, load, chosen, settled, usable)

    found = ways([name for name in policies if name in choose.PRESETS or name == config.deepspeed.preset])
    mine = found if config.deepspeed.preset == "auto" else ways([config.deepspeed.preset])
    this = mine[0] if mine[0].fits else choose.nearest(mine)
    return Forecast(
        cluster=cluster,
        load=load,
        found=found,
        this=this,
        config=plan.settled(config, this.preset, this.micro_batch_size, this.recompute),
        why=reasons.why(mine, cluster.device.is_cpu) if len(mine) > 1 else "",
        tokens_per_step=rows.tokens * config.train.global_batch_size / rows.num_rows,
    )


def require_pieces(config: RunConfig, ds_config: Mapping[str, Any], sizes: Sizes, workers: int) -> None:
    """Raises ConfigError where weights on NVMe would not go into the buffers that the run file gives them, or pieces of weights not into
    8 bits.
    """
    size = DTYPE_BYTES[config.model.dtype]
    problems = reachable.small_buffers(ds_config, sizes.shape.largest, workers, size)
    if problems := problems + reachable.uneven_pieces(ds_config, sizes.shape.sizes, workers):
        raise ConfigError(problems)


def enough_machines(run: LoadedRun, sizes: Sizes, rows: Rows, cluster: Cluster) -> Forecast | None:
    """How the run would go on two, four, … times as many of these machines, the first number that it fits; None: on none of them."""
    nodes = cluster.nodes * 2
    shared = run.config.cluster.group
    while nodes * cluster.per_node <= run.config.train.global_batch_size * shared:
        seen = forecast(run, sizes, rows, replace(cluster, nodes=nodes))
        if seen.this.fits:
            return seen
        nodes *= 2
    return None


def enough_sharing(
    run: LoadedRun, sizes: Sizes, rows: Rows, cluster: Cluster, can_share: Callable[[LoadedRun], bool]
) -> Forecast | None:
    """How the run would go with two, four, … workers that share each row, the first number that it fits; None: with none of them.

    `can_share`: whether the rows of a run can be cut over so many workers.
    """
    section = run.config.cluster
    split = section.sequence_parallel * 2
    if section.tensor_parallel > 1:
        return None
    while cluster.workers % split == 0:
        # As that section would not take another number of workers, only this value is put into it.
        shared = run.config.model_copy(update={"cluster": section.model_copy(update={"sequence_parallel": split})})
        sharing = replace(run, config=shared)
        seen = forecast(sharing, sizes, rows, cluster)
        if seen.this.fits and can_share(sharing):
            return seen
        split *= 2
    return None


def _load(config: RunConfig, rows: Rows, fused_loss: bool) -> choose.Load:
    from dstune.model.config import is_builtin

    return choose.Load(
        global_batch_size=config.train.global_batch_size,
        row_tokens=rows.longest,
        supervised_share=rows.supervised_share,
        squares_per_token=rows.squares_per_token,
        dtype=config.model.dtype,
        optimizer=config.train.optimizer,
        fused_loss=fused_loss,
        ema=config.train.ema is not None,
        weights_only=config.checkpoint.weights_only,
        compiled=config.model.compile != "off",
        fp8=config.model.fp8,
        drawn=config.model.init == "random" or is_builtin(config.model),
    )


def _policies(run: LoadedRun) -> dict[str, Mapping[str, Any]]:
    """Every preset that could be taken, the user's own file first; the run's overrides over each. Raises ConfigError."""
    section = run.config.deepspeed
    names = choose.PRESETS if section.preset in ("auto", *choose.PRESETS) else (section.preset, *choose.PRESETS)
    found: dict[str, Mapping[str, Any]] = {}
    for name in names:
        try:
            found[name] = deepspeed.policy_of(name, section.overrides, run.base)
        except ConfigError:
            if name in (section.preset, deepspeed.AUTO_PRESET):
                raise
    return found


def nvme_path(config: RunConfig) -> Path | None:
    """Where the run's overrides say that states, or weights, may lie on NVMe."""
    zero = config.deepspeed.overrides.get("zero_optimization") or {}
    sections = (zero.get("offload_optimizer") or {}, zero.get("offload_param") or {})
    path = next((section["nvme_path"] for section in sections if "nvme_path" in section), None)
    return Path(path) if isinstance(path, str) else None


def nodes_of(workers: int, per_node: int) -> tuple[int, int]:
    """Machines, and workers on each, for `workers` on machines with room for `per_node`."""
    nodes = math.ceil(workers / per_node)
    return nodes, math.ceil(workers / nodes)
