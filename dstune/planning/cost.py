"""How long a step takes, roughly: arithmetic, ZeRO's traffic, the way to the host and to NVMe, and how much of it hides behind the rest.

Rough on purpose: it ranks plans and tells hours from days. A run's own first steps tell better. The shares below are those of
published runs (Llama 3's report, table 4: 38 to 43% of the peak over 8,192 to 16,384 GPUs; single H100s and H200s with 8 billion
parameters: 50 to 58%), not measured by dstune.
"""

from dataclasses import dataclass

from dstune.planning.hardware import Cluster
from dstune.planning.memory import Work, lasting_bytes, of_a_member
from dstune.planning.placement import Placement
from dstune.planning.shapes import ModelShape

_REACHED = 0.55
"""Share of the peak that a well-fed training step reaches on current GPUs, causally counted; a bf16 product alone reaches 0.8."""
_REACHED_CPU = 0.35
_HIDDEN = 0.5
"""Share of the traffic that runs behind arithmetic."""
_COMPILED = 0.93
"""Of the time, where torch compiles the layers: 0.94 and 0.87 on 8 and 128 H100s (TorchTitan's report, Llama 3.1 8B)."""
_COMPILED_CPU = 0.82
"""The same on a CPU; measured (`model.compiling`)."""
_FP8 = 0.7
"""Of the compiled layers' time, where they multiply in 8 bits besides (the same report); uncompiled, the rounding takes what it saves."""
_NETWORK_SHARE = 0.8
"""Of what a machine's network cards state that a ring over all of them moves."""
_LAUNCH_SECONDS = 0.004
"""What a micro-batch costs whatever its size."""
_LAYER_SECONDS = 0.002
"""What a layer takes Python and DeepSpeed to call, forward and backward, whatever its size: on GPUs beside their arithmetic, which may be
shorter. Not measured."""
_LAYER_SECONDS_CPU = 0.01
"""The same on a CPU, where nothing runs beside it; measured (`tools/bench step` with few tokens)."""
_COLLECTIVES_SECONDS_CPU = 0.025
"""What stage 3's calls between workers on CPUs cost a micro-batch, whatever they carry; measured as that."""
_HALF_TOKENS = 900
"""Tokens of a micro-batch at which a GPU reaches half of what it reaches with many."""
_FP32 = 4
_QUANTIZED_WEIGHTS = 0.5
"""What ZeRO++ leaves of the bytes (Wang et al. 2023)."""


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

    @property
    def parts(self) -> dict[str, float]:
        """By the words that a person reads."""
        return {
            "arithmetic": self.compute,
            "communication": self.communication,
            "the way to the host and back": self.offload,
            "the update": self.update,
        }


def flops(shape: ModelShape, tokens: float, squares: float, recompute: bool) -> float:
    """FLOPs of the forward and backward passes over `tokens`; `squares`: the sum of the squared lengths of their examples.

    6 for each active parameter and token, 4 where it is frozen, and causal attention's 6 L d (squares / tokens); recomputing comes to
    another forward pass, a third of 6 (Kaplan et al. 2020; counted causally).
    """
    attention = 2.0 * shape.layers * shape.attention_width * squares
    forward = 2.0 * shape.active * tokens + attention
    backward = 2.0 * (2 * shape.active - shape.frozen_active) * tokens + 2 * attention
    return forward * (2 if recompute else 1) + backward


def step_seconds(
    shape: ModelShape, place: Placement, work: Work, cluster: Cluster, micro_batches: int, squares_per_token: float
) -> Seconds:
    """The time of a step of `micro_batches` micro-batches on every worker; `squares_per_token`: mean of the squared lengths over them."""
    cut = _tensor_traffic(shape, work, cluster, micro_batches)
    shape, work = of_a_member(shape, work)
    device = cluster.device
    reached = _REACHED_CPU if device.is_cpu else _REACHED
    tokens = work.own_tokens
    filled = 1.0 if device.is_cpu else tokens / (tokens + _HALF_TOKENS)
    tiles = 2.0 * shape.tiled * tokens  # their forward pass comes twice
    one = flops(shape, tokens, tokens * squares_per_token, work.recompute) + tiles
    size, rate = (4, device.flops * device.fp32_share) if work.dtype == "fp32" else (2, device.flops)
    arithmetic = faster(work.compiled, work.fp8, device.is_cpu) * one / (rate * reached * filled)
    compute = micro_batches * (_LAUNCH_SECONDS + _beside_calls(arithmetic, shape, work, device.is_cpu))
    communication = _communication(shape, place, work, cluster, size, micro_batches) if cluster.workers > 1 else 0.0
    offload, update = _offload(shape, place, work, cluster, size, micro_batches)
    exposed = max(0.0, communication - _HIDDEN * compute) if place.stage == 3 else communication
    if device.is_cpu and place.stage == 3 and cluster.workers > 1:
        exposed += micro_batches * _COLLECTIVES_SECONDS_CPU
    exposed += _sequence_traffic(shape, work, cluster, size, micro_batches) + cut
    hidden_offload = max(0.0, offload - (_HIDDEN * compute if place.overlaps else 0.0))
    if work.offload_inputs and not device.is_cpu:  # on the stream that computes: nothing of it hides
        hidden_offload += 2 * micro_batches * tokens * shape.layer_input * shape.layers / device.host_link
    if place.offload_param == "nvme":  # read when they are wanted, for either pass
        read = 2 * micro_batches * size * shape.parameters / cluster.workers * cluster.per_node
        hidden_offload += (read + size * shape.trained / cluster.nodes) / cluster.nvme_rate
    return Seconds(compute=compute, communication=exposed, offload=hidden_offload, update=update)


def _beside_calls(arithmetic: float, shape: ModelShape, work: Work, is_cpu: bool) -> float:
    """Seconds of a micro-batch's `arithmetic` and of calling it, layer by layer."""
    passes = 4 / 3 if work.recompute else 1.0
    if is_cpu:
        return arithmetic + passes * _LAYER_SECONDS_CPU * shape.layers
    return max(arithmetic, passes * _LAYER_SECONDS * shape.layers)


def faster(compiled: bool, fp8: bool, is_cpu: bool) -> float:
    """Of the arithmetic's time, what compiling and products in 8 bits leave."""
    if not compiled:
        return 1.0
    if is_cpu:
        return _COMPILED_CPU
    return _COMPILED * (_FP8 if fp8 else 1.0)


def _communication(
    shape: ModelShape, place: Placement, work: Work, cluster: Cluster, size: int, micro_batches: int
) -> float:
    """Seconds of one worker's traffic in a step, all of it: three times the parameters for stage 3 (Rajbhandari et al. 2020, section 7).

    Stage 3: weights gathered for forward and backward of each micro-batch (once for both where they stay gathered), gradients
    scattered in fp32. A copy within the machines (hpZ) takes the backward pass's gathering off the network. A ring enters and leaves a
    machine by all of its devices' cards.
    """
    device = cluster.device
    others = (work.world_size - 1) / work.world_size
    wide = device.node_link
    if cluster.nodes > 1:
        wide = min(wide, _NETWORK_SHARE * cluster.network * cluster.per_node)
    weights = size * shape.parameters * (_QUANTIZED_WEIGHTS if place.quantized_weights else 1.0)
    gradients = _FP32 * shape.trained
    if place.stage < 3:  # reductions of everything, to every worker: stage 2's too, of each bucket
        reductions = micro_batches if place.stage == 2 else 1
        return others * (size * shape.trained + 2 * gradients * reductions) / wide
    backward = micro_batches if shape.parameters > place.max_live else 1
    near = device.node_link if place.copies > 1 else wide
    return others * ((weights * micro_batches + gradients * micro_batches) / wide + weights * backward / near)


def _sequence_traffic(shape: ModelShape, work: Work, cluster: Cluster, size: int, micro_batches: int) -> float:
    """Ulysses' all-to-alls: queries, keys, values and the result of each layer, forward and backward (Jacobs et al. 2023)."""
    if work.sequence_parallel == 1:
        return 0.0
    link = cluster.network if work.sequence_parallel > cluster.per_node else cluster.device.node_link
    passes = 3 if work.recompute else 2
    away = (work.sequence_parallel - 1) / work.sequence_parallel
    moved = 4 * size * shape.attention_width * shape.layers * work.own_tokens * passes
    return micro_batches * moved * away / link


def _tensor_traffic(shape: ModelShape, work: Work, cluster: Cluster, micro_batches: int) -> float:
    """Sums over those that hold a layer between them: two of its input's size forward, two backward (Shoeybi et al. 2019, section 3)."""
    members = work.tensor_parallel
    if members == 1:
        return 0.0
    link = cluster.network if members > cluster.per_node else cluster.device.node_link
    sums = 6 if work.recompute else 4
    moved = 2 * (members - 1) / members * shape.layer_input * shape.layers * work.tokens * sums
    return micro_batches * moved / link


def _offload(
    shape: ModelShape, place: Placement, work: Work, cluster: Cluster, size: int, micro_batches: int
) -> tuple[float, float]:
    """Seconds on the way to the host and back, and of the update.

    An update reads master, moments and gradient and writes all but the last: 28 bytes an element with AdamW, whose rate the memory's
    bandwidth sets, or the worker's cores (Ren et al. 2021, "ZeRO-Offload", section 5). On NVMe the same numbers are read and written,
    and the gradient both. The gradients' sums wait on the host: DeepSpeed adds each micro-batch's to them on the device, which takes them
    there and back, and copies them once more for the update.
    """
    share = shape.trained / work.world_size
    lasting = lasting_bytes(shape, work)
    touched = 2 * lasting + _FP32 * share
    if place.offload_optimizer != "none" and not cluster.device.is_cpu:
        touched += 2 * _FP32 * share  # clipped there, whatever the norm
    if cluster.device.is_cpu or place.offload_optimizer == "none":
        update = touched / cluster.device.bandwidth
    else:
        update = touched / cluster.host_rate
    if place.offload_optimizer == "nvme":
        update += 2 * (lasting + _FP32 * share) * cluster.per_node / cluster.nvme_rate
    moved = 0.0
    if not cluster.device.is_cpu:
        if place.offload_param != "none":
            moved += 2 * micro_batches * size * shape.parameters / work.world_size
        if place.offload_optimizer != "none":
            moved += ((2 * micro_batches + 1) * _FP32 + size) * share
    return moved / cluster.device.host_link, update
