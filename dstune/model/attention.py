"""Which attention a run uses: as its file says, or the fastest that is shown to keep packed examples apart."""

from typing import Literal

from transformers import PretrainedConfig

from dstune.config.schema import ModelSection
from dstune.errors import ConfigError, Problem
from dstune.loggers import get_logger
from dstune.model.isolation import find_model_class, prove
from dstune.model.per_example import PER_EXAMPLE

log = get_logger(__name__)

Layout = Literal["packed", "padded", "packed-seq2seq", "seq2seq"]

_FASTEST_FIRST = (PER_EXAMPLE, "sdpa", "eager")


def choose(model: ModelSection, config: PretrainedConfig, layout: Layout) -> str:
    """`model.attention`, or for `auto` the fastest kernel that works: on packed rows the first that `isolation.prove` passes.

    Raises ConfigError where none keeps packed examples apart.
    """
    if model.attention not in ("auto", PER_EXAMPLE) and layout == "packed-seq2seq":
        # No mask that transformers takes keeps encoder, decoder and what lies between them apart at once.
        came = f"{model.attention} attention for packed pairs of source and target"
        raise ConfigError(Problem("model.attention", came, "auto", "Take that, or set `data.packing: false`."))
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
