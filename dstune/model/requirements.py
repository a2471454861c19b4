"""What a run's options ask of its architecture, looked at without weights: what no worker could build is found before data is prepared."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from dstune.config.schema import RunConfig
from dstune.errors import ConfigError, Problem
from dstune.model import attention, causality, compiling, fp8, freezing, isolation, padding, patterns, positions, tiling
from dstune.model.build import checkpoint_names, outline, require_recomputing
from dstune.model.config import load_config
from dstune.planning.hardware import Device


def require(config: RunConfig, base: Path, layout: attention.Layout | None, device: Device | None) -> None:
    """Raises ConfigError with all that does not go with the model, or with rows of `layout`.

    None: the layout, or what the workers have, is not known here.
    """
    problems: list[Problem] = []
    for check in _checks(config, base, layout, device):
        try:
            check()
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)


def _checks(
    config: RunConfig, base: Path, layout: attention.Layout | None, device: Device | None
) -> Iterator[Callable[[], Any]]:
    model, scales = config.model, config.train.lr_scales
    module = outline(model, base)
    freezing.freeze(module, config.train.freeze)
    yield partial(compiling.planned, model, base)
    yield partial(fp8.planned, model, base, device)
    yield partial(positions.require, module, config.data.max_length)
    if layout is not None:
        yield partial(_attention, config, base, layout)
    if scales:
        yield partial(patterns.lr_scales, module, scales, checkpoint_names(module, model))
    if model.mlp_tile != "off":
        yield partial(tiling.require_feed_forwards, module)
    if model.activation_checkpointing in (True, "offload"):
        yield partial(require_recomputing, module)


def _attention(config: RunConfig, base: Path, layout: attention.Layout) -> None:
    """As a worker chooses it."""
    model_config = load_config(config.model, base)
    kernel = attention.choose(config.model, model_config, layout)
    if layout in ("packed", "packed-seq2seq"):
        isolation.prove(model_config, kernel)  # equal to plain attention, too
        causality.require(model_config, "eager")
    else:
        causality.require(model_config, kernel)
        if config.train.micro_batch_size != 1:
            padding.prove(model_config, kernel)
