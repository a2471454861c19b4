"""Rotary positions on a processor: queries and keys are turned in three steps each way, where transformers takes ten and a copy."""

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from dstune.model.failures import FAILURES
from dstune.model.kernels.kernel import Finding, TokenLoss

_FUNCTION = "apply_rotary_pos_emb"
"""What transformers calls it in the file of each architecture that has it."""
_PARAMETERS = ["q", "k", "cos", "sin", "unsqueeze_dim"]
_TOLERANCE = 1e-6
"""Largest difference that is taken for rounding, of fp32 values about 1."""

Turn = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class _Turned(torch.autograd.Function):
    """[x1 cos1 - x2 sin1, x2 cos2 + x1 sin2] of the halves of `x` [..., size]; `cos` and `sin` broadcast, and learn nothing."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        (first, second), (sin1, sin2) = x.chunk(2, -1), sin.chunk(2, -1)
        turned = x * cos
        low, high = turned.chunk(2, -1)
        low.addcmul_(second, sin1, value=-1)
        high.addcmul_(first, sin2)
        return turned

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        upstream = gradients[0]
        cos, sin = ctx.saved_tensors
        (first, second), (sin1, sin2) = upstream.chunk(2, -1), sin.chunk(2, -1)
        turned = upstream * cos
        low, high = turned.chunk(2, -1)
        low.addcmul_(second, sin2)
        high.addcmul_(first, sin1, value=-1)
        return turned, None, None


class Rotation:
    """Takes the place of the function in the file of the model's class, if that gives, in a small experiment, the same."""

    name = "rotary"

    def find(self, model: PreTrainedModel, device: str) -> Finding:
        function = getattr(sys.modules[type(model).__module__], _FUNCTION, None)
        if function is None:
            return Finding(False, f"{type(model).__name__} has no {_FUNCTION}")
        plain = function.plain if isinstance(function, _Turn) else function
        works = _is_known(plain)
        return Finding(
            works, "torch, without copies of halves" if works else f"its {_FUNCTION} is none that is known here"
        )

    def put_in(self, model: PreTrainedModel, device: str, loss: TokenLoss) -> TokenLoss:
        """NOTE: every model of the file looks the function up there."""
        file: Any = sys.modules[type(model).__module__]
        plain = getattr(file, _FUNCTION)
        if not isinstance(plain, _Turn):
            setattr(file, _FUNCTION, _Turn(plain))
        return loss


class _Turn:
    """The same of tensors of one dtype; of others, and where torch compiles, which makes one kernel of it, `plain` itself."""

    def __init__(self, plain: Turn) -> None:
        self.plain = plain

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        alike = q.dtype is k.dtype is cos.dtype is sin.dtype and q.shape[-1] == k.shape[-1] == cos.shape[-1]
        if not alike or cos.requires_grad or torch.compiler.is_compiling():
            return self.plain(q, k, cos, sin, unsqueeze_dim)
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return _Turned.apply(q, cos, sin), _Turned.apply(k, cos, sin)


@functools.cache
def _is_known(plain: Turn) -> bool:
    """Whether it turns as `_Turned` does, gradients with it."""
    if list(inspect.signature(plain).parameters) != _PARAMETERS:
        return False
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.enable_grad():
        torch.manual_seed(0)
        given = [torch.randn(2, heads, 3, 8, requires_grad=True) for heads in (4, 2)]
        upstream = [torch.randn_like(one) for one in given]
        cos, sin = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
        try:
            wanted = _with_gradients(plain, given, cos, sin, upstream)
        except FAILURES:
            return False
        found = _with_gradients(_Turn(plain), given, cos, sin, upstream)
    return all(
        a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=_TOLERANCE) for a, b in zip(found, wanted, strict=True)
    )


def _with_gradients(
    turn: Turn, given: list[torch.Tensor], cos: torch.Tensor, sin: torch.Tensor, upstream: list[torch.Tensor]
) -> list[torch.Tensor]:
    result = turn(*given, cos, sin)
    return [*(one.detach() for one in result), *torch.autograd.grad(result, given, upstream)]
