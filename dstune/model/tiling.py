"""Feed-forward layers that take a long sequence tile by tile: what a tile makes inside is computed again in the backward pass.

What is kept of a layer falls from some multiples of the intermediate size for every token to the hidden size (ALST, Bekman et
al. 2025). Every output row is a function of its input row alone, so the loss is the same; the weights' gradients are sums of the
tiles' in the weights' precision.
"""

import inspect
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dstune.engine import leaves
from dstune.errors import ConfigError, Problem
from dstune.loggers import get_logger

log = get_logger(__name__)


def tile(module: PreTrainedModel, tokens: int | Literal["auto"]) -> None:
    """Have every feed-forward layer of `module` take at most `tokens` tokens at once; `auto`: as many as it is wide.

    Raises ConfigError where the architecture has no layer that is known to work token by token.
    NOTE: behind kernels that take the place of a layer's forward pass, or they would take the tiles' place.
    """
    found = require_feed_forwards(module)
    for name in found:
        layer: Any = module.get_submodule(name)
        layer.forward = _tiled(layer.forward, _widths(layer)[0] if tokens == "auto" else tokens)
        # Its weights are gathered once for all tiles, not for each.
        leaves.gather_whole(layer)
    log.info("in tiles: %s", leaves.summary(found))


def require_feed_forwards(module: PreTrainedModel) -> list[str]:
    """`feed_forwards`. Raises ConfigError where there are none."""
    found = feed_forwards(module)
    if not found:
        came = f"no feed-forward layer of {type(module).__name__} is known to work token by token"
        raise ConfigError(Problem("model.mlp_tile", came, "off"))
    return found


def feed_forwards(module: nn.Module) -> list[str]:
    """The names of the modules that map each token by itself: two or more linear maps, from one width and back to it, nothing else.

    Experts are none: what goes through one is few tokens already.
    """
    routed = leaves.routed_modules(module)
    return [
        name
        for name, part in module.named_modules()
        if _is_feed_forward(part) and not any(name.startswith(f"{one}.") for one in routed)
    ]


def _is_feed_forward(part: nn.Module) -> bool:
    children = [_base(child) for child in part.children()]
    if any(list(child.children()) or not _is_tokenwise(child) for child in children):
        return False
    if list(part.parameters(recurse=False)) or sum(_is_linear(child) for child in children) < 2:
        return False
    inputs, outputs = zip(*(_sizes(child) for child in children if _is_linear(child)), strict=True)
    # Attention is made of linear maps as well, but takes more than the tokens.
    return len(inspect.signature(part.forward).parameters) == 1 and inputs[0] in outputs


def _base(child: Any) -> nn.Module:
    """What an adapter was put around; `child` itself where there is none."""
    return getattr(child, "base_layer", child)


def _is_tokenwise(child: nn.Module) -> bool:
    return _is_linear(child) or not any(True for _ in child.parameters())


def _is_linear(child: nn.Module) -> bool:
    return isinstance(child, nn.Linear | Conv1D)


def _sizes(linear: Any) -> tuple[int, int]:
    return (linear.nx, linear.nf) if isinstance(linear, Conv1D) else (linear.in_features, linear.out_features)


def _widths(layer: nn.Module) -> tuple[int, int]:
    return next(_sizes(child) for child in map(_base, layer.children()) if _is_linear(child))


def _tiled(forward: Callable[[torch.Tensor], torch.Tensor], tokens: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def run(hidden: torch.Tensor) -> torch.Tensor:
        """`hidden` [..., width]; the result has the same shape."""
        rows = hidden.reshape(1, -1, hidden.shape[-1])
        if rows.shape[1] <= tokens:
            return forward(hidden)
        parts = [checkpoint(forward, part, use_reentrant=False) for part in rows.split(tokens, dim=1)]
        return torch.cat(parts, dim=1).view(*hidden.shape[:-1], -1)

    return run
