"""Which attention a run uses: as its file says, or the fastest that is shown to keep packed examples apart."""

from typing import Literal

import torch
from transformers import PretrainedConfig

from dstune.config.schema import ModelSection
from dstune.errors import ConfigError, Problem
from dstune.loggers import get_logger
from dstune.model.failures import FAILURES
from dstune.model.isolation import (
    TOLERANCE,
    examples_for,
    find_model_class,
    instance,
    prove,
    smallest_that_builds,
)
from dstune.model.per_example import PER_EXAMPLE
from dstune.model.remembered import Remembered

log = get_logger(__name__)

Layout = Literal["packed", "padded", "packed-seq2seq", "seq2seq"]

_FASTEST_FIRST = (PER_EXAMPLE, "sdpa", "eager")


def choose(model: ModelSection, config: PretrainedConfig, layout: Layout) -> str:
    """`model.attention`, or for `auto` the fastest kernel that works: on packed rows the first that `isolation.prove` passes.

    Raises ConfigError where none keeps packed examples apart, and where the one that is written is not what the model means.
    """
    if model.attention not in ("auto", PER_EXAMPLE) and layout == "packed-seq2seq":
        # No mask that transformers takes keeps encoder, decoder and what lies between them apart at once.
        came = f"{model.attention} attention for packed pairs of source and target"
        raise ConfigError(Problem("model.attention", came, "auto", "Take that, or set `data.packing: false`."))
    if model.attention == "eager":
        _require_plain(config)
    if layout in ("padded", "seq2seq"):
        return _of_padded_rows(model, config)
    if model.attention != "auto":
        return model.attention
    refused: ConfigError | None = None
    for kernel in _FASTEST_FIRST if layout == "packed" else (PER_EXAMPLE,):
        try:
            prove(config, kernel)
        except ConfigError as error:
            log.info("attention %s is out: %s", kernel, error)
            refused = error
        else:
            return kernel
    assert refused is not None
    raise refused


def _of_padded_rows(model: ModelSection, config: PretrainedConfig) -> str:
    """There `per-example` is transformers' own sdpa."""
    kind = find_model_class(config)
    supported = kind is None or kind._supports_sdpa
    if model.attention == PER_EXAMPLE and not supported:
        came = f"{model.attention}, and padded rows of {config.model_type} have what no attention but eager does"
        raise ConfigError(Problem("model.attention", came, "auto or eager"))
    if model.attention != "auto":
        return model.attention
    return "sdpa" if supported else "eager"


def _require_plain(config: PretrainedConfig) -> None:
    """Raises ConfigError where transformers' eager attention is not what its sdpa is: Falcon's adds ALiBi's biases twice."""
    found = _apart(config)
    if found > TOLERANCE:
        came = (
            f"eager, which differs from transformers' own sdpa by {found:.1e} for {config.model_type} with this config"
        )
        raise ConfigError(Problem("model.attention", came, "auto"))


@Remembered
def _apart(config: PretrainedConfig) -> float:
    """By how much the two differ on an example alone, relative to the largest logit; 0 where they cannot be compared."""
    found = find_model_class(type(config)())
    small = smallest_that_builds(config) if found is None or found._supports_sdpa else None
    if small is None:
        return 0.0
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        example = examples_for(small)[0]
        try:
            eager, other = instance(small, "eager"), instance(small, "sdpa")
            other.load_state_dict(eager.state_dict())
            one, two = (model(**example, use_cache=False).logits for model in (eager, other))
        except FAILURES:
            return 0.0
    return float((one - two).abs().max() / one.abs().max().clamp_min(1e-12))
