"""The fused loss gives what the model's own logits give: shown for the architecture at hand, on a tiny random model of its class."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import PretrainedConfig, PreTrainedModel

from dstune.errors import first_line
from dstune.model import isolation
from dstune.model.failures import FAILURES, of_kernels
from dstune.model.kernels.fused_head import FusedLoss, candidates, obstacle
from dstune.model.kernels.linear_cross_entropy import LinearCrossEntropy, Logits
from dstune.model.loss import IGNORED, forward_arguments
from dstune.model.remembered import Remembered

TOLERANCE = 1e-4
"""Largest difference that is taken for rounding, of the loss and relative to the largest gradient, in fp32."""
_LENGTH = 9
_SPREAD = 4.0
"""Of the tiny model's logits, about: where soft caps and scales are plain to see."""


@dataclass(frozen=True)
class Batch:
    """Of a tiny model."""

    inputs: dict[str, Any]
    targets: torch.Tensor


def prove(config: PretrainedConfig, function: LinearCrossEntropy, device: str) -> Logits | str:
    """What `config`'s architecture makes of its head's output, shown by loss and gradients; or why the head cannot be fused."""
    return _proven(config, function, device)


@Remembered
def _proven(config: PretrainedConfig, function: LinearCrossEntropy, device: str) -> Logits | str:
    small = isolation.smallest_that_builds(config)
    if small is None:
        return "no small model of this class can be built, so nothing is shown"
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        model = isolation.instance(small, "eager")
        reason = obstacle(model)
        if reason is not None:
            return reason
        try:
            batch = small_batch(small, device)
            _spread(model, batch)
            model.to(device)
            wanted = gradients(model, plain_loss(model, batch))
        except FAILURES as error:
            return f"its small model fails on a plain example ({first_line(error)})"
        reason = ""
        for logits in candidates(small):
            try:
                loss, count = FusedLoss(model, function, logits)(model, batch)
                found = gradients(model, loss)
            except of_kernels() as error:
                reason = f"its small model fails with a fused head ({first_line(error)})"
                continue
            assert count == int((batch.targets != IGNORED).sum())
            apart = difference(found, wanted)
            if apart <= TOLERANCE:
                return logits
            reason = reason or f"it does more to its logits than is known here (the gradients differ by {apart:.0e})"
    return reason


def small_batch(config: PretrainedConfig, device: str) -> Batch:
    """Two rows, with and without targets at their places."""
    size = config.get_text_config(decoder=True).vocab_size
    names = ["input_ids", "decoder_input_ids"] if config.is_encoder_decoder else ["input_ids"]
    inputs = {name: torch.randint(1, size, (2, _LENGTH)).to(device) for name in names}
    targets = torch.randint(0, size, (2, _LENGTH))
    targets[0, :4] = targets[1, ::2] = IGNORED
    return Batch(inputs, targets.to(device))


def _spread(model: PreTrainedModel, batch: Batch) -> None:
    """Give what stands behind the head something to do: larger logits, and buffers that are not all zero."""
    head: Any = model.get_output_embeddings()
    seen: list[float] = []
    handle = head.register_forward_hook(lambda head, inputs, output: seen.append(float(output.std())))
    with torch.no_grad():
        model(**forward_arguments(model, Batch({k: v.cpu() for k, v in batch.inputs.items()}, batch.targets.cpu())))
        head.weight.mul_(_SPREAD / max(seen[-1], 1e-6))
        for buffer in model.buffers(recurse=False):
            if buffer.is_floating_point():
                buffer.normal_()
    handle.remove()


def plain_loss(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """torch's own loss over the full logits."""
    logits = model(**forward_arguments(model, batch), use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=IGNORED, reduction="sum")


def gradients(model: PreTrainedModel, loss: torch.Tensor) -> list[torch.Tensor]:
    """The loss, and its gradient by every parameter, zero where it does not reach."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    pairs = zip(found, parameters, strict=True)
    return [loss.detach().reshape(1), *(torch.zeros_like(p) if g is None else g for g, p in pairs)]


def difference(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """The larger of the losses' and the gradients' relative difference; infinite where anything is not finite."""
    if not all(bool(torch.isfinite(one).all()) for one in (*found, *wanted)):
        return float("inf")
    of_loss = float((found[0] - wanted[0]).abs() / wanted[0].abs())
    largest = max(float(one.abs().max()) for one in wanted[1:])
    return max(of_loss, *(float((a - b).abs().max()) / largest for a, b in zip(found[1:], wanted[1:], strict=True)))
