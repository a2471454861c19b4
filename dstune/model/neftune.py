"""Noise on the input embeddings while training (Jain et al. 2023, "NEFTune: noisy embeddings improve instruction finetuning").

An example of L tokens in embeddings of width d gets uniform noise within alpha / sqrt(L d), so that the noise of a whole example is
as long whatever its length. In a packed row each example counts for itself, not the row. The noise comes from torch's generator, which
is seeded before each forward pass (`training.seeds`): a resume makes the same. Encoder-decoders get it on what the encoder reads.
"""

import math
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


def add_noise(model: PreTrainedModel, alpha: float) -> None:
    """Register the hooks. They do nothing in evaluation."""
    stack: Any = model.get_encoder() if model.config.is_encoder_decoder else model
    noise = _Noise(alpha)
    stack.register_forward_pre_hook(noise.look, with_kwargs=True)
    stack.get_input_embeddings().register_forward_hook(noise.add)


class _Noise:
    """Tells the embeddings of a stack how long the examples are that it was called with."""

    def __init__(self, alpha: float) -> None:
        self._alpha = alpha
        self._lengths: torch.Tensor | None = None

    def look(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._lengths = lengths_of_tokens(kwargs) if stack.training else None

    def add(self, embedding: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        # Once for each pass of the stack: a decoder may read from the same table.
        lengths, self._lengths = self._lengths, None
        if lengths is None:
            return output
        reach = self._alpha / torch.sqrt(lengths * output.shape[-1])
        noise = torch.empty_like(output).uniform_(-1.0, 1.0)
        return output + noise * reach[..., None].to(output.dtype)


def lengths_of_tokens(inputs: dict[str, Any]) -> torch.Tensor:
    """[rows, tokens], fp32: for each token the length of the example that it is of; infinite for padding, which gets no noise.

    For starts [0, 3, 5] it is [3, 3, 3, 2, 2]; for the mask [1, 1, 0] it is [2, 2, inf].
    """
    starts = inputs.get("cu_seq_lens_k")
    if starts is not None:
        lengths = starts.long().diff()
        return torch.repeat_interleave(lengths, lengths)[None].float()
    mask = inputs["attention_mask"]
    lengths = mask.sum(1, keepdim=True).float()
    return torch.where(mask.bool(), lengths, math.inf)
