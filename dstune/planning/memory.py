"""How much memory a worker of a plan takes, part by part, on its device and on its host: bytes, from sizes alone.

The parts are those of DeepSpeed's ZeRO 1, 2 and 3 as `engine` sets them up: gradients are summed in fp32 and a bucket of them is
kept whole; ZeRO-3 gathers up to `stage3_max_live_parameters` again. On a CPU device and host are one, and what a process takes
before it has a model (`ProcessCost`) counts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dstune.planning.shapes import ModelShape

_FP32 = 4
_DTYPE_BYTES: Mapping[str, int] = {"bf16": 2, "fp16": 2, "fp32": 4}
STATES: Mapping[str, int] = {"adamw": 2, "muon": 2, "lion": 1, "sgd": 1, "adagrad": 1}
"""`train.optimizer` -> fp32 numbers that it keeps of each element beside the master weight (Muon: at most)."""
_FUSED_CHUNK = 96 << 20
"""Bytes of logits at once of the fused loss (`model.kernels.linear_cross_entropy`)."""
_CHUNK_TOKENS = 512
"""Targets whose logits are in fp32 at once (`model.loss`)."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where DeepSpeed puts what: the part of its config that memory and traffic depend on."""

    stage: int
    offload_optimizer: str = "none"
    """`none`, `cpu` or `nvme`: masters, moments and the gradients' sums."""
    offload_param: str = "none"
    reduce_bucket: int = 500_000_000
    """Elements of gradients that are reduced at once."""
    sub_group: int = 1_000_000_000
    """Elements that one update handles at once (ZeRO-3)."""
    max_live: int = 1_000_000_000
    """Elements that ZeRO-3 keeps gathered."""
    persistence: int = 100_000
    """Parameters of at most so many elements stay whole on every worker under ZeRO-3."""

    @classmethod
    def of(cls, ds_config: Mapping[str, Any]) -> "Placement":
        """The placement that a DeepSpeed config describes; its silence means DeepSpeed's own defaults."""
        zero = ds_config.get("zero_optimization", {})
        found = {
            "reduce_bucket": zero.get("reduce_bucket_size"),
            "sub_group": zero.get("sub_group_size"),
            "max_live": zero.get("stage3_max_live_parameters"),
            "persistence": zero.get("stage3_param_persistence_threshold"),
        }
        return cls(
            stage=int(zero.get("stage", 0)),
            offload_optimizer=(zero.get("offload_optimizer") or {}).get("device", "none"),
            offload_param=(zero.get("offload_param") or {}).get("device", "none"),
            **{key: int(value) for key, value in found.items() if isinstance(value, int | float)},
        )


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
    recompute: bool
    """Activation checkpointing."""
    fused_loss: bool = False
    """Whether the logits are never held whole."""
    ema: bool = False
    """Whether an average of the weights is kept beside them."""

    @property
    def numbers(self) -> int:
        """fp32 numbers of each trained element that last: the master weight and what the update keeps."""
        return 1 + STATES[self.optimizer] + self.ema


@dataclass(frozen=True, kw_only=True)
class Process:
    """What a worker takes beside the tensors that can be counted."""

    fixed: int
    """Bytes, whatever it trains."""
    workspace: float
    """Of the backward pass, in the activations of one layer: gradients on their way, and heap between large tensors."""
    fragments: float
    """Share of everything that lies idle in the allocator."""
    whole_buckets: bool
    """Whether a bucket takes its room before it is filled."""


CPU_PROCESS = Process(fixed=560 << 20, workspace=5.5, fragments=0.0, whole_buckets=False)
"""Python, torch, transformers, DeepSpeed and gloo, mapped libraries included; measured by `tools/bench memory`."""
GPU_PROCESS = Process(fixed=1200 << 20, workspace=2.0, fragments=0.05, whole_buckets=True)
"""The CUDA context, NCCL's and cuBLAS's buffers, and the caching allocator's fragments: not measured here yet."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one worker, by part; the copies that a checkpoint is written from are apart (`checkpoint_copy`)."""

    device: Mapping[str, int]
    host: Mapping[str, int]
    """What was offloaded to the host's memory."""
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
    def host_peak(self) -> int:
        """Bytes of the host for this worker, without checkpoint copies."""
        return sum(self.host.values())


def estimate(shape: ModelShape, place: Placement, work: Work, process: Process) -> Memory:
    """The memory of one worker."""
    world, trained = work.world_size, shape.trained
    size = _DTYPE_BYTES[work.dtype]
    share = -(-trained // world)
    weights = _weights(shape, place, world, size)
    update = _FP32 * share * work.numbers
    sums = _FP32 * (trained if place.stage == 1 else share)  # DeepSpeed's stage 1 with fp32 sums keeps all of them
    states = {"masters and moments": update, "gradient sums": sums}
    offloaded = place.offload_optimizer != "none"
    bucket = place.reduce_bucket if process.whole_buckets else min(place.reduce_bucket, trained)
    waiting = min(bucket, trained)
    backward = 0 if place.stage == 1 else size * waiting + _FP32 * waiting * _copies_of_bucket(place, world)
    step = _FP32 * min(share, place.sub_group) if place.stage == 3 and not offloaded else 0
    device = {
        "weights": 0 if place.offload_param != "none" else weights,
        "gathered weights": _gathered(shape, place, size),
        **({} if offloaded else states),
        "gradient bucket": _FP32 * bucket,
        "gradients on their way": max(backward, step),
        "activations": _activations(shape, work),
        "logits": _logits(shape, work, size),
        "workspace": int(process.workspace * shape.layer_activations * work.tokens),
        "process": process.fixed,
    }
    device["fragments"] = int(process.fragments * sum(device.values()))
    host: dict[str, int] = {}
    if place.offload_param == "cpu":
        host["weights"] = weights
    if place.offload_optimizer == "cpu":
        host |= states
    saved = _FP32 * trained * work.numbers
    return Memory(
        device=device,
        host=host,
        nvme=(update if place.offload_optimizer == "nvme" else 0) + (weights if place.offload_param == "nvme" else 0),
        checkpoint_copy=-(-saved // world),
        checkpoint_bytes=saved,
    )


def _weights(shape: ModelShape, place: Placement, world: int, size: int) -> int:
    if place.stage < 3:
        return size * shape.parameters
    whole = shape.no_larger_than(place.persistence)
    return size * (whole + -(-(shape.parameters - whole) // world))


def _gathered(shape: ModelShape, place: Placement, size: int) -> int:
    """What ZeRO-3 has gathered at the worst moment: all of a small model, of a large one up to the limit, two layers at least."""
    if place.stage < 3:
        return 0
    return size * min(shape.parameters, max(place.max_live, 2 * shape.largest_layer))


def _copies_of_bucket(place: Placement, world: int) -> int:
    """fp32 copies of a bucket while it is reduced: the result, and under ZeRO-3 with several workers the pieces for each of them."""
    if place.stage == 3:
        return 1 if world == 1 else 2
    return 1


def _activations(shape: ModelShape, work: Work) -> int:
    each = (
        shape.layer_input * shape.layers + shape.layer_activations
        if work.recompute
        else shape.layer_activations * shape.layers
    )
    return work.tokens * (each + shape.other_activations)


def _logits(shape: ModelShape, work: Work, size: int) -> int:
    """Logits and their gradient, and a chunk in fp32; fused, one chunk that turns into its gradient, and the head's sum in fp32."""
    logits = size * work.supervised * shape.vocabulary
    if work.fused_loss:
        head = shape.vocabulary * shape.layer_input // size
        return min(logits, _FUSED_CHUNK) + (_FP32 * head if logits > _FUSED_CHUNK else 0)
    return 2 * logits + 2 * min(_CHUNK_TOKENS, work.supervised) * shape.vocabulary * _FP32
