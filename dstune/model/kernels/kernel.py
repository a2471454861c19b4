"""What a kernel is to the rest of the house."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from dstune.model.loss import TokenBatch

TokenLoss = Callable[[Any, TokenBatch], tuple[torch.Tensor, int]]
"""As `loss.summed_token_loss`."""


@dataclass(frozen=True)
class Finding:
    """Whether a kernel can be used."""

    works: bool
    why: str
    """What will run, or what is in the way: a line for a person."""


class Kernel(Protocol):
    """A faster way to compute what a model computes anyway: these four are the whole of its surface.

    A new kernel is a file in this room and a line in `choice.KERNELS`.
    """

    @property
    def name(self) -> str: ...

    def find(self, model: PreTrainedModel, device: str) -> Finding:
        """Whether it gives on `device` (`cpu` or `cuda`) what `model` gives without it; `model` may be without storage."""
        ...

    def put_in(self, model: PreTrainedModel, device: str, loss: TokenLoss) -> TokenLoss:
        """Make `model` use it; the loss to compute from now on, `loss` where that stays as it is. Only after `find` said it works."""
        ...

    def keep(self, model: PreTrainedModel, device: str) -> None:
        """Have `model`, which has no storage, keep for the backward pass what it keeps with this kernel: `footprint` counts it.

        Nothing to do where that is as much as without it. Only after `find` said it works; no value that `model` then gives is read.
        """
        ...


def shows_on_gpu(model: PreTrainedModel) -> bool:
    """Whether what is asked of `model` can be, and is to be, shown on a GPU: not for one without storage, which somebody plans with.

    NOTE: who plans a run may wait for it as long as it lasts, and once it has touched a GPU it holds half a gigabyte of it.
    """
    return torch.cuda.is_available() and not any(parameter.is_meta for parameter in model.parameters())
