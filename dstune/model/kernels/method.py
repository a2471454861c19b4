"""A forward pass in place of a layer's own."""

import functools
from collections.abc import Callable
from typing import Any

import torch


def method(plain: Callable[..., Any], own: Callable[..., Any]) -> Callable[..., Any]:
    """`own`, but `plain` where torch compiles: it makes few kernels of those steps itself. Both take the layer first.

    Made once for a class and given to each of its layers as a method, or every layer would be compiled by itself.
    """

    @functools.wraps(plain)
    def forward(layer: Any, *given: Any, **named: Any) -> Any:
        return (plain if torch.compiler.is_compiling() else own)(layer, *given, **named)

    return forward
