"""The kernel of the loss: head and cross-entropy fused over the supervised tokens."""

from transformers import PreTrainedModel

from dstune.model.kernels import liger, proof
from dstune.model.kernels.fused_head import FusedLoss, obstacle
from dstune.model.kernels.kernel import Finding, TokenLoss, shows_on_gpu
from dstune.model.kernels.linear_cross_entropy import LinearCrossEntropy, Logits, summed_linear_cross_entropy


def fastest(device: str) -> LinearCrossEntropy:
    """Liger's on CUDA where it is installed, else torch's."""
    return liger.linear_cross_entropy if device == "cuda" and liger.missing() is None else summed_linear_cross_entropy


class FusedLossKernel:
    """Takes the loss over where the tiny model's loss and gradients, computed so, are those of its own logits."""

    name = "linear-cross-entropy"

    def find(self, model: PreTrainedModel, device: str) -> Finding:
        reason = obstacle(model)
        if reason is not None:
            return Finding(False, reason)
        found = _proven(model, device)
        if isinstance(found, str):
            return Finding(False, found)
        by = "torch" if fastest(device) is summed_linear_cross_entropy else "Liger"
        cap = "" if found.cap is None else f", soft cap {found.cap:g}"
        scale = "" if found.scale == 1.0 else f", logits times {found.scale:g}"
        return Finding(True, f"{by}, over supervised tokens in chunks{scale}{cap}")

    def put_in(self, model: PreTrainedModel, device: str, loss: TokenLoss) -> TokenLoss:
        found = _proven(model, device)
        assert isinstance(found, Logits), found
        return FusedLoss(model, fastest(device), found)

    def keep(self, model: PreTrainedModel, device: str) -> None:
        """Logits are counted apart (`launch.sizes`)."""


def _proven(model: PreTrainedModel, device: str) -> Logits | str:
    """Shown on the device that trains; for who plans, on the CPU: the worker shows it again."""
    if device == "cuda" and not shows_on_gpu(model):
        return proof.prove(model.config, summed_linear_cross_entropy, "cpu")
    return proof.prove(model.config, fastest(device), device)
