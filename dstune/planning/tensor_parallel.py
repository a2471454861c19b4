"""What goes with tensor parallelism (DeepSpeed's AutoTP) and what does not, as far as settings say."""

from collections.abc import Mapping
from typing import Any

from dstune.config.schema import RunConfig
from dstune.errors import Problem

_WHERE = "cluster.tensor_parallel"
_SIZE = "autotp_size"
_BY_ELEMENT = ("adamw", "sgd", "lion", "adagrad")
"""Optimizers that treat each element by itself: a part of a matrix as a part of the whole one."""


def members_of(ds_config: Mapping[str, Any]) -> int:
    """How many workers in a row hold the model between them; 1: each has all of it."""
    return max(1, int((ds_config.get("tensor_parallel") or {}).get(_SIZE) or 1))


def malformed(section: Any) -> list[Problem]:
    """What no size can be read of."""
    if section is None or (isinstance(section, Mapping) and _is_size(section.get(_SIZE, 1))):
        return []
    came = f"is {section.get(_SIZE) if isinstance(section, Mapping) else section!r}"
    return [
        Problem(f"deepspeed: tensor_parallel.{_SIZE}", came, "a whole number, 1 or more", f"{_WHERE}: N says the same.")
    ]


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def settings(members: int) -> dict[str, Any]:
    """The section `tensor_parallel` of a DeepSpeed config."""
    return {_SIZE: members}


def beside(config: RunConfig, policy: Mapping[str, Any]) -> list[Problem]:
    """What of a run, whose DeepSpeed config begins as `policy`, does not go with it."""
    members, asked = config.cluster.tensor_parallel, members_of(policy)
    problems: list[Problem] = []
    if asked not in (1, members):
        do = f"{_WHERE}: {asked} says it to DeepSpeed and to whoever shares the rows out."
        problems.append(Problem(f"deepspeed: tensor_parallel.{_SIZE}", f"{asked}, with {_WHERE}: {members}", do=do))
    others = {
        "cluster.sequence_parallel": (config.cluster.sequence_parallel > 1, "on", "1"),
        "model.adapter": (config.model.adapter is not None, "set", "none"),
        "model.fp8": (config.model.fp8, "true", "false"),
        "model.compile": (config.model.compile != "off", repr(config.model.compile), "off"),
    }
    return problems + [
        Problem(key, f"{came}, with {_WHERE}: {members}", wanted)
        for key, (on, came, wanted) in others.items()
        if on and members > 1
    ]


def unsupported(ds_config: Mapping[str, Any]) -> list[Problem]:
    """What is wrong with a DeepSpeed config for it."""
    section, members = ds_config.get("tensor_parallel") or {}, members_of(ds_config)
    do = "The plan by which matrices are cut is transformers' own; the head and the embeddings stay whole."
    problems = [
        Problem(f"deepspeed: tensor_parallel.{key}", "is set", f"{_SIZE} alone", do)
        for key in section
        if key != _SIZE and members > 1
    ]
    zero = ds_config.get("zero_optimization") or {}
    if members > 1 and zero.get("stage") == 3:
        do = "ZeRO-3 splits every weight over all workers as well; presets zero1 and zero2 go with tensor parallelism."
        problems.append(Problem("deepspeed: zero_optimization.stage", f"3, with {_WHERE}: {members}", "1 or 2", do))
    return problems


def uncuttable(ds_config: Mapping[str, Any], optimizer: str) -> list[Problem]:
    """What is wrong with `train.optimizer` for it."""
    if members_of(ds_config) == 1 or optimizer in _BY_ELEMENT:
        return []
    came = f"{optimizer!r}, which wants to see whole matrices, with {_WHERE}: {members_of(ds_config)}"
    return [Problem("train.optimizer", came, f"one of {', '.join(_BY_ELEMENT)}")]
