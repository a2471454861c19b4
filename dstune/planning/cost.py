"""How long a step takes, roughly: arithmetic, ZeRO's traffic, the way to the host and to NVMe, and how much of it hides behind the rest.

Rough on purpose: it ranks plans and tells hours from days. A run's own first steps tell better.
"""

import math
from dataclasses import dataclass

from dstune.planning.hardware import Cluster
from dstune.planning.memory import Placement, Work
from dstune.planning.shapes import ModelShape

_REACHED = 0.55
"""Share of the peak that a well-fed training step reaches on current GPUs, causally counted; a bf16 product alone reaches 0.8."""
_REACHED_CPU = 0.35
_HIDDEN = 0.5
"""Share of the traffic that runs behind arithmetic."""
_LAUNCH_SECONDS = 0.004
"""What a micro-batch costs whatever its size, for each layer thousand launches included."""
_HALF_TOKENS = 900
"""Tokens of a micro-batch at which a GPU reaches half of what it reaches with many."""
_STATE_BYTES = 8
"""Read and written of each fp32 number that an update touches."""
NVME_STATE_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Of one step."""

    compute: float
    communication: float
    """Exposed: what does not hide behind arithmetic."""
    offload: float
    update: float

    @property
    def step(self) -> float:
        return self.compute + self.communication + self.offload + self.update


def flops(shape: ModelShape, tokens: float, squares: float, recompute: bool) -> float:
    """FLOPs of the forward and backward passes over `tokens`; `squares`: the sum of the squared lengths of their examples.

    6 for each active parameter and token, and causal attention's 6 L d (squares / tokens); a recomputed forward pass adds a third
    (Kaplan et al. 2020; counted causally).
    """
    matmul = 6.0 * shape.active * tokens
    attention = 6.0 * shape.layers * shape.attention_width * squares
    return (matmul + attention) * (4 / 3 if recompute else 1.0)


def step_seconds(
    shape: ModelShape, place: Placement, work: Work, cluster: Cluster, micro_batches: int, squares_per_token: float
) -> Seconds:
    """The time of a step of `micro_batches` micro-batches on every worker; `squares_per_token`: mean of the squared lengths over them."""
    device = cluster.device
    reached = _REACHED_CPU if device.is_cpu else _REACHED
    filled = 1.0 if device.is_cpu else work.tokens / (work.tokens + _HALF_TOKENS)
    one = flops(shape, work.tokens, work.tokens * squares_per_token, work.recompute)
    compute = micro_batches * (one / (device.flops * reached * filled) + _LAUNCH_SECONDS)
    size = 2 if work.dtype != "fp32" else 4
    link = cluster.network if cluster.nodes > 1 else device.node_link
    traffic = _traffic(shape, place, work, size, micro_batches)
    communication = traffic / link if cluster.workers > 1 else 0.0
    offload, update = _offload(shape, place, work, cluster, size, micro_batches)
    exposed = max(0.0, communication - _HIDDEN * compute) if place.stage == 3 else communication
    hidden_offload = max(0.0, offload - _HIDDEN * compute)
    return Seconds(compute=compute, communication=exposed, offload=hidden_offload, update=update)


def _traffic(shape: ModelShape, place: Placement, work: Work, size: int, micro_batches: int) -> float:
    """Bytes of one worker and step. Stage 3: weights gathered for forward and backward of each micro-batch, gradients scattered in fp32."""
    others = (work.world_size - 1) / work.world_size
    gathered = 2 * micro_batches if place.stage == 3 and shape.parameters > place.max_live else micro_batches + 1
    weights = size * shape.parameters * (gathered if place.stage == 3 else 1)
    reductions = micro_batches if place.stage > 1 else 1
    gradients = 4 * shape.trained * reductions * (2 if place.stage == 1 else 1)
    return others * (weights + gradients)


def _offload(
    shape: ModelShape, place: Placement, work: Work, cluster: Cluster, size: int, micro_batches: int
) -> tuple[float, float]:
    share = shape.trained / work.world_size
    numbers = share * (1 + work.numbers)
    if cluster.device.is_cpu or place.offload_optimizer == "none":
        update = numbers * _STATE_BYTES / cluster.device.bandwidth
    else:
        update = numbers * _STATE_BYTES * cluster.per_node / cluster.host_bandwidth
    if place.offload_optimizer == "nvme":
        update += 2 * NVME_STATE_BYTES * share * work.numbers * cluster.per_node / cluster.nvme_rate
    moved = 0.0
    if not cluster.device.is_cpu:
        if place.offload_param != "none":
            moved += 2 * micro_batches * size * shape.parameters / work.world_size
        if place.offload_optimizer != "none":
            moved += (4 + size) * share
    return moved / cluster.device.host_link, update


def checkpoint_interval(save_seconds: float, mean_hours_between_failures: float) -> float:
    """Seconds between two saves that lose the least: Young's first-order optimum, sqrt(2 C M) (Young 1974)."""
    return math.sqrt(2 * save_seconds * mean_hours_between_failures * 3600)


def goodput(
    save_seconds: float, every_seconds: float, restart_seconds: float, mean_hours_between_failures: float
) -> float:
    """Share of the time that makes progress: 1 / (1 + C/t + (t/2 + R)/M)."""
    mean = mean_hours_between_failures * 3600
    return 1 / (1 + save_seconds / every_seconds + (every_seconds / 2 + restart_seconds) / mean)
