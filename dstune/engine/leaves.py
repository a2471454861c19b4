"""Modules that ZeRO-3 gathers whole (its leaves): those of which a pass calls one part or another, as its tokens want.

ZeRO-3 gathers a module's weights when it is called, on all workers together. A worker whose tokens visit expert 1 would wait
for ever for one whose tokens visit expert 2. A leaf module is gathered with all that is in it, whatever its tokens visit.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

_EXPERT = re.compile("expert", re.IGNORECASE)


def routed_modules(module: nn.Module) -> list[str]:
    """The names of the modules of `module` that choose among their children by what the tokens are, outermost ones only.

    Found by their build, not from a list of classes: two or more children of one class in a list that speaks of experts, in
    its name or its class's or theirs, or that has a router beside it (a matrix with a row for each child). Experts that are
    one fused weight are no modules: their weight is gathered whole anyway.
    """
    return list(_routed(module, ""))


def _routed(module: nn.Module, path: str) -> Iterator[str]:
    for name, child in module.named_children():
        inside = f"{path}.{name}" if path else name
        if not _holds_experts(module, name, child):
            yield from _routed(child, inside)
        elif _calls_its_children(child):
            yield inside
        else:
            yield path  # a plain list is never called: its owner calls what is in it
            return


def _holds_experts(owner: nn.Module, name: str, child: nn.Module) -> bool:
    if not isinstance(child, nn.ModuleList | nn.ModuleDict):
        return False
    parts = list(child.children())
    if len(parts) < 2 or len({type(part) for part in parts}) > 1:
        return False
    names = (name, type(child).__name__, type(parts[0]).__name__)
    return any(_EXPERT.search(one) for one in names) or _has_router(owner, child, len(parts))


def _has_router(owner: nn.Module, experts: nn.Module, count: int) -> bool:
    """Whether a matrix [count, features] stands beside the experts, in their owner or in a simple part of it."""
    beside = [owner, *(child for child in owner.children() if child is not experts and not list(child.children()))]
    shapes = [_shape(weight) for one in beside for weight in one.parameters(recurse=False)]
    return any(len(shape) == 2 and shape[0] == count for shape in shapes)


def _shape(weight: Any) -> tuple[int, ...]:
    return tuple(weight.ds_shape) if hasattr(weight, "ds_shape") else tuple(weight.shape)


def _calls_its_children(container: nn.Module) -> bool:
    return type(container).forward not in (nn.ModuleList.forward, nn.ModuleDict.forward)


def gather_whole(module: nn.Module) -> None:
    """Have ZeRO-3 gather `module` with all that is in it when it is called. Before the engine is made.

    NOTE: its gradients are reduced when the gradient of its input is there. Behind frozen embeddings the input wants none, torch
    tells of the output's gradient instead, and what `module` learns would be lost: so its input always wants one.
    """
    from deepspeed.utils import set_z3_leaf_module

    set_z3_leaf_module(module, True)
    if any(parameter.requires_grad for parameter in module.parameters()):
        module.register_forward_pre_hook(_want_gradient)


def _want_gradient(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    first = args[0] if args else None
    if not isinstance(first, torch.Tensor) or not first.is_floating_point() or first.requires_grad:
        return args
    return (first.detach().requires_grad_(), *args[1:]) if torch.is_grad_enabled() else args


def gathered_whole(module: nn.Module) -> list[str]:
    """The names of the modules of `module` that ZeRO-3 gathers whole: dstune's, DeepSpeed's own, those of the user's config."""
    from deepspeed.utils import z3_leaf_module

    return [name for name, part in module.named_modules() if z3_leaf_module(part)]


def summary(names: Iterable[str]) -> str:
    """Names that differ only in numbers, told once: `model.layers.*.mlp (24 modules)`."""
    counts: dict[str, int] = {}
    for name in names:
        pattern = re.sub(r"\b\d+\b", "*", name)
        counts[pattern] = counts.get(pattern, 0) + 1
    return ", ".join(f"{pattern} ({count} module{'s' * (count > 1)})" for pattern, count in counts.items())
