"""Kernels of the package liger-kernel, which is not required: used on CUDA where it is installed and knows the architecture."""

import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from dstune.errors import first_line
from dstune.model import isolation
from dstune.model.failures import of_kernels
from dstune.model.kernels import proof, rotation
from dstune.model.kernels.kernel import Finding, TokenLoss, shows_on_gpu
from dstune.model.kernels.linear_cross_entropy import Logits, summed_linear_cross_entropy
from dstune.model.loss import IGNORED, summed_token_loss
from dstune.model.remembered import Remembered

_OF_LANGUAGE_MODELS = ("rope", "swiglu", "geglu")
"""Switches that are on unless they are said to be off."""
_TOLERANCE = 1e-3
"""As `proof.TOLERANCE`, for layers that sum in another order."""


def missing() -> str | None:
    """What of it is not installed here; None: nothing."""
    names = {"liger_kernel": "liger-kernel", "triton": "triton"}
    lacking = [package for module, package in names.items() if find_spec(module) is None]
    return f"{' and '.join(lacking)} not installed here (pip install liger-kernel)" if lacking else None


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor, logits: Logits
) -> torch.Tensor:
    """`summed_linear_cross_entropy` by Liger, the weight's gradient summed in fp32. The scale goes into the hidden states and the bias.

    By torch where Liger would give other gradients: it makes none where the hidden states want none (all but the head is frozen), and
    has nothing that keeps small derivatives in fp16.
    """
    frozen = torch.is_grad_enabled() and not hidden.requires_grad
    if len(targets) == 0 or frozen or weight.dtype is torch.float16:
        return summed_linear_cross_entropy(hidden, weight, bias, targets, logits)
    function: Any = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy")
    if logits.scale != 1.0:
        hidden = hidden * logits.scale
        bias = None if bias is None else bias * logits.scale
    return function.LigerFusedLinearCrossEntropyFunction.apply(
        hidden, weight, targets, bias, None, IGNORED, 0.0, 0.0, "sum", logits.cap, False, torch.float32
    )[0]


class LigerLayers:
    """One kind of layer of a model, computed by Liger's kernel; `switches`: what Liger calls it, one of these for each architecture.

    `keep`: has a model without storage keep what it keeps with it (`Kernel.keep`); None: as much as without.
    """

    def __init__(
        self, name: str, switches: Sequence[str], keep: Callable[[PreTrainedModel], None] | None = None
    ) -> None:
        self.name = name
        self._switches = tuple(switches)
        self._keep = keep

    def find(self, model: PreTrainedModel, device: str) -> Finding:
        if device != "cuda":
            return Finding(False, "for CUDA only")
        reason = missing()
        if reason is not None:
            return Finding(False, reason)
        if self._patch(model.config.model_type) is None:
            return Finding(False, f"liger-kernel has none for {model.config.model_type}")
        if not shows_on_gpu(model):
            return Finding(True, "Liger; shown on the GPU before training")
        reason = _disproof(model.config, self, device)
        return Finding(reason is None, reason or "Liger")

    def put_in(self, model: PreTrainedModel, device: str, loss: TokenLoss) -> TokenLoss:
        """NOTE: Liger puts classes and the rotary function into the model's file, and of a model that sees into its language model's, for
        models built later: taken out again. A model without storage would start its kernels on the GPU, which end the process.
        """
        patch = self._patch(model.config.model_type)
        assert patch is not None
        names = {type(part).__module__ for part in model.modules()}
        before = [(vars(sys.modules[name]), dict(vars(sys.modules[name]))) for name in names]
        patch(model)
        turns = {was.get(rotation.FUNCTION): now.get(rotation.FUNCTION) for now, was in before}
        for now, was in before:
            now.update(was)
        if any(turn is not plain for plain, turn in turns.items()):
            rotation.have_called(model, lambda plain: turns.get(plain, plain))
        return loss

    def keep(self, model: PreTrainedModel, device: str) -> None:
        if self._keep is not None:
            self._keep(model)

    def _patch(self, model_type: str) -> Callable[[PreTrainedModel], None] | None:
        """What makes a model use this one kernel of Liger's; None where Liger has none for its type."""
        patches: Any = importlib.import_module("liger_kernel.transformers.monkey_patch")
        function = patches.MODEL_TYPE_TO_APPLY_LIGER_FN.get(model_type)
        if function is None:
            return None
        known = inspect.signature(function).parameters
        if not any(switch in known for switch in self._switches):
            return None
        settings = {name: name in self._switches for name, one in known.items() if isinstance(one.default, bool)}
        if any(
            one.kind is inspect.Parameter.VAR_KEYWORD for one in known.values()
        ):  # of a model that sees: its language model's
            settings |= {name: name in self._switches for name in _OF_LANGUAGE_MODELS}
        return lambda model: function(model=model, **settings)


def _forwards(model: torch.nn.Module) -> list[Any]:
    """What each layer calls in place of its class's own forward pass."""
    return [part.__dict__.get("forward") for part in model.modules()]


@Remembered
def _disproof(config: PretrainedConfig, layers: LigerLayers, device: str) -> str | None:
    """Why a tiny model of this class cannot be computed so on this device; None where it gives the same gradients."""
    small = isolation.smallest_that_builds(config)
    if small is None:
        return "no small model of this class can be built, so nothing is shown"
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        model: Any = isolation.instance(small, "eager")
        try:
            batch = proof.small_batch(small, device)
            model.to(device)
            wanted = proof.gradients(model, proof.plain_loss(model, batch))
            before = _forwards(model)
            layers.put_in(model, device, summed_token_loss)
            if _forwards(model) == before:
                return "Liger changes none of its layers"
            difference = proof.difference(proof.gradients(model, proof.plain_loss(model, batch)), wanted)
        except of_kernels() as error:
            return f"its small model fails with it ({first_line(error)})"
    return None if difference <= _TOLERANCE else f"it changes the gradients of a small model by {difference:.0e}"
