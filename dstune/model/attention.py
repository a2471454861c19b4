"""Attention within each example of a packed row, with no mask over the whole row."""

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PER_EXAMPLE = "per-example"
"""The name under which transformers knows this attention."""


def register() -> None:
    """Make `per-example` known to transformers; again does no harm."""
    AttentionInterface.register(PER_EXAMPLE, per_example_attention)
    AttentionMaskInterface.register(PER_EXAMPLE, _no_mask_for_packed_rows)


def _no_mask_for_packed_rows(*args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
    return None if attention_mask is None else sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


def per_example_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of a packed row, one call per example. `query` [1, heads, tokens, size]; `key` and `value` may have fewer heads.

    `cu_seq_lens_q` [examples + 1] is where each example begins, and the end. Without it: transformers' own sdpa.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            sliding_window=sliding_window, **kwargs,
        )  # fmt: skip
    lengths = cu_seq_lens_q.diff().tolist()
    pieces = [
        scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
        for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    ]
    return torch.cat(pieces, 2).transpose(1, 2).contiguous(), None
