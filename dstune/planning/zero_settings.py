"""The keys of DeepSpeed's `zero_optimization`, of the sections inside it, and what may stand there: a worker would be the first to
find anything else, long after the data is prepared.

As DeepSpeed 0.19.8 knows them, and narrower where it takes what fails later (an empty bucket) or what the planner reads otherwise
(`"false"`). `reachable` says which of these settings dstune has no use for.
"""

import difflib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from dstune.errors import Problem

_STAGE3 = "stage3_"


class _Kind(NamedTuple):
    """What a key may be set to."""

    expected: str
    """In words."""
    fits: Callable[[Any], bool]


def _is_whole(value: Any) -> bool:
    """5e8 counts as whole: JSON and YAML make a float of it."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _is_names(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(one, str) for one in value))


def _is_off(value: Any) -> bool:
    return value is None or value is False


_COUNT = _Kind("a whole number, 0 or more", lambda value: _is_whole(value) and value >= 0)
_SIZE = _Kind("a whole number, 1 or more", lambda value: _is_whole(value) and value >= 1)
_WHOLE = _Kind("a whole number", _is_whole)
_SWITCH = _Kind("true or false", lambda value: isinstance(value, bool))
_MAYBE = _Kind("true, false or null", lambda value: value is None or isinstance(value, bool))
_ALWAYS = _Kind("true: dstune logs the norm of every step", lambda value: value is True)
_OLD_OPTIMIZER = _Kind("`offload_optimizer: {device: cpu}` in its place", _is_off)
_OLD_PARAM = _Kind("`offload_param: {device: cpu}` in its place", _is_off)
_SHARE = _Kind("a number from 0 to 1", _is_share)
_STAGE = _Kind("1, 2 or 3", lambda value: _is_whole(value) and value in (1, 2, 3))
_DEVICE = _Kind("none, cpu or nvme", lambda value: value in ("none", "cpu", "nvme"))
_PATH = _Kind("a directory", lambda value: value is None or isinstance(value, str))
_NAMES = _Kind("a list of names", _is_names)
_SECTION = _Kind("a section of keys, or null", lambda value: value is None or isinstance(value, Mapping))
_ANY = _Kind("", lambda _: True)

KEYS: Mapping[str, _Kind] = {
    "allgather_bucket_size": _SIZE,
    "allgather_partitions": _SWITCH,
    "compute_grad_norm": _ALWAYS,
    "contiguous_gradients": _SWITCH,
    "cpu_offload": _OLD_OPTIMIZER,
    "cpu_offload_param": _OLD_PARAM,
    "cpu_offload_use_pin_memory": _MAYBE,
    "elastic_checkpoint": _SWITCH,
    "enable_sanity_checks": _SWITCH,
    "ignore_unused_parameters": _SWITCH,
    "leaf_module": _SECTION,
    "load_from_fp32_weights": _SWITCH,
    "log_trace_cache_warnings": _SWITCH,
    "memory_efficient_linear": _SWITCH,
    "mics_shard_size": _WHOLE,
    "offload_optimizer": _SECTION,
    "offload_param": _SECTION,
    "overlap_comm": _MAYBE,
    "override_module_apply": _SWITCH,
    "parameter_alignment": _SWITCH,
    "pipeline_loading_checkpoint": _SWITCH,
    "reduce_bucket_size": _SIZE,
    "reduce_scatter": _SWITCH,
    "round_robin_gradients": _SWITCH,
    "save_muon_momentum_buffer_in_memory": _SWITCH,
    "stage": _STAGE,
    "stage3_allgather_sequential": _SWITCH,
    "stage3_gather_16bit_weights_on_model_save": _SWITCH,
    "stage3_gather_fp16_weights_on_model_save": _SWITCH,
    "stage3_max_live_parameters": _COUNT,
    "stage3_max_reuse_distance": _COUNT,
    "stage3_model_persistence_threshold": _COUNT,
    "stage3_module_granularity_threshold": _WHOLE,
    "stage3_param_persistence_threshold": _COUNT,
    "stage3_prefetch_bucket_size": _COUNT,
    "stage3_use_all_reduce_for_fetch_params": _SWITCH,
    "sub_group_size": _SIZE,
    "use_multi_rank_bucket_allreduce": _SWITCH,
    "zenflow": _ANY,  # refused whatever is in it
    "zero_hpz_partition_size": _COUNT,
    "zero_quantized_gradients": _SWITCH,
    "zero_quantized_nontrainable_weights": _SWITCH,
    "zero_quantized_weights": _SWITCH,
}
"""Of `zero_optimization`; DeepSpeed takes those of stage 3 without that prefix too."""

INNER: Mapping[str, Mapping[str, _Kind]] = {
    "offload_optimizer": {
        "device": _DEVICE,
        "nvme_path": _PATH,
        "buffer_count": _SIZE,
        "pin_memory": _SWITCH,
        "pipeline_read": _SWITCH,
        "pipeline_write": _SWITCH,
        "fast_init": _SWITCH,
        "ratio": _SHARE,
        "super_offload": _SWITCH,
        "cpuadam_cores_perc": _SHARE,
    },
    "offload_param": {
        "device": _DEVICE,
        "nvme_path": _PATH,
        "buffer_count": _SIZE,
        "buffer_size": _SIZE,
        "max_in_cpu": _COUNT,
        "pin_memory": _SWITCH,
    },
    "leaf_module": {"classes": _NAMES, "names": _NAMES, "name_suffixes": _NAMES},
}
"""Of the sections in it."""


def wrong(zero: Any) -> Iterator[Problem]:
    """What DeepSpeed would not take in `zero_optimization`, or not as it is meant; `where` is the path of the key.

    `auto` is left to those who refuse it everywhere.
    """
    path = "zero_optimization"
    if not isinstance(zero, Mapping):
        yield Problem(path, f"is {zero!r}", "a section of keys")
        return
    yield from _wrong_in(zero, KEYS, path)
    for name, known in INNER.items():
        section = zero.get(name)
        if isinstance(section, Mapping):
            yield from _wrong_in(section, known, f"{path}.{name}")


def _wrong_in(section: Mapping[Any, Any], known: Mapping[str, _Kind], path: str) -> Iterator[Problem]:
    for key, value in section.items():
        kind = known.get(key) or known.get(f"{_STAGE3}{key}")
        if kind is None:
            near = difflib.get_close_matches(str(key), known, n=1)
            yield Problem(f"{path}.{key}", "unknown key", do=f"did you mean {near[0]!r}?" if near else "")
        elif value != "auto" and not kind.fits(value):
            yield Problem(f"{path}.{key}", f"is {value!r}", kind.expected)
