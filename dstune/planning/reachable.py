"""DeepSpeed settings under which a worker could not reach all of the training state, or not cut it, or that would do nothing: refused
before anything starts.

`checkpoint.weights_only` helps none of them. ZenFlow, measured in DeepSpeed 0.19.8 on CPU tensors: what it selects has bf16 moments and
no fp32 master, so that after a step about 9% of the weights were not their masters' (95% with `overlap_step`); a step skipped for a NaN
left 21,910 of 123,712 weights NaN; on two workers its second selection stopped it (moments of another shape); models of `zero.Init` are
read transposed; at stage 2 it is a wrong model from the first pass on; its process outlives a worker that is killed. SuperOffload
asserts that there is CUDA; its masters stay in the worker, and nobody has shown on such a machine that they are whole after each step.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from dstune.config.declined import WHY_NO_DEEPCOMPILE
from dstune.errors import Problem
from dstune.planning import tensor_parallel

_WHERE = "deepspeed: zero_optimization."
_NO_CHECKPOINT = "no checkpoint could be made"
_ELSEWHERE: Mapping[str, tuple[Any, str]] = {
    "ratio": (1.0, "keeps states in another optimizer, of its own"),
    "super_offload": (False, "wants CUDA, and keeps its moments in another process"),
}
"""Of `offload_optimizer`: the value that leaves it off, and what it does."""

HPZ = "zero_hpz_partition_size"
"""ZeRO++: workers of a machine that keep a copy of the weights between them. The states are cut as without it."""
QUANTIZED_WEIGHTS = "zero_quantized_weights"
QUANTIZED = (QUANTIZED_WEIGHTS, "zero_quantized_nontrainable_weights")
"""ZeRO++: what travels in 8 bits, by kernels for GPUs. The states are as without it."""
_QUANTIZED_TOGETHER = 8
"""Numbers that DeepSpeed's kernel for weights takes at once."""

STREAMED = ("stage3_prefetch_bucket_size", "stage3_max_live_parameters", "stage3_max_reuse_distance")
"""What is zero where weights are on NVMe (`streamed`)."""

_UNREACHABLE: Mapping[str, str] = {
    "zenflow": "updates 16-bit weights that have no master, by gradients that are not clipped, in skipped steps too, and stops on several "
    "workers when it selects again (DeepSpeed 0.19.8): no run of it could be trusted, with `checkpoint.weights_only` neither",
    "mics_shard_size": f"partitions parameters over a part of the workers: {_NO_CHECKPOINT}",
    "zero_quantized_gradients": "hands gradients to a kernel that reads them as fp16, which they are not (DeepSpeed 0.19.8): on several "
    "machines a run would learn noise",
}
_OFF: Mapping[str, Any] = {"mics_shard_size": -1}
_INSTEAD: Mapping[str, str] = {
    "zenflow": " The preset zero3-offload-optimizer keeps the states in main memory too.",
    "mics_shard_size": f" {HPZ} (preset zero++) keeps copies within a machine.",
    "zero_quantized_gradients": f" Take it out; {QUANTIZED_WEIGHTS} is sound.",
    "super_offload": " The preset zero3-offload-optimizer keeps the states in main memory too.",
}

_UNSWAPPABLE: Mapping[str, str] = {
    "adafactor": "keeps sums over rows and columns, which DeepSpeed does not swap",
    "adamw8bit": "keeps moments in 8 bits, which DeepSpeed does not swap",
}


_SWAPPED_MASTER_AND_GRADIENT = 2
_SWAPPED_STATES: Mapping[str, int] = {"adamw": 2, "muon": 2, "lion": 1, "adagrad": 1, "sgd": 1}
"""`train.optimizer` -> tensors that it keeps of each weight, at most."""
_LEAST_SWAPPED = 1 << 20
"""Bytes below which DeepSpeed leaves a weight's piece in memory, where `aio.block_size` is no larger."""


def left_out(ds_config: Mapping[str, Any], world_size: int) -> str:
    """What of a DeepSpeed config `fitted` leaves out for so many workers, in words; empty where nothing is."""
    copies = int((ds_config.get("zero_optimization") or {}).get(HPZ) or 1)
    if world_size % copies == 0:
        return ""
    return f"no copies of the weights within machines ({HPZ}: {copies}): {world_size} workers do not divide into groups of that size"


def fitted(ds_config: Mapping[str, Any], world_size: int) -> dict[str, Any]:
    """`ds_config` without hpZ's copies where the workers do not divide into its groups: what is learnt is the same without them, and a
    run goes on with however many workers are left.
    """
    if not left_out(ds_config, world_size):
        return dict(ds_config)
    return {**ds_config, "zero_optimization": {**ds_config["zero_optimization"], HPZ: 1}}


def without_gpus(ds_config: Mapping[str, Any]) -> list[Problem]:
    """What of a DeepSpeed config works on GPUs alone, for workers that have none."""
    zero = ds_config.get("zero_optimization") or {}
    keys = [key for key in QUANTIZED if zero.get(key)]
    do = f"overrides: {{zero_optimization: {{{', '.join(f'{key}: false' for key in keys)}}}}} leaves the rest of the preset on"
    return [Problem(_WHERE + key, "is on, and there is no GPU", "off", do) for key in keys]


def unreachable(ds_config: Mapping[str, Any]) -> list[Problem]:
    """What is wrong with the offloads and partitions of a DeepSpeed config, as far as the config itself says."""
    zero = ds_config.get("zero_optimization") or {}
    problems = [
        Problem(_WHERE + key, f"{zero[key]!r}", "off", f"It {why}.{_INSTEAD[key]}")
        for key, why in _UNREACHABLE.items()
        if zero.get(key) and zero[key] != _OFF.get(key)
    ]
    return (
        problems
        + tensor_parallel.unsupported(ds_config)
        + _prescaled(ds_config, zero)
        + _coarse(zero)
        + _compiled(ds_config)
        + _parameters(zero)
        + _optimizer(zero)
    )


def _prescaled(ds_config: Mapping[str, Any], zero: Mapping[str, Any]) -> list[Problem]:
    """DeepSpeed stops with an assertion where gradients are cut up as they are summed. In fp32 there is nothing to gain from it."""
    if not ds_config.get("prescale_gradients") or zero.get("stage") == 1:
        return []
    do = "Gradients are summed in fp32, and do not overflow there."
    return [Problem("deepspeed: prescale_gradients", "is on", "off", do)]


def _coarse(zero: Mapping[str, Any]) -> list[Problem]:
    """DeepSpeed would gather modules whole whose inputs want no gradient, and reduce their gradients before they are there."""
    key = "stage3_module_granularity_threshold"
    if not (zero.get(key) or zero.get(key.removeprefix("stage3_"))):
        return []
    do = "What modules gathered so learn can be lost. dstune gathers whole what wants it (experts, compiled layers)."
    return [Problem(_WHERE + key, "is set", "not set", do)]


def _compiled(ds_config: Mapping[str, Any]) -> list[Problem]:
    """DeepSpeed compiles only where `engine.compile()` is called, which would leave a setting without any effect."""
    settings = ds_config.get("compile")
    on = any(settings.values()) if isinstance(settings, Mapping) else bool(settings)
    if not on:
        return []
    deep = isinstance(settings, Mapping) and settings.get("deepcompile")
    why = f" {WHY_NO_DEEPCOMPILE}." if deep else ""
    do = f"`model.compile: layers` compiles the model's layers.{why}"
    return [Problem("deepspeed: compile", "is set", "not set", do)]


def uses_nvme(ds_config: Mapping[str, Any]) -> bool:
    """Whether the optimizer's states are to be kept on NVMe."""
    return _device((ds_config.get("zero_optimization") or {}).get("offload_optimizer")) == "nvme"


def weights_on_nvme(ds_config: Mapping[str, Any]) -> bool:
    """Whether the weights are to be kept on NVMe."""
    return _device((ds_config.get("zero_optimization") or {}).get("offload_param")) == "nvme"


def streamed(ds_config: Mapping[str, Any]) -> dict[str, Any]:
    """`ds_config`; where weights are on NVMe, with each of them let go of as soon as its module has been computed.

    DeepSpeed keeps a weight's buffer of the host's memory for as long as the weight is gathered, and stops with an assertion where
    there is no more buffer: what it gathers ahead or keeps for later would take them all.
    """
    if not weights_on_nvme(ds_config):
        return dict(ds_config)
    nothing_kept = dict.fromkeys(STREAMED, 0)
    zero = {key: value for key, value in ds_config["zero_optimization"].items() if f"stage3_{key}" not in STREAMED}
    return {**ds_config, "zero_optimization": zero | nothing_kept}


def unswappable(ds_config: Mapping[str, Any], optimizer: str) -> list[Problem]:
    """What is wrong with the states of `train.optimizer` on NVMe: DeepSpeed swaps those alone that are as long as the weights."""
    if not uses_nvme(ds_config) or optimizer not in _UNSWAPPABLE:
        return []
    do = f"{optimizer} {_UNSWAPPABLE[optimizer]}. The preset zero3-offload-optimizer keeps them in main memory; adamw's may be on NVMe."
    return [Problem(f"{_WHERE}offload_optimizer.device", f"'nvme' with train.optimizer {optimizer}", "none or cpu", do)]


def few_buffers(ds_config: Mapping[str, Any], optimizer: str) -> list[Problem]:
    """What is wrong with the buffers of states on NVMe: DeepSpeed stops in the first update where all of one weight's need more."""
    count = ((ds_config.get("zero_optimization") or {}).get("offload_optimizer") or {}).get("buffer_count")
    needed = _SWAPPED_MASTER_AND_GRADIENT + _SWAPPED_STATES.get(optimizer, 0)
    if not uses_nvme(ds_config) or count is None or count >= needed:
        return []
    do = f"The master weights, the gradients and each state of {optimizer} take one."
    return [Problem(f"{_WHERE}offload_optimizer.buffer_count", f"{count}", f"{needed} or more", do)]


def small_buffers(ds_config: Mapping[str, Any], largest: int, world_size: int, element_bytes: int) -> list[Problem]:
    """What is wrong with the buffers of weights on NVMe for a model whose largest weight has so many elements, each of so many bytes:
    a worker's piece of it has to go into one.
    """
    if not weights_on_nvme(ds_config):
        return []
    size, piece = ds_config["zero_optimization"]["offload_param"].get("buffer_size"), -(-largest // world_size)
    least = max(_LEAST_SWAPPED, int((ds_config.get("aio") or {}).get("block_size") or 0))
    if size is None or size >= piece or piece * element_bytes < least:
        return []
    came = f"{size:,.0f}, and a worker's piece of the largest weight has {piece:,} elements ({world_size} workers)"
    do = "Without it, buffers are as large as they have to be."
    return [Problem(f"{_WHERE}offload_param.buffer_size", came, f"{piece:,} or more", do)]


def uneven_pieces(ds_config: Mapping[str, Any], sizes: Iterable[int], world_size: int) -> list[Problem]:
    """What is wrong with weights in 8 bits for a model whose parameters have so many elements each: DeepSpeed stops in the first forward
    pass where a worker's piece of one does not divide.
    """
    if not (ds_config.get("zero_optimization") or {}).get(QUANTIZED_WEIGHTS):
        return []
    pieces = {size: -(-size // world_size) for size in sizes}
    size = next((size for size, piece in sorted(pieces.items()) if piece % _QUANTIZED_TOGETHER), None)
    if size is None:
        return []
    came = f"is on, and a worker's piece of {size:,} elements has {pieces[size]:,} ({world_size} workers)"
    do = f"overrides: {{zero_optimization: {{{QUANTIZED_WEIGHTS}: false}}}} leaves the rest of the preset on"
    return [Problem(_WHERE + QUANTIZED_WEIGHTS, came, f"a multiple of {_QUANTIZED_TOGETHER}", do)]


def _parameters(zero: Mapping[str, Any]) -> list[Problem]:
    offload = zero.get("offload_param") or {}
    where, device = f"{_WHERE}offload_param.", _device(offload)
    if device == "cpu" and zero.get("stage") in (1, 2):  # where DeepSpeed does not look at it
        return [Problem(where + "device", "'cpu' below stage 3", "stage 3, or none")]
    if device not in ("none", "cpu", "nvme"):
        return [Problem(where + "device", f"{device!r}", "none, cpu or nvme")]
    if device != "nvme":
        return []
    # What else keeps or changes the pieces that are sent was made for pieces in memory.
    beside = [key for key in QUANTIZED if zero.get(key)] + [HPZ] * (int(zero.get(HPZ) or 1) > 1)
    problems = [Problem(_WHERE + key, "is on with weights on NVMe", "off") for key in beside]
    return problems + _disk(zero, offload, "offload_param")


def _optimizer(zero: Mapping[str, Any]) -> list[Problem]:
    offload = zero.get("offload_optimizer") or {}
    where = f"{_WHERE}offload_optimizer."
    problems = [
        Problem(where + key, f"{offload[key]!r}", f"{plain!r}", f"It {why}: {_NO_CHECKPOINT}.{_INSTEAD.get(key, '')}")
        for key, (plain, why) in _ELSEWHERE.items()
        if offload.get(key, plain) != plain
    ]
    device = _device(offload)
    if device not in ("none", "cpu", "nvme"):
        problems.append(Problem(where + "device", f"{device!r}", "none, cpu or nvme"))
    if device != "nvme":
        return problems
    problems += [
        Problem(where + key, "is on", "off", "States that are still being written could not be checkpointed.")
        for key in ("pipeline_read", "pipeline_write")
        if offload.get(key)
    ]
    return problems + _disk(zero, offload, "offload_optimizer")


def _disk(zero: Mapping[str, Any], offload: Mapping[str, Any], section: str) -> list[Problem]:
    """What is wrong with a section that puts something on NVMe."""
    problems: list[Problem] = []
    if zero.get("stage") != 3:
        problems.append(Problem(f"{_WHERE}{section}.device", "'nvme' below stage 3", "stage 3, or device: cpu"))
    path = offload.get("nvme_path")
    if not (isinstance(path, str) and path.startswith("/")):
        # Only the user can name one: fast, on each node, and there under the same path.
        came = "is not set" if path is None else f"{path!r}"
        key = f"deepspeed.overrides.zero_optimization.{section}.nvme_path"
        do = f"{key}=/local_nvme: a directory of a fast disk that every node has"
        problems.append(Problem(f"{_WHERE}{section}.nvme_path", came, "an absolute path", do))
    return problems


def _device(offload: Mapping[str, Any] | None) -> str:
    return str((offload or {}).get("device") or "none")
