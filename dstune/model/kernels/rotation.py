"""Rotary positions on a processor: queries and keys are turned in three steps each way, where transformers takes ten and a copy.

Forward and backward pass of 2,048 tokens with 16 heads of 64, one thread: 14 ms, where those steps take 30.
"""

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from dstune.model.failures import FAILURES
from dstune.model.kernels.kernel import Finding, TokenLoss
from dstune.model.kernels.method import method

FUNCTION = "apply_rotary_pos_emb"
"""What transformers calls it in the file of each architecture that has it, where attention layers look it up."""
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
    """Has each attention layer call it in place of its file's own function, if that gives, in a small experiment, the same."""

    name = "rotary"

    def find(self, model: PreTrainedModel, device: str) -> Finding:
        kinds = {plain for _, plain in _calls(model)}
        if not kinds:
            return Finding(False, f"no layer of {type(model).__name__} calls {FUNCTION}")
        if not all(map(_is_known, kinds)):
            return Finding(False, f"its {FUNCTION} is none that is known here")
        return Finding(True, "torch, without copies of halves")

    def put_in(self, model: PreTrainedModel, device: str, loss: TokenLoss) -> TokenLoss:
        have_called(model, _turn)
        return loss

    def keep(self, model: PreTrainedModel, device: str) -> None:
        """The angles, as transformers' steps do."""


def have_called(model: PreTrainedModel, instead: Callable[[Turn], Turn]) -> None:
    """Have each attention layer of `model` call what `instead` gives for the function of its file, which stays as it is: other models of
    the file call it, such as those without storage that are counted.
    """
    for part, plain in _calls(model):
        part.forward = types.MethodType(_calling(type(part).forward, instead(plain)), part)


def _calls(model: PreTrainedModel) -> list[tuple[Any, Turn]]:
    """The layers whose forward pass calls the function, as far as nobody else has taken that, and what they call."""
    found: list[tuple[Any, Turn]] = []
    for part in model.modules():
        forward = type(part).forward
        if "forward" in part.__dict__ or not isinstance(forward, types.FunctionType):
            continue
        if FUNCTION in forward.__code__.co_names and callable(plain := forward.__globals__.get(FUNCTION)):
            found.append((part, plain))
    return found


@functools.cache
def _calling(forward: types.FunctionType, turn: Turn) -> Callable[..., Any]:
    """`forward` that finds `turn` where it looks the function of its file up."""
    names = forward.__globals__ | {FUNCTION: turn}
    own = types.FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    own.__kwdefaults__ = forward.__kwdefaults__
    return method(forward, own)


class _Turn:
    """The same of tensors of one dtype and as many tokens; of others `plain` itself."""

    def __init__(self, plain: Turn) -> None:
        self.plain = plain

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not q.dtype is k.dtype is cos.dtype is sin.dtype or cos.requires_grad:
            return self.plain(q, k, cos, sin, unsqueeze_dim)
        wide, high = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        if not (_covers(q, wide) and _covers(k, wide)):
            return self.plain(q, k, cos, sin, unsqueeze_dim)
        return _Turned.apply(q, wide, high), _Turned.apply(k, wide, high)


@functools.cache
def _turn(plain: Turn) -> _Turn:
    return _Turn(plain)


def _covers(x: torch.Tensor, angles: torch.Tensor) -> bool:
    """Whether each of the last dimension's numbers has its angle, and no angle is left over."""
    return (
        x.ndim == angles.ndim
        and x.shape[-1] == angles.shape[-1]
        and all(own in (1, size) for own, size in zip(angles.shape, x.shape, strict=True))
    )


@functools.cache
def _is_known(plain: Turn) -> bool:
    """Whether it turns as `_Turned` does, gradients with it; in bf16 no nearer to the truth."""
    if list(inspect.signature(plain).parameters) != _PARAMETERS:
        return False
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(0)
        given = [torch.randn(2, heads, 3, 8, dtype=torch.float32) for heads in (4, 2)]
        upstream = [torch.randn_like(one) for one in given]
        angles = [torch.randn(2, 3, 8, dtype=torch.float32) for _ in "cs"]
        try:
            wanted = _with_gradients(plain, given, angles, upstream)
            in_16_bits = [[one.bfloat16() for one in some] for some in (given, angles, upstream)]
            rounded = _with_gradients(plain, *in_16_bits)
            truth = _with_gradients(plain, *([one.float() for one in some] for some in in_16_bits))
        except FAILURES:
            return False
        found = _with_gradients(_Turn(plain), given, angles, upstream)
        ours = _with_gradients(_Turn(plain), *in_16_bits)
    same = all(
        a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=_TOLERANCE) for a, b in zip(found, wanted, strict=True)
    )
    return same and _error(ours, truth) <= _error(rounded, truth)


def _error(found: list[torch.Tensor], truth: list[torch.Tensor]) -> float:
    return sum(float((one.float() - right).square().sum()) for one, right in zip(found, truth, strict=True))


def _with_gradients(
    turn: Turn, given: list[torch.Tensor], angles: list[torch.Tensor], upstream: list[torch.Tensor]
) -> list[torch.Tensor]:
    given = [one.detach().requires_grad_() for one in given]
    result = turn(*given, *angles)
    return [*(one.detach() for one in result), *torch.autograd.grad(result, given, upstream)]
