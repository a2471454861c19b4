"""Attention within each example of a packed row, with no mask over the whole row: registered with transformers by name.

Where a row's examples begin travels with the call: transformers hands a forward pass's `cu_seq_lens_q` and `max_length_q` through
to the attention of every layer. In sequence-to-sequence models `q` is the decoder's row and `k` the encoder's: the encoder attends
both ways within each source, the decoder causally within each target, and across to the source of the same example.
"""

from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PER_EXAMPLE = "per-example"
"""The name under which transformers knows this attention."""

_UNKNOWN = ("softcap", "s_aux", "cache")
"""Arguments of other kernels that change the result, and that this one does not have."""

_EVEN = 32
"""Tokens that a longer example is given a multiple of, on a processor: its own see nothing of those behind them. (Forward and backward
pass of rows with examples of 256 to 790 tokens: 18% less time in the first twenty, 8% once most lengths were met.)"""
FP32_ELEMENTS = 16_384
"""Tokens of an example times the size of a head, up to which a CPU attends in fp32."""


def register() -> None:
    """Make `per-example` known to transformers; again does no harm."""
    AttentionInterface.register(PER_EXAMPLE, per_example_attention)
    AttentionMaskInterface.register(PER_EXAMPLE, no_mask_for_packed_rows)


def no_mask_for_packed_rows(*args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
    """Of `AttentionMaskInterface`: None where nothing is padded, for each example's own call is causal; else the mask that sdpa gets."""
    return None if attention_mask is None else sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


class _Side(NamedTuple):
    """The packed row of a decoder or an encoder."""

    starts: torch.Tensor
    """int32 [examples + 1]"""
    longest: int | None

    def lengths(self) -> list[int]:
        return self.starts.diff().tolist()


def per_example_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    sliding_window: int | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a packed row within each example: [1, tokens, heads, size].

    `query` [1, heads, tokens, size]; `key` and `value` may have fewer heads. `cu_seq_lens_*` [examples + 1] is where each example
    begins, and the end (`k`: by default as `q`); without it this is transformers' own sdpa. `position_bias` [1, heads, n, m], of
    at least the longest example, is added to each example's scores from its own first token on. Raises ValueError for attention
    that it cannot do (soft caps, sinks).
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            sliding_window=sliding_window, position_bias=position_bias, **kwargs,
        )  # fmt: skip
    _refuse_unknown(query, attention_mask, kwargs)
    decoder = _Side(cu_seq_lens_q, max_length_q)
    encoder = decoder if cu_seq_lens_k is None else _Side(cu_seq_lens_k, max_length_k)
    causal, asking, asked = _sides(module, decoder, encoder)
    if sliding_window is not None and not causal:
        raise ValueError("per-example attention has no sliding window that looks both ways")
    if dropout == 0.0 and position_bias is None and _has_varlen(query, value):
        return _varlen(query, key, value, scaling, asking, asked, causal, sliding_window), None
    return _one_by_one(query, key, value, dropout, scaling, asking, asked, causal, sliding_window, position_bias), None


@torch.compiler.disable
def _one_by_one(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    scaling: float | None,
    asking: _Side,
    asked: _Side,
    causal: bool,
    window: int | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """A call for each example. Never compiled: each row has other lengths, and a graph would be made for each."""
    rows, columns = asking.lengths(), asked.lengths()
    bias = _seen_only(bias, max(rows), max(columns), causal, window)
    pieces = [
        _one(q, k, v, dropout, scaling, causal, window, bias)
        for q, k, v in zip(query.split(rows, 2), key.split(columns, 2), value.split(columns, 2), strict=True)
    ]
    return torch.cat(pieces, 2).transpose(1, 2).contiguous()


def _sides(module: torch.nn.Module, decoder: _Side, encoder: _Side) -> tuple[bool, _Side, _Side]:
    """Whether `module` looks back only, whose tokens ask and whose are asked, by the marks that transformers' own kernels read."""
    if getattr(module, "is_causal", True):
        return True, decoder, decoder
    return False, decoder if getattr(module, "is_decoder", False) else encoder, encoder


def _seen_only(
    bias: torch.Tensor | None, rows: int, columns: int, causal: bool, window: int | None
) -> torch.Tensor | None:
    """`bias` of the longest example, minus infinity where nothing may be seen. One value for all changes no softmax: None."""
    if bias is None or bias.numel() == 1:
        return None
    bias = bias[..., :rows, :columns]
    return bias.masked_fill(~_band(rows, window, bias.device), -torch.inf) if causal else bias


def _refuse_unknown(query: torch.Tensor, attention_mask: torch.Tensor | None, kwargs: dict[str, Any]) -> None:
    unknown = [name for name in _UNKNOWN if kwargs.get(name) is not None]
    if attention_mask is not None:
        unknown.append("attention_mask")
    if kwargs.get("is_causal") is False:
        unknown.append("is_causal=False")
    if unknown:
        raise ValueError(f"per-example attention has no {', '.join(unknown)}")
    if query.shape[0] != 1:
        raise ValueError(f"per-example attention takes one flattened row, not {query.shape[0]}")


def _one(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    scaling: float | None,
    causal: bool,
    window: int | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """One example alone. A window only matters where the example is longer than it."""
    own, dtype = query.shape[2], query.dtype
    if _faster_in_fp32(query):
        query, key, value = query.float(), key.float(), value.float()
    elif causal and bias is None and _compiled_by_size(query):
        query, key, value = (pad(tensor, (0, 0, 0, -own % _EVEN)) for tensor in (query, key, value))
    length = query.shape[2]
    mask = _band(length, window, query.device) if window is not None and length > window else None
    if bias is not None:
        mask = bias[..., :length, : key.shape[2]].to(query.dtype)
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal and mask is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )[:, :, :own].to(dtype)


def _faster_in_fp32(query: torch.Tensor) -> bool:
    """Whether a CPU does better in fp32: its bf16 kernel takes a millisecond for the shortest example, fp32 a tenth of that.

    Measured on cores with AMX, forward and backward: even at 512 tokens of 32 per head, or 192 of 128; slower beyond.
    """
    small = query.shape[2] * query.shape[3] <= FP32_ELEMENTS
    return small and query.dtype is torch.bfloat16 and not query.is_cuda


def _compiled_by_size(query: torch.Tensor) -> bool:
    """Whether a processor's library compiles the products in 16 bits for each length that it meets, some milliseconds each."""
    return query.itemsize == 2 and not query.is_cuda


def _band(length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """bool [length, length]: each position sees itself and the `window - 1` before it, or all."""
    ones = torch.ones(length, length, dtype=torch.bool, device=device)
    return ones.tril() if window is None else ones.tril().triu(1 - window)


def _has_varlen(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether torch's own flash attention over `cu_seq_lens` runs here: 16 bits, heads of equal size up to 256, Ampere or newer."""
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] == value.shape[-1] <= 256
        and query.shape[-1] % 8 == 0
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    asking: _Side,
    asked: _Side,
    causal: bool,
    window: int | None,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (tensor.squeeze(0).transpose(0, 1).contiguous() for tensor in (query, key, value))
    # A window of n here is the position itself and n before it.
    left = -1 if window is None else window - 1
    result = varlen_attn(
        q,
        k,
        v,
        asking.starts,
        asked.starts,
        asking.longest or max(asking.lengths()),
        asked.longest or max(asked.lengths()),
        scale=scaling,
        window_size=(left, 0 if causal else -1),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(result, torch.Tensor)
    return result[None]
