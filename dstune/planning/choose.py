"""Which preset, micro-batch and recomputation fit a cluster, in which order a run should try them, and which one it takes."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dstune.planning.cost import Seconds, step_seconds
from dstune.planning.deepspeed import AUTO_PRESET
from dstune.planning.hardware import Cluster
from dstune.planning.memory import Memory, Work, estimate
from dstune.planning.placement import Placement
from dstune.planning.process import of_worker
from dstune.planning.reachable import fitted
from dstune.planning.shapes import ModelShape

PRESETS = ("zero1", "zero2", "zero3", "zero3-offload-optimizer", "zero3-offload-all", "zero3-nvme")
"""What is tried, the simplest first: of two equally fast ones the earlier wins. ZeRO++ changes what is learnt: only by name."""
Recompute = bool | Literal["offload"]
"""`model.activation_checkpointing`, settled."""
_MARGIN = 0.92
"""Of a device's memory that a plan may fill: allocators fragment, and the prediction may be a tenth off."""
_HOST_MARGIN = 0.9
_MOST_MICRO_BATCHES = 64
_EQUALLY_FAST = 1.03
"""Predicted times this close are taken as equal."""
_TIGHT = 0.85
"""Of the room that may be filled: a way that fills more gives way to one that is equally fast and fills less."""


@dataclass(frozen=True, kw_only=True)
class Room:
    """One kind of memory that a way fills."""

    name: str
    needed: int
    """Bytes."""
    free: int
    """Bytes that may be filled."""

    @property
    def missing(self) -> int:
        return max(0, self.needed - self.free)

    def __str__(self) -> str:
        return f"{gib(self.needed)} of {self.name}, of which {gib(self.free)} may be filled"


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to run, with what it takes."""

    preset: str
    micro_batch_size: int
    micro_batches: int
    recompute: Recompute
    sequence_parallel: int
    memory: Memory
    seconds: Seconds
    rooms: Sequence[Room]
    unusable: str
    """Why it cannot be taken at all, whatever the room; or empty."""

    @property
    def refused(self) -> str:
        """Why it does not fit; empty where it does."""
        return self.unusable or next((str(room) for room in self.rooms if room.missing), "")

    @property
    def fits(self) -> bool:
        return not self.refused

    @property
    def filled(self) -> float:
        """Of the tightest room."""
        return max(room.needed / max(1, room.free) for room in self.rooms)


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
    weights_only: bool = False
    compiled: bool = False
    fp8: bool = False
    drawn: bool = False


@dataclass(frozen=True, kw_only=True)
class Settled:
    """What the run file leaves no choice about; None: free."""

    micro_batch_size: int | None = None
    recompute: Recompute | None = None
    usual_micro_batch: int = 1
    """What a CPU is given at most: it gains nothing from more."""
    sequence_parallel: Sequence[int] = (1,)
    tensor_parallel: int = 1


def candidates(
    shape: ModelShape,
    cluster: Cluster,
    load: Load,
    policies: Mapping[str, Mapping[str, Any]],
    settled: Settled = Settled(),
    usable: Callable[[str], str] = lambda preset: "",
) -> list[Candidate]:
    """Every way to run, those that fit first, the fastest of them first; but the one that `preset: auto` takes leads.

    `policies`: preset -> its DeepSpeed config. `usable` says why a preset cannot be taken at all (no NVMe path, an optimizer that it
    does not know), or nothing.
    """
    found = [
        _candidate(
            shape,
            cluster,
            load,
            preset,
            Placement.of(fitted(policy, cluster.workers)),
            size,
            again,
            split,
            settled,
            usable(preset),
        )
        for split in settled.sequence_parallel
        # One that the run file says is not a choice; machines that are not full count as full ones here.
        if len(settled.sequence_parallel) == 1 or cluster.workers % (split * settled.tensor_parallel) == 0
        for preset, policy in policies.items()
        for size in _micro_batches(load, cluster, split, settled)
        for again in _recomputations(shape, cluster, settled)
    ]
    simplest = {preset: number for number, preset in enumerate(policies)}

    def rank(one: Candidate) -> tuple[Any, ...]:
        again = (False, True, "offload").index(one.recompute)
        return not one.fits, round(one.seconds.step, 3), again, simplest[one.preset], one.micro_batch_size

    found.sort(key=rank)
    leader = _leader([one for one in found if one.fits], cluster)
    return found if leader is None else [leader, *(one for one in found if one is not leader)]


def _leader(fitting: Sequence[Candidate], cluster: Cluster) -> Candidate | None:
    """The fastest way; where that is a tight fit, the one that leaves most room among those that are as good as fastest.

    On a CPU, whose figures are rough and where little differs: ZeRO-3 before the others, for what runs here is then what runs on a
    cluster; nothing computed twice; and the largest micro-batch.
    """
    if not fitting:
        return None
    if cluster.device.is_cpu:
        return min(fitting, key=lambda one: (one.preset != AUTO_PRESET, bool(one.recompute), -one.micro_batch_size))
    fastest = min(fitting, key=lambda one: one.seconds.step)
    if fastest.filled <= _TIGHT:
        return fastest
    limit = fastest.seconds.step * _EQUALLY_FAST
    return min((one for one in fitting if one.seconds.step <= limit), key=lambda one: max(_TIGHT, one.filled))


def nearest(found: Sequence[Candidate]) -> Candidate:
    """Of ways none of which fits, the one that lacks the smallest shares of the room there is."""
    usable = [one for one in found if not one.unusable] or list(found)
    return min(usable, key=lambda one: sum(room.missing / max(1, room.free) for room in one.rooms))


def _micro_batches(load: Load, cluster: Cluster, split: int, settled: Settled) -> Iterator[int]:
    share = _share(load, cluster, split * settled.tensor_parallel)
    if settled.micro_batch_size is not None:
        yield min(settled.micro_batch_size, share)
        return
    most = min(share, settled.usual_micro_batch if cluster.device.is_cpu else _MOST_MICRO_BATCHES)
    size = 1
    while size < most:
        yield size
        size *= 2
    yield most


def _share(load: Load, cluster: Cluster, split: int) -> int:
    """Rows of a step for each group of workers that share rows."""
    return math.ceil(load.global_batch_size / (cluster.workers // split))


def _recomputations(shape: ModelShape, cluster: Cluster, settled: Settled) -> Sequence[Recompute]:
    if settled.recompute is not None:
        return (settled.recompute,)
    if not shape.recomputable:
        return (False,)
    return (False, True) if cluster.device.is_cpu else (False, True, "offload")


def _candidate(
    shape: ModelShape,
    cluster: Cluster,
    load: Load,
    preset: str,
    place: Placement,
    size: int,
    recompute: Recompute,
    split: int,
    settled: Settled,
    unusable: str,
) -> Candidate:
    tokens = size * load.row_tokens
    work = Work(
        dtype=load.dtype,
        optimizer=load.optimizer,
        world_size=cluster.workers,
        tokens=tokens,
        supervised=math.ceil(tokens * load.supervised_share),
        example_tokens=load.squares_per_token,
        recompute=bool(recompute),
        offload_inputs=recompute == "offload",
        fused_loss=load.fused_loss,
        ema=load.ema,
        weights_only=load.weights_only,
        compiled=load.compiled,
        fp8=load.fp8,
        drawn=load.drawn,
        sequence_parallel=split,
        tensor_parallel=settled.tensor_parallel,
    )
    memory = estimate(shape, place, work, of_worker(cluster.device, by_ray=cluster.by_ray))
    micro_batches = math.ceil(_share(load, cluster, split * settled.tensor_parallel) / size)
    return Candidate(
        preset=preset,
        micro_batch_size=size,
        micro_batches=micro_batches,
        recompute=recompute,
        sequence_parallel=split,
        memory=memory,
        seconds=step_seconds(shape, place, work, cluster, micro_batches, load.squares_per_token),
        rooms=rooms(memory, cluster),
        unusable=unusable,
    )


def rooms(memory: Memory, cluster: Cluster) -> list[Room]:
    """What a way needs beside what there is. On a CPU device and host are one."""
    device, each = cluster.device, cluster.per_node
    host = int(cluster.host_memory * _HOST_MARGIN)
    if device.is_cpu:
        found = [Room(name="the machine's memory", needed=(memory.peak + memory.host_peak) * each, free=host)]
    else:
        found = [
            Room(name="the device's memory", needed=memory.peak, free=int(device.memory * _MARGIN)),
            Room(name="the machine's memory", needed=memory.host_peak * each, free=host),
        ]
    if memory.nvme:
        found.append(Room(name="the machine's NVMe", needed=memory.nvme * each, free=cluster.nvme))
    return found


def gib(count: float) -> str:
    """Bytes for people."""
    return f"{count / (1 << 30):.1f} GiB"


def shown(found: Sequence[Candidate], most: int) -> list[Candidate]:
    """What a table shows of `candidates`: the best ways that fit, and of each preset without one the way that comes nearest."""
    fitting = [one for one in found if one.fits]
    firsts = list({one.preset: one for one in reversed(fitting)}.values())
    refused = dict.fromkeys(one.preset for one in found if one.preset not in {way.preset for way in firsts})
    close = [nearest([one for one in found if one.preset == preset]) for preset in refused]
    room = max(0, most - len(firsts) - len(close))
    more = [one for one in fitting if one not in firsts][:room]
    return [one for one in fitting if one in firsts or one in more] + close
