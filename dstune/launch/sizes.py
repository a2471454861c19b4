"""A run's model in numbers, counted once: the count needs torch, and whoever drives a run should not have to load it every time."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dstune import __version__
from dstune.atomic import dump_json, write_json
from dstune.config.schema import ModelSection, RunConfig
from dstune.data.task import read_config
from dstune.loggers import get_logger
from dstune.paths import model_sizes
from dstune.planning.shapes import ModelShape

log = get_logger(__name__)

_FORMAT = 10
"""Of what is kept, and of how it is counted."""
_COUNTED_BY = ("torch", "transformers", "peft", "liger-kernel")


@dataclass(frozen=True)
class Sizes:
    """What planning knows of a run's model."""

    shape: ModelShape
    fused_loss: bool
    """Whether its logits are never held whole."""


def sizes(config: RunConfig, base: Path, device: str) -> Sizes:
    """Counted for workers on `device` (`cpu` or `cuda`), or as they were counted before.

    Raises ConfigError where transformers cannot build the model.
    """
    if config.model.trust_remote_code:
        return _count(config.model, base, config.train.freeze, device)
    path = model_sizes(_digest(config.model, base, config.train.freeze, device))
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Sizes(ModelShape.from_dict(found["shape"]), bool(found["fused_loss"]))
    except FileNotFoundError:
        log.debug("%s is not there: counting", path)
    except (ValueError, KeyError, TypeError) as error:
        log.warning("%s is damaged (%s): counting again", path, error)
    counted = _count(config.model, base, config.train.freeze, device)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"shape": counted.shape.as_dict(), "fused_loss": counted.fused_loss})
    return counted


def _count(model: ModelSection, base: Path, freeze: Sequence[str], device: str) -> Sizes:
    from dstune.model.build import outline
    from dstune.model.footprint import footprint
    from dstune.model.kernels import choice as kernels

    return Sizes(footprint(model, base, freeze, device), kernels.fuses_loss(model, outline(model, base)))


def _digest(model: ModelSection, base: Path, freeze: Sequence[str], device: str) -> str:
    facts: dict[str, Any] = {
        "format": [_FORMAT, __version__, *map(_version, _COUNTED_BY)],
        "config": read_config(model, base),
        "model": model.model_dump(mode="json", exclude={"activation_checkpointing", "start"}),
        "freeze": list(freeze),
        "device": device,
    }
    return hashlib.sha256(dump_json(facts).encode()).hexdigest()[:32]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
