"""How much memory a worker of a plan takes, part by part, on its device, its host and its NVMe: bytes, from sizes alone.

The parts are those of DeepSpeed's ZeRO 1, 2 and 3 as `engine` sets them up: gradients are summed in fp32 and a bucket of them is
kept whole; ZeRO-3 gathers up to `stage3_max_live_parameters` again. With AdamW in bf16 that makes 18 bytes a parameter over all
workers (2 of the weight, 4 of the gradients' sum, 12 of master and moments), where Rajbhandari et al. 2020 ("ZeRO", section 3.1)
count 16 with sums in 16 bits. On a CPU device and host are one, and what a process takes before it has a model (`Process`) counts.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from dstune.planning.placement import ROUNDED_PINNED, Placement
from dstune.planning.process import NOT_ALLOCATED, Process
from dstune.planning.shapes import ModelShape

_FP32 = 4
DTYPE_BYTES: Mapping[str, int] = {"bf16": 2, "fp16": 2, "fp32": 4}
"""`model.dtype` -> bytes of one element."""
_STATES: Mapping[str, float] = {
    "adamw": 8, "muon": 8, "lion": 4, "sgd": 4, "adagrad": 4, "adafactor": 0, "adamw8bit": 2 + 8 / 256
}  # fmt: skip
"""`train.optimizer` -> bytes that it keeps of each element beside the master weight (Muon: at most; Adafactor's sums over rows and
columns, and what is kept of vectors, are too little to count)."""
_MOMENTS = 8
"""The same of what `adamw8bit` leaves in fp32, and of all its moments in a checkpoint."""
_UPDATE_COPIES: Mapping[str, int] = {"adagrad": 2, "lion": 1, "muon": 1}
"""`train.optimizer` -> tensors of the update's size that it makes beside the gradient."""
_FUSED_CHUNK = 128 << 20
"""Bytes of logits at once of the fused loss (`model.kernels.linear_cross_entropy`)."""
_CHUNK_TOKENS = 512
"""Targets whose logits are in fp32 at once (`model.loss`)."""
_SHARED_ROWS = 4.0
"""How many times the pieces of a heap are the usual ones where workers share a row; measured on one shape (`tools/bench memory`)."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one worker does at once."""

    dtype: str
    optimizer: str
    world_size: int
    tokens: int
    """Of a micro-batch."""
    supervised: int
    """Targets among them: logits are computed for these alone."""
    example_tokens: float = math.inf
    """Of the example that a token stands in, on average."""
    recompute: bool
    """Activation checkpointing."""
    offload_inputs: bool = False
    """Whether what the recomputed layers start from waits in the host's memory."""
    fused_loss: bool = False
    """Whether the logits are never held whole."""
    ema: bool = False
    """Whether an average of the weights is kept beside them."""
    weights_only: bool = False
    """Whether checkpoints leave the optimizer's states out."""
    compiled: bool = False
    """Whether torch compiles the layers."""
    fp8: bool = False
    """Whether the layers multiply in 8 bits."""
    sequence_parallel: int = 1
    """Workers that share the tokens of a micro-batch between them; the states are cut over all workers all the same."""
    tensor_parallel: int = 1
    """Workers that hold the layers between them, and see the same tokens."""
    drawn: bool = False
    """Whether the weights are random ones and come from no files: each worker makes all of them at first."""

    @property
    def own_tokens(self) -> int:
        """Of a micro-batch, on this worker."""
        return -(-self.tokens // self.sequence_parallel)

    @property
    def own_supervised(self) -> int:
        return -(-self.supervised // self.sequence_parallel)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one worker, by part; the copies that a checkpoint is written from are apart (`checkpoint_copy`)."""

    device: Mapping[str, int]
    host: Mapping[str, int]
    """What was offloaded to the host's memory, and what the process takes there."""
    nvme: int
    checkpoint_copy: int
    """Host memory of this worker's part of a checkpoint that is written behind the training."""
    checkpoint_bytes: int
    """Of one whole checkpoint on the disk, over all workers."""

    @property
    def peak(self) -> int:
        """Bytes of the device at the worst moment."""
        return sum(self.device.values())

    @property
    def allocated(self) -> int:
        """Bytes of the peak that torch's allocator would count on a GPU."""
        return sum(count for name, count in self.device.items() if name not in NOT_ALLOCATED)

    @property
    def host_peak(self) -> int:
        """Bytes of the host for this worker, without checkpoint copies."""
        return sum(self.host.values())


def estimate(shape: ModelShape, place: Placement, work: Work, process: Process) -> Memory:
    """The memory of one worker."""
    size = DTYPE_BYTES[work.dtype]
    saved, workers, loaded = saved_bytes(shape, work), work.world_size, size * shape.parameters
    shape, work = of_a_member(shape, work)
    weights = _weights(shape, place, work.world_size, size)
    share = -(-shape.trained // work.world_size)
    device = {
        "weights": 0 if place.offload_param != "none" else weights,
        "weights' copy within machines": _copy_within(shape, place, size),
        "gathered weights": _gathered(shape, place, work, process, size),
        **(_states(shape, place, work, process) if place.offload_optimizer == "none" else {}),
        **_passing(shape, place, work, process, size),
        "process": process.fixed + (process.compiler if work.compiled else 0),
        "experts' compiled products": process.product * min(process.expert_products * shape.experts, process.products),
    }
    device = {name: count for name, count in device.items() if count}
    device["fragments"] = int(process.fragments * sum(device.values()))
    swapped = lasting_bytes(shape, work) + _FP32 * share if place.offload_optimizer == "nvme" else 0
    host = _host(shape, place, work, process, weights)
    if place.stage < 3 and not process.retains:  # stages 1 and 2 build it on the host, a cut one's part
        loaded = loaded if work.drawn else weights
        host["whole model, at first"] = max(0, loaded + host["process"] - sum(host.values()))
    elif work.drawn and work.world_size < workers:  # before it is cut
        first = device if process.retains else host
        first["whole model, at first"] = max(0, loaded + first["process"] - sum(first.values()))
    return Memory(
        device=device,
        host={name: count for name, count in host.items() if count},
        nvme=swapped + (weights if place.offload_param == "nvme" else 0),
        checkpoint_copy=-(-saved // workers),
        checkpoint_bytes=saved,
    )


def of_a_member(shape: ModelShape, work: Work) -> tuple[ModelShape, Work]:
    """The model and the world as a worker sees them that holds a part of each layer: its part, and the workers that have the same one."""
    mine = replace(work, world_size=work.world_size // work.tensor_parallel, tensor_parallel=1)
    return shape.part(work.tensor_parallel, DTYPE_BYTES[work.dtype]), mine


def lasting_bytes(shape: ModelShape, work: Work) -> int:
    """What one worker keeps of the elements that are trained: master weights, the states of the update, the average."""
    states = _STATES[work.optimizer] * shape.trained
    if work.optimizer == "adamw8bit":
        states += (_MOMENTS - _STATES[work.optimizer]) * shape.tables
    if work.optimizer == "muon":
        states -= _FP32 * shape.hidden
    return _FP32 * -(-shape.trained // work.world_size) * (1 + work.ema) + math.ceil(states / work.world_size)


def saved_bytes(shape: ModelShape, work: Work) -> int:
    """What of it a checkpoint holds, over all workers."""
    states = (_MOMENTS if work.optimizer == "adamw8bit" else int(_STATES[work.optimizer])) * shape.trained
    if work.optimizer == "muon":
        states -= _FP32 * shape.hidden
    return shape.trained * _FP32 * (1 + work.ema) + (0 if work.weights_only else states)


def _states(shape: ModelShape, place: Placement, work: Work, process: Process) -> dict[str, int]:
    share = -(-shape.trained // work.world_size)
    sums = shape.trained if place.stage == 1 else share  # DeepSpeed's stage 1 with fp32 sums keeps all of them
    found = {"masters and moments": lasting_bytes(shape, work)}
    # Stage 2 frees them after each update; on a CPU they count where they come (`_reduced`).
    return found if place.stage == 2 and process.retains else found | {"gradient sums": _FP32 * sums}


def _passing(shape: ModelShape, place: Placement, work: Work, process: Process, size: int) -> dict[str, int]:
    """What comes and goes within a step: at its most at the end of the forward pass, while gradients are reduced, or in the update."""
    trained, share = shape.trained, -(-shape.trained // work.world_size)
    bucket = place.reduce_bucket if process.whole_buckets else min(place.reduce_bucket, trained)
    waiting = min(max(bucket, shape.largest), trained)
    made = _UPDATE_COPIES.get(work.optimizer, 0) if place.offload_optimizer == "none" else int(process.retains)
    update = _FP32 * min(share, place.sub_group) * made if place.stage == 3 else 0
    activations = _activations(shape, work, process)
    logits = _logits(shape, work, size, process)
    arriving = _arriving(shape, place, work, process, size)
    workspace = int(_workspace(shape, place, work, process) * 2 / size * work.own_tokens)
    if process.retains:
        sent = max(update, _reduced(shape, place, work, waiting, size))
        # For the backward pass weights come once more, where they have gradients into the room that is counted for these.
        again = int(_frozen(shape) * _gathered(shape, place, work, process, size))
        return {
            "activations": activations,
            "weights on their way": max(arriving, again),
            "logits": sum(logits),
            "workspace": workspace,
            "gradients on their way": sent,
        }
    if _sums_as_they_come(place, work):
        bucket = 0
    sent = _reduced_on_gpu(shape, place, work, bucket, size)
    forward = activations + arriving + max(sum(logits), workspace)
    # The first bucket is full, and sent, when so much of the backward pass is over.
    left = int(activations * max(0.0, 1 - bucket / max(1, trained)))
    beyond = max(0, sent + left + workspace - forward, update - forward)
    return {
        "gradient bucket": _FP32 * bucket,
        "activations": activations,
        "weights on their way": arriving,
        "logits or workspace": max(sum(logits), workspace),
        "gradients on their way": beyond,
    }


def _workspace(shape: ModelShape, place: Placement, work: Work, process: Process) -> float:
    """Bytes a token, in 16 bits.

    A heap is left in pieces, too short for what comes next, by all that lives for a moment between what stays: copies for the workers
    that share a row or hold a layer between them, results of what is frozen, tiles that are computed again within a layer that is.
    """
    layer = _layer(shape, work)
    if not process.retains:
        return process.workspace * layer
    layer *= shape.members
    layers = process.workspace
    if place.stage == 3:
        layers = process.workspace_beside_gradients
        layers += max(_frozen(shape) * process.workspace_frozen, work.recompute * process.workspace_recomputed)
    if work.compiled:
        layers = process.compiled_workspace
    if work.sequence_parallel > 1:
        layers *= _SHARED_ROWS
    if work.recompute and shape.tile_activations:
        return layers * (layer + shape.tile_activations)
    return layers * layer


def _frozen(shape: ModelShape) -> float:
    """Share of the weights."""
    return 1 - shape.trained / max(1, shape.parameters)


def _reduced(shape: ModelShape, place: Placement, work: Work, waiting: int, size: int) -> int:
    """Bytes of the tensors that there are on a CPU only while `waiting` gradients are reduced.

    Stage 1 has a copy of them; stage 2 the gradients as the backward pass made them, the bucket that they go to, a copy of it in fp32
    and, with several workers, in their order, and from then on the sums; stage 3 the gradients as they were made, and what others send
    of theirs (`engine.reduction`). All of it beside the activations, whose room is in pieces when they are let go of.
    """
    whole = _FP32 * waiting
    if place.stage == 1:
        return whole
    if place.stage == 3:
        theirs = size * waiting * (work.world_size - 1) // work.world_size
        return size * waiting + theirs
    sums = 0 if place.offload_optimizer != "none" else _FP32 * -(-shape.trained // work.world_size)
    in_order = size * waiting if work.world_size > 1 else 0
    in_fp32 = size * waiting + whole if size < _FP32 else 0
    return size * waiting + in_fp32 + in_order + sums


def _host(shape: ModelShape, place: Placement, work: Work, process: Process, weights: int) -> dict[str, int]:
    """What is offloaded there. DeepSpeed keeps the gradients' sums, and beside them the gradients that an update reads."""
    share = -(-shape.trained // work.world_size)
    group = min(share, place.sub_group) if place.stage == 3 else share
    held = {"process": process.host}
    pinned: Counter[int] = Counter()
    if place.offload_param == "cpu":
        held["weights"] = weights
        if process.pins:
            # One by one; those that are trained once more, in one piece, and torch keeps the room of the first.
            size = DTYPE_BYTES[work.dtype]
            for count, number in shape.sizes.items():
                pinned[size * -(-count // work.world_size)] += number
            held["weights in one piece"] = size * share
    if place.offload_param == "nvme":
        size = DTYPE_BYTES[work.dtype]
        kept = size * min(share, place.weights_in_host)
        held |= {"weights": kept, "weights' buffers": _weight_buffers(shape, place, work.world_size, size)}
        pinned[kept] += 1
    if work.offload_inputs and process.pins:
        each = shape.layer_input * work.own_tokens
        held["layers' inputs"] = each * shape.layers
        pinned[each] += shape.layers
    if place.offload_optimizer != "none":
        held["gradient sums"] = _FP32 * share
        pinned[_FP32 * share] += 1
    if place.offload_optimizer == "cpu":
        held["masters and moments"] = lasting_bytes(shape, work)
        held["gradients of the update"] = _FP32 * share
        pinned[_FP32 * group] += -(-share // max(1, group))
    if place.offload_optimizer == "nvme":
        buffers = place.swap_buffers + work.ema
        # Pinned by DeepSpeed itself, as they are; a group ends behind the parameter that makes it full.
        held["swap buffers"] = _FP32 * min(share, group + -(-shape.largest // work.world_size)) * buffers
    if process.pins:
        held["rounding of pinned memory"] = sum(number * (_rounded(count) - count) for count, number in pinned.items())
    return held


def _weight_buffers(shape: ModelShape, place: Placement, world: int, size: int) -> int:
    """Bytes of those that weights are read from NVMe into, and of the one that an update's group is written from."""
    each = place.weight_buffer or -(-shape.largest // world)
    share = -(-shape.trained // world)
    written = min(share, place.sub_group) if share > place.weights_in_host else 0
    return size * (place.weight_buffers * each + written)


def _rounded(count: int) -> int:
    """What torch's CachingHostAllocator takes for a tensor of `count` bytes: the next power of two, of a large one no more."""
    return 1 << max(0, count - 1).bit_length() if count <= ROUNDED_PINNED else count


def _weights(shape: ModelShape, place: Placement, world: int, size: int) -> int:
    if place.stage < 3:
        return size * shape.parameters
    whole = shape.no_larger_than(place.persistence)
    return size * (whole + -(-(shape.parameters - whole) // world))


def _copy_within(shape: ModelShape, place: Placement, size: int) -> int:
    return size * -(-shape.parameters // place.copies) if place.stage == 3 and place.copies > 1 else 0


def _gathered(shape: ModelShape, place: Placement, work: Work, process: Process, size: int) -> int:
    """What ZeRO-3 has gathered at the worst moment: all of a small model, of a large one up to the limit, two layers or its largest table
    at least.

    One worker alone takes its own weights as they are, unless they wait in another memory.
    """
    elsewhere = place.offload_param != "none" and process.pins
    if place.stage < 3 or (work.world_size == 1 and not elsewhere and not place.quantized_weights):
        return 0
    return size * min(shape.parameters, max(place.max_live, 2 * shape.largest_layer, shape.largest))


def _arriving(shape: ModelShape, place: Placement, work: Work, process: Process, size: int) -> int:
    """What is gathered is copied to each weight's own room, a bucket at a time: the last one, while activations are not all there yet."""
    gathered = _gathered(shape, place, work, process, size)
    bucket = min(gathered, size * place.prefetch)
    rest = bucket / max(1, size * shape.parameters)
    later = int(rest * _activations(shape, work, process)) + sum(_logits(shape, work, size, process))
    return max(0, bucket - later)


def _sums_as_they_come(place: Placement, work: Work) -> bool:
    """Whether DeepSpeed takes its class for ZeRO-1 in bf16, which has no bucket."""
    return place.stage == 1 and work.dtype == "bf16" and place.offload_optimizer == "none"


def _reduced_on_gpu(shape: ModelShape, place: Placement, work: Work, bucket: int, size: int) -> int:
    """Bytes of the tensors that there are, beside the bucket, only while gradients are reduced.

    ZeRO-1 in bf16 adds each gradient to the sums, by way of a copy in fp32. Stage 2 copies its bucket in fp32. Stage 3 does to put it in
    the workers' order; a gradient that is larger than the bucket goes alone, and with a copy in fp32.
    """
    largest = min(shape.largest, shape.trained)
    alone = (size + (_FP32 if size < _FP32 else 0)) * largest
    if place.stage == 1:
        return alone if _sums_as_they_come(place, work) else 0
    waiting = _FP32 * min(bucket, shape.trained)
    return max(waiting, alone if largest > bucket else 0)


def _activations(shape: ModelShape, work: Work, process: Process) -> int:
    tokens = work.own_tokens
    layer = _layer(shape, work) + (_apart(shape, work) if process.attends_apart else 0)
    each = layer * shape.layers
    if work.recompute:
        inputs = 2 if work.offload_inputs else shape.layers
        each = shape.layer_input * inputs + layer
    tile = shape.tile_activations * min(shape.tile_tokens, tokens)
    return tokens * (each + shape.other_activations) + tile


def _layer(shape: ModelShape, work: Work) -> int:
    """Bytes a token that a layer keeps."""
    plain = shape.layer_activations
    return min(plain, shape.compiled_activations or plain) if work.compiled else plain


def _apart(shape: ModelShape, work: Work) -> int:
    """Bytes a token and layer more, where attention goes example by example: its result once more, and in fp32 all of it twice as large."""
    doubled = shape.attention_activations if work.dtype == "bf16" and work.example_tokens <= shape.fp32_tokens else 0
    return shape.attention_result + doubled


def _logits(shape: ModelShape, work: Work, size: int, process: Process) -> list[int]:
    """Logits and their gradient, and a chunk in fp32; fused, one chunk that turns into its gradient, and the head's gradient: each tensor.

    The fused loss sums the head's gradient in fp32 where several chunks add up to it; where less room does, a processor makes it in the
    logits' own (`model.kernels.linear_cross_entropy`).
    """
    logits = size * work.own_supervised * shape.vocabulary
    head = shape.vocabulary * shape.layer_input // size if shape.head_trained else 0
    second = size * head if shape.head_tied else 0  # an embedding that is the head too has a gradient from either end
    if not work.fused_loss:
        chunk = min(_CHUNK_TOKENS, work.own_supervised) * shape.vocabulary * _FP32
        return [logits, logits, chunk, chunk, second]
    several = [_FUSED_CHUNK, _FP32 * head, second]
    if logits + size * head <= sum(several[:2]):
        return [logits, size * head, second]
    overlaid = process.retains and 2 * size * head <= logits <= sum(several[:2])
    return [logits, second] if overlaid else several
