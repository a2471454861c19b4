"""A kernel that is another one on CUDA than on a processor."""

from dataclasses import dataclass

from transformers import PreTrainedModel

from dstune.model.kernels.kernel import Finding, Kernel, TokenLoss


@dataclass(frozen=True)
class ByDevice:
    """Both have one name in the run file."""

    cpu: Kernel
    cuda: Kernel

    @property
    def name(self) -> str:
        return self.cpu.name

    def find(self, model: PreTrainedModel, device: str) -> Finding:
        return self._on(device).find(model, device)

    def put_in(self, model: PreTrainedModel, device: str, loss: TokenLoss) -> TokenLoss:
        return self._on(device).put_in(model, device, loss)

    def keep(self, model: PreTrainedModel, device: str) -> None:
        self._on(device).keep(model, device)

    def _on(self, device: str) -> Kernel:
        return self.cuda if device == "cuda" else self.cpu
