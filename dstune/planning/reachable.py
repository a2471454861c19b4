"""DeepSpeed settings under which a worker could not reach all of the training state, or not cut it, or that would do nothing: refused
before anything starts.

`checkpoint.weights_only` helps none of them: DeepSpeed runs them with optimizers of its own alone, or lays weights out differently.
"""

from collections.abc import Mapping
from typing import Any

from dstune.config.declined import WHY_NO_DEEPCOMPILE
from dstune.errors import Problem
from dstune.planning import tensor_parallel

_WHERE = "deepspeed: zero_optimization."
_NO_CHECKPOINT = "no checkpoint could be made"
_ELSEWHERE = "keeps states in another optimizer, of its own"

HPZ = "zero_hpz_partition_size"
"""ZeRO++: workers of a machine that keep a copy of the weights between them. The states are cut as without it."""
QUANTIZED = ("zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights")
"""ZeRO++: what travels in 8 bits or fewer, by kernels for GPUs. The states are as without it."""

_UNREACHABLE: Mapping[str, str] = {
    "zenflow": "keeps its states in another process, and lays the weights out in an order of its own",
    "mics_shard_size": "partitions parameters over a part of the workers",
}
_OFF: Mapping[str, Any] = {"mics_shard_size": -1}
_INSTEAD: Mapping[str, str] = {
    "zenflow": " The preset zero3-offload-optimizer keeps the states in main memory too.",
    "mics_shard_size": f" {HPZ} (preset zero++) keeps copies within a machine.",
    "super_offload": " The preset zero3-offload-optimizer keeps the states in main memory too.",
}

_UNSWAPPABLE: Mapping[str, str] = {
    "adafactor": "keeps sums over rows and columns, which DeepSpeed does not swap",
    "adamw8bit": "keeps moments in 8 bits, which DeepSpeed does not swap",
}


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
        Problem(_WHERE + key, f"{zero[key]!r}", "off", f"It {why}: {_NO_CHECKPOINT}.{_INSTEAD[key]}")
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


def unswappable(ds_config: Mapping[str, Any], optimizer: str) -> list[Problem]:
    """What is wrong with the states of `train.optimizer` on NVMe: DeepSpeed swaps those alone that are as long as the weights."""
    if not uses_nvme(ds_config) or optimizer not in _UNSWAPPABLE:
        return []
    do = f"{optimizer} {_UNSWAPPABLE[optimizer]}. The preset zero3-offload-optimizer keeps them in main memory; adamw's may be on NVMe."
    return [Problem(f"{_WHERE}offload_optimizer.device", f"'nvme' with train.optimizer {optimizer}", "none or cpu", do)]


def _parameters(zero: Mapping[str, Any]) -> list[Problem]:
    device = _device(zero.get("offload_param"))
    if device in ("none", "cpu"):
        return []
    do = "In main memory they take 2 bytes a parameter over all workers; the optimizer's 12 may be on NVMe."
    return [Problem(f"{_WHERE}offload_param.device", f"{device!r}", "none or cpu", do if device == "nvme" else "")]


def _optimizer(zero: Mapping[str, Any]) -> list[Problem]:
    offload = zero.get("offload_optimizer") or {}
    where = f"{_WHERE}offload_optimizer."
    problems = [
        Problem(
            where + key, f"{offload[key]!r}", f"{plain!r}", f"It {_ELSEWHERE}: {_NO_CHECKPOINT}.{_INSTEAD.get(key, '')}"
        )
        for key, plain in {"ratio": 1.0, "super_offload": False}.items()
        if offload.get(key, plain) != plain
    ]
    device = _device(offload)
    if device not in ("none", "cpu", "nvme"):
        problems.append(Problem(where + "device", f"{device!r}", "none, cpu or nvme"))
    return problems + (_nvme(zero, offload, where) if device == "nvme" else [])


def _nvme(zero: Mapping[str, Any], offload: Mapping[str, Any], where: str) -> list[Problem]:
    problems: list[Problem] = []
    if zero.get("stage") != 3:
        problems.append(Problem(where + "device", "'nvme' below stage 3", "stage 3, or device: cpu"))
    path = offload.get("nvme_path")
    if not (isinstance(path, str) and path.startswith("/")):
        # Only the user can name one: fast, on each node, and there under the same path.
        came = "is not set" if path is None else f"{path!r}"
        key = "deepspeed.overrides.zero_optimization.offload_optimizer.nvme_path"
        do = f"{key}=/local_nvme: a directory of a fast disk that every node has"
        problems.append(Problem(where + "nvme_path", came, "an absolute path", do))
    problems += [
        Problem(where + key, "is on", "off", "States that are still being written could not be checkpointed.")
        for key in ("pipeline_read", "pipeline_write")
        if offload.get(key)
    ]
    return problems


def _device(offload: Mapping[str, Any] | None) -> str:
    return str((offload or {}).get("device") or "none")
