"""What makes a run the one that it is: the keys that no resume may change, and how checkpoints remember them."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from dstune.config.schema import RunConfig

MAY_CHANGE = (
    "cluster",
    "deepspeed",
    "checkpoint",
    "validate",
    "report",
    "site",
    "train.epochs",
    "train.max_steps",
    "train.micro_batch_size",
    "train.nonfinite_limit",
    "train.profile",
    "model.activation_checkpointing",
    "model.attention",
    "model.compile",
    "model.kernels",
    "model.mlp_tile",
    "data.num_processes",
)
"""Keys that a resume may change: they do not touch what has been learnt, in which order, or how."""

_RECORDED = ("model", "train")
"""Sections that a checkpoint remembers. The data is known by the prepared directory's fingerprint, wherever its files lie."""


def fingerprints(config: RunConfig, prepared: str) -> dict[str, Any]:
    """What every checkpoint of a run says of it, JSON-like; `prepared`: its data's fingerprint."""
    sections = config.model_dump(mode="json", by_alias=True, include=set(_RECORDED))
    return {"run": config.name, "model": config.model.path, "prepared": prepared, "config": sections}


def differences(recorded: Mapping[str, Any], config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """What a checkpoint's fingerprints say, and what `config` says, for each key of the run's identity in which they differ.

    A checkpoint that remembers no config is compared by the run's name and the model's path.
    """
    sections = recorded.get("config")
    if sections is None:
        pairs = {"name": (recorded.get("run"), config.name), "model.path": (recorded.get("model"), config.model.path)}
        return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
    now = config.model_dump(mode="json", by_alias=True)
    try:
        before = RunConfig.model_validate(now | {"name": recorded.get("run"), **_with_what_may_change(sections, now)})
    except ValidationError as error:
        (*_, first) = error.errors()
        key = ".".join(map(str, first["loc"]))
        return {key or "config": (first.get("input"), "what this version of dstune knows")}
    return {key: pair for key, pair in changed(before, config).items() if not key.startswith(MAY_CHANGE)}


def _with_what_may_change(sections: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """The recorded sections, what a resume may change as it is `now`: parts of two configs need not go together."""
    return {
        section: {**values, **{key: now[section][key] for key in now[section] if f"{section}.{key}" in MAY_CHANGE}}
        for section, values in sections.items()
    }


def changed(before: RunConfig, after: RunConfig) -> dict[str, tuple[Any, Any]]:
    """The keys that differ, by their dotted names, with both values; None for one that is not there."""
    old, new = _flat(before.model_dump(by_alias=True)), _flat(after.model_dump(by_alias=True))
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return {key: (old.get(key), new.get(key)) for key in keys}


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, item in value.items():
        result |= _flat(item, f"{prefix}{key}.") if isinstance(item, dict) and item else {prefix + key: item}
    return result
