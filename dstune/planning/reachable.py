"""DeepSpeed settings under which a worker could not reach all of the training state, or not cut it: refused before anything starts.

`checkpoint.weights_only` helps none of them: DeepSpeed runs them with optimizers of its own alone, or lays weights out differently.
"""

from collections.abc import Mapping
from typing import Any

from dstune.errors import Problem

_WHERE = "deepspeed: zero_optimization."
_NO_CHECKPOINT = "no checkpoint could be made"
_ELSEWHERE = "keeps states in another optimizer, of its own"

_UNREACHABLE: Mapping[str, str] = {
    "zenflow": "keeps its states in another process, and lays the weights out in an order of its own",
    "zero_hpz_partition_size": "partitions parameters over a part of the workers",
    "mics_shard_size": "partitions parameters over a part of the workers",
}
_OFF: Mapping[str, Any] = {"zero_hpz_partition_size": 1, "mics_shard_size": -1}


def unreachable(ds_config: Mapping[str, Any]) -> list[Problem]:
    """What is wrong with the offloads and partitions of a DeepSpeed config, as far as the config itself says."""
    zero = ds_config.get("zero_optimization") or {}
    problems = [
        Problem(_WHERE + key, f"{zero[key]!r}", "off", f"It {why}: {_NO_CHECKPOINT}.")
        for key, why in _UNREACHABLE.items()
        if zero.get(key) and zero[key] != _OFF.get(key)
    ]
    return problems + _offload(zero, "offload_optimizer") + _offload(zero, "offload_param")


def uses_nvme(ds_config: Mapping[str, Any], section: str = "offload_optimizer") -> bool:
    """Whether the optimizer's states (`offload_param`: the weights of the passes) are to be kept on NVMe."""
    return _device((ds_config.get("zero_optimization") or {}).get(section)) == "nvme"


def _offload(zero: Mapping[str, Any], section: str) -> list[Problem]:
    offload = zero.get(section) or {}
    where = f"{_WHERE}{section}."
    problems = [
        Problem(where + key, f"{offload[key]!r}", f"{plain!r}", f"It {_ELSEWHERE}: {_NO_CHECKPOINT}.")
        for key, plain in {"ratio": 1.0, "super_offload": False}.items()
        if offload.get(key, plain) != plain
    ]
    device = _device(offload)
    if device not in ("none", "cpu", "nvme"):
        problems.append(Problem(where + "device", f"{device!r}", "none, cpu or nvme"))
    return problems + (_nvme(zero, offload, section) if device == "nvme" else [])


def _nvme(zero: Mapping[str, Any], offload: Mapping[str, Any], section: str) -> list[Problem]:
    problems: list[Problem] = []
    where = f"{_WHERE}{section}."
    if zero.get("stage") != 3:
        problems.append(Problem(where + "device", "'nvme' below stage 3", "stage 3, or device: cpu"))
    path = offload.get("nvme_path")
    if not (isinstance(path, str) and path.startswith("/")):
        # Only the user can name one: fast, on each node, and there under the same path.
        came = "is not set" if path is None else f"{path!r}"
        key = f"deepspeed.overrides.zero_optimization.{section}.nvme_path"
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
