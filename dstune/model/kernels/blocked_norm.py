"""RMSNorm on a processor: a few rows at a time, so that what lies between the input and the result never leaves a core's cache.

transformers takes some seven steps of a norm forwards and fifteen backwards, each over all tokens in fp32. Here the same is done block by
block, and the input is all that is kept for the backward pass: in 16 bits a third of what those steps keep.
"""

import functools
import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from dstune.model.failures import FAILURES
from dstune.model.kernels.kernel import Finding, TokenLoss

_CACHED_ELEMENTS = 1 << 16
"""Of a block, for each thread: its three fp32 tensors stay in a core's cache."""
_EPS_NAMES = ("variance_epsilon", "eps")
_TOLERANCE = 1e-5
"""Largest difference that is taken for rounding, relative to the largest value, in fp32."""


@dataclass(frozen=True)
class Formula:
    """What an RMSNorm makes of a row x: x / sqrt(mean(x^2) + eps) * (weight + offset)."""

    offset: float = 0.0
    late: bool = False
    """Whether it is rounded to the input's dtype behind the weight; else before it too."""


_KNOWN = (Formula(), Formula(late=True), Formula(offset=1.0, late=True))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, formula: Formula) -> torch.Tensor:
    """`formula` of each row of `x` [..., width] with `weight` [width], both of one dtype; sums are fp32. Differentiable once."""
    return _RmsNorm.apply(x, weight, eps, formula)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, formula: Formula) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        result = torch.empty_like(rows)
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
        return result.view(x.shape)

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
        part.forward = _Norm(part, formula)


class _Norm:
    """The forward pass of a norm; the module's own where torch compiles, which makes one kernel of it, and for a mixture of dtypes."""

    def __init__(self, part: Any, formula: Formula) -> None:
        self._part, self._plain, self._formula = part, part.forward, formula
        self._eps = _eps(part)

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = self._part.weight
        if hidden_states.dtype is not weight.dtype or torch.compiler.is_compiling():
            return self._plain(hidden_states)
        return rms_norm(hidden_states, weight, self._eps, self._formula)


def _norms(model: PreTrainedModel) -> dict[Any, Formula]:
    """The norms of transformers' own whose formula is known, as far as nobody else has taken their forward pass."""
    found: dict[Any, Formula] = {}
    for part in model.modules():
        free = "forward" not in part.__dict__ and [name for name, _ in part.named_parameters()] == ["weight"]
        if free and (formula := _formula_of(type(part))) is not None:
            found[part] = formula
    return found


def _eps(part: nn.Module) -> float:
    return next((value for name in _EPS_NAMES if isinstance(value := getattr(part, name, None), float)), math.nan)


@functools.cache
def _formula_of(kind: type[nn.Module]) -> Formula | None:
    """The one that a norm of this class follows, gradients and the rounding of bf16 with it; None: none, or it is no norm."""
    if not kind.__module__.startswith("transformers.") or len(inspect.signature(kind.forward).parameters) != 2:
        return None
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.enable_grad():
        torch.manual_seed(0)
        width, eps = 32, 0.25
        try:
            norm: Any = kind(width, eps=eps)
            if [name for name, _ in norm.named_parameters()] != ["weight"] or _eps(norm) != eps:
                return None
            norm.weight.data = torch.randn(width).bfloat16().float()
            x, upstream = torch.randn(5, width, requires_grad=True), torch.randn(5, width)
            wanted = _with_gradients(norm(x), x, norm.weight, upstream)
            in_16_bits = x.detach().bfloat16()
            rounded = norm.bfloat16()(in_16_bits)
        except FAILURES:
            return None
        for formula in _KNOWN:
            weight = norm.weight.detach().float().requires_grad_()
            found = _with_gradients(rms_norm(x, weight, eps, formula), x, weight, upstream)
            same = all((a - b).abs().max() <= _TOLERANCE * b.abs().max() for a, b in zip(found, wanted, strict=True))
            if same and torch.equal(rms_norm(in_16_bits, norm.weight, eps, formula), rounded):
                return formula
    return None


def _with_gradients(
    result: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, upstream: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    return result.detach(), *torch.autograd.grad(result, (x, weight), upstream)
