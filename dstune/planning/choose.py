"""Which preset, micro-batch and recomputation fit a cluster, and in which order a run should try them."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dstune.planning.cost import Seconds, step_seconds
from dstune.planning.hardware import Cluster
from dstune.planning.memory import CPU_PROCESS, GPU_PROCESS, Memory, Placement, Work, estimate
from dstune.planning.shapes import ModelShape

PRESETS = ("zero1", "zero2", "zero3", "zero3-offload-optimizer", "zero3-offload-all", "zero3-nvme")
"""What is tried, the simplest first: of two equally fast ones the earlier wins."""
_MARGIN = 0.92
"""Of a device's memory that a plan may fill: allocators fragment, and the prediction may be a tenth off."""
_HOST_MARGIN = 0.9
_MOST_MICRO_BATCHES = 64


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to run, with what it takes."""

    preset: str
    micro_batch_size: int
    micro_batches: int
    recompute: bool
    memory: Memory
    seconds: Seconds
    refused: str
    """Why it does not fit; empty where it does."""

    @property
    def fits(self) -> bool:
        return not self.refused


@dataclass(frozen=True, kw_only=True)
class Load:
    """The data of a step, as far as plans differ by it."""

    global_batch_size: int
    row_tokens: int
    """Tokens of a full row."""
    supervised_share: float
    """Targets over tokens."""
    squares_per_token: float
    """The mean squared length of the examples over their mean length: what attention costs."""
    dtype: str
    optimizer: str
    fused_loss: bool
    ema: bool = False


def candidates(
    shape: ModelShape,
    cluster: Cluster,
    load: Load,
    policies: Mapping[str, Mapping[str, Any]],
    *,
    micro_batch_size: int | None = None,
    recompute: bool | None = None,
    usable: Callable[[str], str] = lambda preset: "",
) -> list[Candidate]:
    """Every way to run, those that fit first, the fastest of them first.

    `policies`: preset -> its DeepSpeed config. `micro_batch_size` and `recompute`, where given, are settled. `usable` says why a preset
    cannot be taken at all (no NVMe path, an optimizer that it does not know), or nothing.
    """
    found = [
        _candidate(shape, cluster, load, preset, Placement.of(policy), size, again, usable(preset))
        for preset, policy in policies.items()
        for size in _micro_batches(load, cluster, micro_batch_size)
        for again in ((False, True) if recompute is None else (recompute,))
    ]
    order = {preset: number for number, preset in enumerate(policies)}
    return sorted(
        found,
        key=lambda one: (
            not one.fits,
            round(one.seconds.step, 3),
            one.recompute,
            order[one.preset],
            one.micro_batch_size,
        ),
    )


def _micro_batches(load: Load, cluster: Cluster, asked: int | None) -> Iterator[int]:
    share = math.ceil(load.global_batch_size / cluster.workers)
    if asked is not None:
        yield min(asked, share)
        return
    size = 1
    while size < share and size < _MOST_MICRO_BATCHES:
        yield size
        size *= 2
    yield min(size, share)


def _candidate(
    shape: ModelShape,
    cluster: Cluster,
    load: Load,
    preset: str,
    place: Placement,
    size: int,
    recompute: bool,
    why_not: str,
) -> Candidate:
    tokens = size * load.row_tokens
    work = Work(
        dtype=load.dtype,
        optimizer=load.optimizer,
        world_size=cluster.workers,
        tokens=tokens,
        supervised=math.ceil(tokens * load.supervised_share),
        recompute=recompute,
        fused_loss=load.fused_loss,
        ema=load.ema,
    )
    memory = estimate(shape, place, work, CPU_PROCESS if cluster.device.is_cpu else GPU_PROCESS)
    micro_batches = math.ceil(math.ceil(load.global_batch_size / cluster.workers) / size)
    seconds = step_seconds(shape, place, work, cluster, micro_batches, load.squares_per_token)
    return Candidate(
        preset=preset,
        micro_batch_size=size,
        micro_batches=micro_batches,
        recompute=recompute,
        memory=memory,
        seconds=seconds,
        refused=why_not or _refused(memory, cluster),
    )


def _refused(memory: Memory, cluster: Cluster) -> str:
    device = cluster.device
    if device.is_cpu:
        needed = (memory.peak + memory.host_peak) * cluster.per_node
        return _over("the machine's memory", needed, int(cluster.host_memory * _HOST_MARGIN))
    return (
        _over("the device's memory", memory.peak, int(device.memory * _MARGIN))
        or _over("the machine's memory", memory.host_peak * cluster.per_node, int(cluster.host_memory * _HOST_MARGIN))
        or _over("the machine's NVMe", memory.nvme * cluster.per_node, cluster.nvme)
    )


def _over(what: str, needed: int, room: int) -> str:
    return "" if needed <= room else f"{gib(needed)} of {what}, of which {gib(room)} may be filled"


def gib(count: float) -> str:
    """Bytes for people."""
    return f"{count / (1 << 30):.1f} GiB"


def shown(found: Sequence[Candidate], most: int) -> list[Candidate]:
    """What a table shows of `candidates`: the fastest ways that fit, and of each preset without one the way that needs least."""
    fitting = [one for one in found if one.fits]
    firsts = list({one.preset: one for one in reversed(fitting)}.values())
    least: dict[str, Candidate] = {}
    for one in found:
        if one.preset not in {way.preset for way in firsts}:
            other = least.setdefault(one.preset, one)
            least[one.preset] = min(other, one, key=lambda way: way.memory.peak + way.memory.host_peak)
    room = max(0, most - len(firsts) - len(least))
    more = [one for one in fitting if one not in firsts][:room]
    return [one for one in fitting if one in firsts or one in more] + list(least.values())
