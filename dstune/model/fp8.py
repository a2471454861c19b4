"""Matrix products in 8-bit floats (`model.fp8`), for GPUs whose tensor cores have them (Micikevicius et al. 2022, "FP8 formats for
deep learning").

Inputs and weights are rounded to e4m3 (4 bits of exponent, 3 of mantissa), gradients to e5m2, each tensor times the factor that
takes its largest number to the format's largest; products are summed in fp32. Weights stay as they are, and are rounded anew at
each product, so ZeRO gathers, frees and updates them as ever. What a linear map that learns keeps of its input for the backward
pass is one byte a number; maps of the same input keep a copy each. The rounding is elementwise work: worth it where torch.compile
joins it with what stands before.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from dstune.config.schema import ModelSection
from dstune.engine.parameters import full_shape
from dstune.errors import ConfigError, Problem
from dstune.loggers import get_logger
from dstune.model.build import outline
from dstune.model.layers import beyond_matrices, repeated_layers
from dstune.planning.hardware import Device

log = get_logger(__name__)

_FORWARD, _BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
_MULTIPLE = 16
"""What the products' inner lengths must be a multiple of."""
_CAPABILITY = (8, 9)
"""Of the first GPUs that have it: Ada."""
_BEGINS = f"8-bit products begin with compute capability {_CAPABILITY[0]}.{_CAPABILITY[1]} (Ada, Hopper, Blackwell)"
_ADAPTER = "lora_"
"""In the names of an adapter's own matrices, which are small, and all that is learnt."""


class Rounded(NamedTuple):
    """A tensor in 8 bits: `values` * `scale` is what it stands for."""

    values: torch.Tensor
    scale: torch.Tensor
    """fp32, one number."""

    @classmethod
    def of(cls, tensor: torch.Tensor, dtype: torch.dtype) -> "Rounded":
        largest = tensor.detach().abs().amax().float()
        # Nothing but zeros stays zeros.
        scale = torch.where(largest > 0, largest / torch.finfo(dtype).max, 1.0)
        return cls((tensor.float() / scale).to(dtype), scale)


class Multiply(torch.autograd.Function):
    """`rows` [n, inputs] times the transpose of `weight` [outputs, inputs], in `rows`' dtype; the gradients are products in 8 bits too."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        left = Rounded.of(rows, _FORWARD)
        values, scale = left if ctx.needs_input_grad[1] else (None, None)
        ctx.save_for_backward(values, scale, weight if ctx.needs_input_grad[0] else None)
        return _product(left, Rounded.of(weight, _FORWARD), rows.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        values, scale, weight = ctx.saved_tensors
        gradient = Rounded.of(gradients[0], _BACKWARD)
        of_rows = of_weight = None
        dtype = gradients[0].dtype
        if weight is not None:
            of_rows = _product(gradient, _turned(Rounded.of(weight, _FORWARD)), dtype)
        if values is not None:
            of_weight = _product(_padded(_turned(gradient)), _padded(_turned(Rounded(values, scale))), dtype)
        return of_rows, of_weight


def planned(model: ModelSection, base: Path, device: Device | None) -> str:
    """What a plan for `device` (None: not known) says of it.

    Raises ConfigError where that has no such products, or the architecture is none to round.
    """
    if not model.fp8:
        return "off"
    if device is not None and not device.fp8:
        raise ConfigError(
            Problem("model.fp8", f"true, but the planned GPU is too old: {_BEGINS}", "false, or another GPU")
        )
    return _described(_chosen(outline(model, base)))


def multiply_in_fp8(module: PreTrainedModel, device: torch.device) -> None:
    """Have the linear maps of the repeated layers multiply in 8 bits: those whose sizes are multiples of 16, a head not among them.

    Raises ConfigError where `device` is a GPU without such products, or the architecture is none to round.
    NOTE: behind kernels that take the place of a linear map's forward pass, and before the layers are compiled.
    """
    if reason := _obstacle(device):
        raise ConfigError(Problem("model.fp8", f"true, but {reason}", "false"))
    log.info("fp8: %s", _described(round_products(module)))
    if device.type == "cpu":
        log.warning("8-bit products on a CPU show what a GPU would learn, and are slower than those in 16 bits")


def round_products(module: PreTrainedModel) -> Mapping[str, Any]:
    """The same on whatever device: the linear maps that are changed, by name. Raises ConfigError for such an architecture."""
    chosen = _chosen(module)
    for part in chosen.values():
        part.forward = _linear(part)
    return chosen


def _chosen(module: PreTrainedModel) -> dict[str, Any]:
    """The linear maps that are rounded, by name."""
    reason = beyond_matrices(module)
    inside = {id(part) for layer in repeated_layers(module) for part in layer.modules()}
    chosen = {name: part for name, part in module.named_modules() if id(part) in inside and _fits(name, part)}
    if not chosen:
        reason = reason or f"no linear map of {module.config.model_type} has sizes that are multiples of {_MULTIPLE}"
    if reason:
        raise ConfigError(Problem("model.fp8", f"true, but {reason}", "false"))
    return chosen


def _described(chosen: Mapping[str, Any]) -> str:
    capability = f"{_CAPABILITY[0]}.{_CAPABILITY[1]}"
    return (
        f"the products of {len(chosen)} linear maps in the layers, on GPUs of compute capability {capability} and newer"
    )


def _linear(layer: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """The forward pass of a linear map."""

    def forward(values: torch.Tensor) -> torch.Tensor:
        rows: Any = Multiply.apply(values.reshape(-1, values.shape[-1]), layer.weight)
        result = rows.view(*values.shape[:-1], -1)
        return result if layer.bias is None else result + layer.bias

    return forward


def _obstacle(device: torch.device) -> str | None:
    if device.type == "cpu":
        return None
    if torch.version.hip is not None:
        return "AMD's GPUs have 8-bit formats of their own"
    if torch.cuda.get_device_capability(device) >= _CAPABILITY:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    has = f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}"
    return f"{has}: {_BEGINS}"


def _fits(name: str, part: nn.Module) -> bool:
    if type(part) is not nn.Linear or _ADAPTER in name:
        return False
    return not any(size % _MULTIPLE for size in full_shape(part.weight))


def _product(left: Rounded, right: Rounded, dtype: torch.dtype) -> torch.Tensor:
    """`left` [n, k] times the transpose of `right` [m, k]: in `dtype`, [n, m]."""
    return torch._scaled_mm(left.values, right.values.t(), scale_a=left.scale, scale_b=right.scale, out_dtype=dtype)


def _turned(matrix: Rounded) -> Rounded:
    return Rounded(matrix.values.t().contiguous(), matrix.scale)


def _padded(matrix: Rounded) -> Rounded:
    """Zeros behind the rows, up to a multiple of 16 columns: they add nothing to a product over the columns."""
    lacking = -matrix.values.shape[1] % _MULTIPLE
    # torch pads no 8-bit floats.
    as_bytes = torch.nn.functional.pad(matrix.values.view(torch.uint8), (0, lacking))
    return Rounded(as_bytes.view(matrix.values.dtype), matrix.scale)
