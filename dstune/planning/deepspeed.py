"""The DeepSpeed config of an attempt: a preset's policy, the user's overrides, and what dstune itself must fix."""

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dstune.config.load import resolve
from dstune.config.schema import RunConfig
from dstune.errors import ConfigError, Problem
from dstune.paths import shared_files
from dstune.planning import tensor_parallel, zero_settings
from dstune.planning.reachable import few_buffers, streamed, unreachable, unswappable

AUTO_PRESET = "zero3"
CUT_PRESET = "zero2"
"""The usual one where workers hold the layers between them, which ZeRO-3 would cut once more."""

_POLICY_KEYS = (
    "zero_optimization",
    "zero_force_ds_cpu_optimizer",
    "zero_allow_untested_optimizer",
    "activation_checkpointing",
    "aio",
    "communication_data_type",
    "data_types",
    "prescale_gradients",
    "comms_logger",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "steps_per_print",
    "compile",
    "flops_profiler",
    "seq_parallel_communication_data_type",
    "use_data_before_expert_parallelism",
    "timers",
    "tensor_parallel",
)
_OWN_KEYS = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size and train.micro_batch_size",
    "gradient_clipping": "train.max_grad_norm",
    "optimizer": "train.optimizer",
    "scheduler": "train.schedule",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
}


def load_preset(name: str, base: Path) -> dict[str, Any]:
    """A preset by name, or the user's own JSON file; `auto` is ZeRO-3. Raises ConfigError."""
    own_file = resolve(name, base)
    if name.endswith(".json"):
        path = own_file
    else:
        path = shared_files("ds_configs") / f"{AUTO_PRESET if name == 'auto' else name}.json"
    if not path.is_file():
        raise ConfigError(Problem(f"deepspeed.preset {name!r}", "no such file", do=f"looked for {path}"))
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(Problem(str(path), f"not JSON: {error}")) from None
    if not isinstance(value, dict):
        raise ConfigError(Problem(str(path), "no JSON object", "a DeepSpeed config"))
    return value


def make(config: RunConfig, base: Path) -> dict[str, Any]:
    """The whole DeepSpeed config of a run. Raises ConfigError for keys that DeepSpeed would ignore or that dstune sets itself,
    and for offloads and partitions under which no checkpoint could be made.

    Accumulation is 1 in DeepSpeed's own terms: dstune's loop scales its losses by the global batch's supervised tokens
    and marks the last micro-batch itself. Gradients accumulate in fp32, or the loss would depend on the split.
    """
    policy = policy_of(usual_preset(config), config.deepspeed.overrides, base)
    problems = tensor_parallel.beside(config, policy)
    if (members := config.cluster.tensor_parallel) > 1 and not problems:
        policy = merged(policy, {"tensor_parallel": tensor_parallel.settings(members)})
    optimizer = config.train.optimizer
    problems += unreachable(policy) + unswappable(policy, optimizer) + few_buffers(policy, optimizer)
    problems += tensor_parallel.uncuttable(policy, optimizer)
    if problems:
        raise ConfigError(problems)
    policy.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    policy.setdefault("communication_data_type", "fp32")
    precision = {
        "bf16": {"enabled": config.model.dtype == "bf16", "immediate_grad_update": True},
        "fp16": {"enabled": config.model.dtype == "fp16"},
    }
    return policy | precision | {
        # The loop feeds the engine forward passes of its own size and weighs them itself (plan.json has the sizes).
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.train.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": policy.get("zero_force_ds_cpu_optimizer", False),
        "steps_per_print": policy.get("steps_per_print", 2**31 - 1),
    }  # fmt: skip


def usual_preset(config: RunConfig) -> str:
    """The preset that the run file names; in place of `auto`, where no planner was asked, the usual one."""
    if config.deepspeed.preset != "auto":
        return config.deepspeed.preset
    return AUTO_PRESET if config.cluster.tensor_parallel == 1 else CUT_PRESET


def policy_of(preset: str, overrides: Mapping[str, Any], base: Path) -> dict[str, Any]:
    """A preset with the run's overrides over it. Raises ConfigError for one that is not there, for a foreign key, or for a value
    that DeepSpeed would not take."""
    policy = merged(load_preset(preset, base), overrides)
    problems = [*_foreign_keys(policy, preset), *_wrong_settings(policy, preset, overrides)]
    if problems := problems + tensor_parallel.malformed(policy.get("tensor_parallel")):
        raise ConfigError(problems)
    return streamed(policy)


def merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` put over `under`, section by section."""
    result = dict(under)
    for key, value in over.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return result


def _foreign_keys(policy: Mapping[str, Any], preset: str) -> Iterator[Problem]:
    """DeepSpeed ignores unknown top-level keys, and takes `auto` inside a section for a default: both silently."""
    where = f"deepspeed ({preset})"
    for key in policy:
        if key in _OWN_KEYS:
            yield Problem(where, f"{key!r} belongs to the run file", do=f"set {_OWN_KEYS[key]}")
        elif key not in _POLICY_KEYS:
            near = difflib.get_close_matches(key, _POLICY_KEYS, n=1)
            yield Problem(where, f"unknown key {key!r}", do=f"did you mean {near[0]!r}?" if near else "")
    for path in _autos(policy):
        yield Problem(where, f"{path} is 'auto'", "a value")


def _wrong_settings(policy: Mapping[str, Any], preset: str, overrides: Mapping[str, Any]) -> Iterator[Problem]:
    """Each by where it is written: in the run's overrides, or in the preset's file."""
    for problem in zero_settings.wrong(policy.get("zero_optimization", {})):
        yield replace(problem, where=_place(problem.where, preset, overrides))


def _place(path: str, preset: str, overrides: Mapping[str, Any]) -> str:
    value: Any = overrides
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return f"deepspeed ({preset}): {path}"
        value = value[key]
    return f"deepspeed.overrides.{path}"


def _autos(value: Mapping[str, Any], prefix: str = "") -> list[str]:
    found: list[str] = []
    for key, item in value.items():
        if isinstance(item, Mapping):
            found += _autos(item, f"{prefix}{key}.")
        elif item == "auto":
            found.append(prefix + key)
    return found
