"""RMSNorm on a processor: a few rows at a time, so that what lies between the input and the result never leaves a core's cache.

transformers takes some seven steps of a norm forwards and fifteen backwards, each over all tokens in fp32. Here the same is done block by
block, and the input is all that is kept for the backward pass: in 16 bits a third of what those steps keep.
"""

import functools
import inspect
import math
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from dstune.model.failures import FAILURES
from dstune.model.kernels.kernel import Finding, TokenLoss
from dstune.model.kernels.method import method

_CACHED_ELEMENTS = 1 << 16
"""Of a block, for each thread: its three fp32 tensors stay in a core's cache."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_EPS_NAMES = ("variance_epsilon", "eps")
_TOLERANCE = 1e-5
"""Largest difference that is taken for rounding, relative to the largest value, in fp32."""


@dataclass(frozen=True)
class Formula:
    """What an RMSNorm makes of a row x: x / sqrt(mean(x^2) + eps) * (weight + offset)."""

    offset: float = 0.0
    late: bool = False
    """Whether it is rounded to the input's dtype behind the weight; else before it too."""


_FORMULAS = (Formula(), Formula(late=True), Formula(offset=1.0, late=True))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, formula: Formula) -> torch.Tensor:
    """`formula` of each row of `x` [..., width] with `weight` [width], both of one dtype; sums are fp32. Differentiable once."""
    return _RmsNorm.apply(x, weight, eps, formula)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, formula: Formula) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        whole = torch.empty(x.shape, dtype=x.dtype, device=x.device)  # no view: some models change it in place
        result = whole.view(rows.shape)
        scales = torch.empty(len(rows), 1, dtype=torch.float32, device=x.device)
        factor = weight.float().add(formula.offset) if formula.late else weight
        for part in _blocks(rows):
            values = rows[part].float()
            length = torch.linalg.vector_norm(values, dim=1, keepdim=True)
            scale = length.square_().div_(values.shape[1]).add_(eps).rsqrt_()
            scales[part] = scale
            # A copy: of fp32 rows `values` are the input itself.
            values = values * scale if values.dtype is rows.dtype else values.mul_(scale)
            if formula.late:
                result[part] = values.mul_(factor)
            else:
                torch.mul(values.to(rows.dtype), factor, out=result[part])
        ctx.save_for_backward(x, weight, scales)
        ctx.offset = formula.offset
        return whole

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        """With n = x * scale and u = upstream * weight: (u - n * mean(u * n)) * scale, and for the weight the sum of upstream * n."""
        x, weight, scales = ctx.saved_tensors
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        rows, upstream = (each.reshape(-1, x.shape[-1]) for each in (x, gradients[0]))
        of_x = torch.empty_like(rows) if wants_x else None
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        factor = weight.float().add(ctx.offset)
        mean = factor / -rows.shape[1]
        for part in _blocks(rows):
            scale, coming = scales[part], upstream[part].float()
            values = rows[part] * scale
            products = coming * values
            if of_weight is not None:
                of_weight += products.sum(0)
            if of_x is not None:
                along = torch.mv(products, mean)[:, None]
                of_x[part] = torch.mul(coming, factor, out=products).addcmul_(values, along).mul_(scale)
        return (
            None if of_x is None else of_x.view(x.shape),
            None if of_weight is None else of_weight.to(weight.dtype),
            None,
            None,
        )


def _blocks(rows: torch.Tensor) -> list[slice]:
    size = max(1, _CACHED_ELEMENTS * torch.get_num_threads() // max(1, rows.shape[1]))
    return [slice(start, start + size) for start in range(0, len(rows), size)]


class BlockedNorm:
    """Computes each norm so whose class gives, in a small experiment, what one of the known formulas gives."""

    name = "rms-norm"

    def find(self, model: PreTrainedModel, device: str) -> Finding:
        kinds = sorted({type(part).__name__ for part in _norms(model)})
        if not kinds:
            return Finding(False, "the model has no RMSNorm of a known kind")
        return Finding(True, f"torch, some rows at a time ({', '.join(kinds)})")

    def put_in(self, model: PreTrainedModel, device: str, loss: TokenLoss) -> TokenLoss:
        put_into(model)
        return loss

    def keep(self, model: PreTrainedModel, device: str) -> None:
        put_into(model)


def put_into(model: PreTrainedModel) -> None:
    """Have the norms of `model` whose formula is known computed so."""
    for part, formula in _norms(model).items():
        part.forward = types.MethodType(_forward(type(part), formula), part)


@functools.cache
def _forward(kind: type[nn.Module], formula: Formula) -> Callable[..., torch.Tensor]:
    plain = kind.forward

    def in_blocks(norm: Any, *given: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
        """The norm's own steps for a mixture of dtypes, and for one that has none of these kernels."""
        (hidden,) = (*given, *named.values())
        if hidden.dtype is not norm.weight.dtype or hidden.dtype not in _DTYPES:
            return plain(norm, *given, **named)
        return rms_norm(hidden, norm.weight, _eps(norm), formula)

    return method(plain, in_blocks)


def _norms(model: PreTrainedModel) -> dict[Any, Formula]:
    """The norms of transformers' own whose formula is known, as far as nobody else has taken their forward pass."""
    found: dict[Any, Formula] = {}
    for part in model.modules():
        if "forward" in part.__dict__ or [name for name, _ in part.named_parameters()] != ["weight"]:
            continue
        known = _known(type(part))
        if known is not None and _settings(part) == known.settings:
            found[part] = known.formula
    return found


def _eps(part: nn.Module) -> float:
    return next((value for name in _EPS_NAMES if isinstance(value := getattr(part, name, None), float)), math.nan)


def _settings(part: nn.Module) -> dict[str, Any] | None:
    """What sets this norm apart from others of its class, but for its width and its eps; None: it is none that could be known."""
    weight: Any = next(part.parameters())
    shape = tuple(getattr(weight, "ds_shape", weight.shape))  # ZeRO-3 leaves none of the weight here
    if len(shape) != 1 or math.isnan(_eps(part)):
        return None
    own = {name: value for name, value in vars(part).items() if not name.startswith("_")}
    if any(isinstance(value, torch.Tensor) for value in own.values()):
        return None
    alike = ("training", *_EPS_NAMES)
    return {name: value for name, value in own.items() if name not in alike and value not in (shape, *shape)}


class _Known(NamedTuple):
    formula: Formula
    settings: dict[str, Any]
    """Of the one that was tried."""


@functools.cache
def _known(kind: type[nn.Module]) -> _Known | None:
    """The formula that a norm of this class follows, gradients and the rounding of bf16 with it; None: none, or it is no norm."""
    if not kind.__module__.startswith("transformers.") or len(inspect.signature(kind.forward).parameters) != 2:
        return None
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(0)
        width, eps = 32, 0.25
        try:
            norm: Any = kind(width, eps=eps).float()
            if [name for name, _ in norm.named_parameters()] != ["weight"] or _eps(norm) != eps:
                return None
            settings = _settings(norm)
            norm.weight.data = torch.randn(width).bfloat16().float()
            x, upstream = (torch.randn(5, width, dtype=torch.float32) for _ in range(2))
            x.requires_grad_()
            wanted = _with_gradients(norm(x), x, norm.weight, upstream)
            in_16_bits = x.detach().bfloat16()
            rounded = norm.bfloat16()(in_16_bits)
        except FAILURES:
            return None
        for formula in _FORMULAS:
            weight = norm.weight.detach().float().requires_grad_()
            found = _with_gradients(rms_norm(x, weight, eps, formula), x, weight, upstream)
            same = all((a - b).abs().max() <= _TOLERANCE * b.abs().max() for a, b in zip(found, wanted, strict=True))
            if same and settings is not None and torch.equal(rms_norm(in_16_bits, norm.weight, eps, formula), rounded):
                return _Known(formula, settings)
    return None


def _with_gradients(
    result: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, upstream: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    return result.detach(), *torch.autograd.grad(result, (x, weight), upstream)
