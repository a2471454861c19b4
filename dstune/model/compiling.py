"""Layers compiled by torch.compile (`model.compile: layers`): what stands between the matrix products of a layer becomes a few kernels.

Each repeated layer is compiled by itself, as TorchTitan does: layers of one kind share what was compiled for the first. Sizes are
symbols, so rows of other lengths need no compiling again. Under ZeRO-3 a layer's weights are gathered when it is called, all at
once, and not those of each of its parts: DeepSpeed's hooks would cut the layer into pieces, and stay around it this way.
What depends on values, as attention example by example on a CPU, runs between compiled pieces as ever.

When to use it: on a run that lasts longer than some hundred times the first step, which waits for the compiler (50 s for a Llama on a
CPU, more for encoder and decoder); the first validation waits too, for passes without gradients are other functions. A step then took
0.82 of the processor time (30 M parameters, packed rows of 2,048 tokens, bf16, one thread; median of 21 pairs, 0.68 to 0.92), with
losses apart by 3e-5 of themselves; what a step gives did not depend on which lengths came first.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from transformers import PreTrainedModel

from dstune.config.schema import ModelSection
from dstune.engine import leaves
from dstune.errors import ConfigError, Problem, first_line
from dstune.loggers import get_logger
from dstune.model.build import outline
from dstune.model.layers import beyond_matrices, repeated_layers

log = get_logger(__name__)

_WHERE = "model.compile"
_MOST_VARIANTS = 32
"""Of one function: layers with and without a window, encoder and decoder, first and last, training and validation. Beyond, torch runs
it uncompiled, and warns."""


def planned(model: ModelSection, base: Path) -> str:
    """What a plan says of it. Raises ConfigError where the architecture is none to compile."""
    if model.compile == "off":
        return "off"
    return _described(_to_compile(outline(model, base)))


def compile_layers(module: PreTrainedModel, device: str) -> None:
    """Have torch compile each repeated layer of `module` when it is first called; `device`: `cpu` or `cuda`.

    Raises ConfigError where the architecture is none to compile, or this machine lacks what compiles.
    NOTE: behind everything else that changes layers, and before the engine is made.
    """
    layers = _to_compile(module)
    reason = missing(device) or _failure(device)
    if reason is not None:
        do = "Install it on every node (Debian: apt install g++ python3-dev), or set `model.compile: off`."
        raise ConfigError(Problem(_WHERE, f"'layers', and this worker cannot compile: {reason}", "off", do))
    for layer in layers:
        layer.forward = _compiled(layer)
        leaves.gather_whole(layer)
    log.info("compile: %s", _described(layers))


def missing(device: str) -> str | None:
    """What torch needs to compile for `device`, and is not installed here; None: nothing."""
    if device == "cuda":
        compilers = (os.environ.get("CC", "gcc"), "gcc", "clang")
        if find_spec("triton") is None:
            return "triton is not installed"
    else:
        compilers = (os.environ.get("CXX", "g++"),)
    if any(shutil.which(name) for name in compilers):
        return None
    return f"there is no compiler ({' or '.join(dict.fromkeys(compilers))})"


def _to_compile(module: PreTrainedModel) -> Sequence[Any]:
    if reason := beyond_matrices(module):
        do = "Only layers of attention and matrices are known to be compiled for all lengths at once."
        raise ConfigError(Problem(_WHERE, f"'layers', but {reason}", "off", do))
    return repeated_layers(module)


def _described(layers: Sequence[Any]) -> str:
    kinds = ", ".join(dict.fromkeys(type(layer).__name__ for layer in layers))
    slow = "the first step takes a minute or more, and so does the first validation"
    return f"layers ({len(layers)} of {kinds}, by torch.compile; {slow})"


def _compiled(layer: Any) -> Callable[..., Any]:
    """The layer's forward pass. NOTE: activations are recomputed around it, as transformers does inside `forward`: where that is
    compiled too, one piece that cannot be leaves the whole layer uncompiled.
    """
    plain = type(layer).forward.__wrapped__  # as the layer's file has it, without transformers' recomputing
    # The random numbers of dropout are those of the uncompiled layer: a resume may turn compiling on or off.
    same = {"fallback_random": True}
    run = torch.compile(MethodType(plain, layer), dynamic=True, recompile_limit=_MOST_VARIANTS, options=same)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if layer.gradient_checkpointing and layer.training:
            return layer._gradient_checkpointing_func(partial(run, **kwargs), *args)
        return run(*args, **kwargs)

    return forward


def _failure(device: str) -> str | None:
    """Why a first small function cannot be compiled, whatever is installed: headers, a cache that cannot be written; None: it can."""
    try:
        torch.compile(_small, dynamic=True)(torch.ones(64, device=device))
    except (RuntimeError, OSError, KeyError, ImportError) as error:
        return first_line(error)
    return None


def _small(values: torch.Tensor) -> torch.Tensor:
    return (values * 2).tanh() + values
