"""Per-example attention against plain attention under a block mask: values and gradients, windows, shared heads."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from dstune.model import per_example
from dstune.model.per_example import per_example_attention

LENGTHS = (5, 1, 9, 17)


def block_mask(window: int | None) -> torch.Tensor:
    owner = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    at = torch.arange(sum(LENGTHS))
    mask = (owner[:, None] == owner[None]) & (at[:, None] >= at[None])
    return mask & (at[:, None] - at[None] < window) if window is not None else mask


def inputs(heads: int, shared: int, dtype: torch.dtype, device: str = "cpu") -> list[torch.Tensor]:
    torch.manual_seed(0)
    tokens = sum(LENGTHS)
    shapes = [(1, heads, tokens, 16), (1, shared, tokens, 16), (1, shared, tokens, 16)]
    return [torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for shape in shapes]


def starts(device: str = "cpu") -> torch.Tensor:
    return torch.tensor([0, *LENGTHS], device=device).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("window", [None, 4, 100])
@pytest.mark.parametrize(("heads", "shared"), [(4, 4), (4, 2), (4, 1)])
def test_equal_to_attention_under_a_block_mask(window, heads, shared):
    tensors = inputs(heads, shared, torch.float64)
    weight = torch.randn(1, sum(LENGTHS), heads, 16, dtype=torch.float64)
    ours, none = per_example_attention(
        torch.nn.Module(), *tensors, None, scaling=0.3, cu_seq_lens_q=starts(), max_length_q=17, sliding_window=window
    )
    q, k, v = tensors
    repeated = (k.repeat_interleave(heads // shared, 1), v.repeat_interleave(heads // shared, 1))
    theirs = scaled_dot_product_attention(q, *repeated, attn_mask=block_mask(window), scale=0.3).transpose(1, 2)
    assert none is None and ours.is_contiguous()
    assert torch.allclose(ours, theirs, atol=1e-12)
    mine = torch.autograd.grad((ours * weight).sum(), tensors)
    wanted = torch.autograd.grad((theirs * weight).sum(), tensors)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(mine, wanted, strict=True))


SOURCE_LENGTHS = (3, 12, 1, 6)


def block(rows: tuple[int, ...], columns: tuple[int, ...], causal: bool) -> torch.Tensor:
    masks = [torch.ones(r, c, dtype=torch.bool) for r, c in zip(rows, columns, strict=True)]
    return torch.block_diag(*(mask.tril() if causal else mask for mask in masks)).bool()


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(
    ("part", "causal", "decoder"), [("encoder", False, False), ("decoder", True, True), ("across", False, True)]
)
def test_pairs_attend_as_under_a_block_mask(part, causal, decoder, biased):
    """An encoder both ways, a decoder back, and across; a bias is the same from each example's first token on."""
    torch.manual_seed(0)
    rows = LENGTHS if decoder else SOURCE_LENGTHS
    columns = LENGTHS if causal else SOURCE_LENGTHS
    q, k, v = (torch.randn(1, 4, sum(n), 16, dtype=torch.float64, requires_grad=True) for n in (rows, columns, columns))
    table = torch.randn(1, 4, max(rows), max(columns), dtype=torch.float64, requires_grad=True)
    module = torch.nn.Module()
    module.is_causal, module.is_decoder = causal, decoder
    ours, _ = per_example_attention(
        module, q, k, v, None, scaling=0.3, position_bias=table if biased else None,
        cu_seq_lens_q=starts(), max_length_q=17,
        cu_seq_lens_k=torch.tensor([0, *SOURCE_LENGTHS]).cumsum(0).to(torch.int32), max_length_k=12,
    )  # fmt: skip
    blocks = torch.zeros(1, 4, sum(rows), sum(columns), dtype=torch.float64)
    if biased:
        blocks = torch.stack(
            [
                torch.block_diag(*(table[0, head, :r, :c] for r, c in zip(rows, columns, strict=True)))
                for head in range(4)
            ]
        )[None]
    mask = blocks.masked_fill(~block(rows, columns, causal), -torch.inf)
    theirs = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3).transpose(1, 2)
    assert torch.allclose(ours, theirs, atol=1e-12)
    weight = torch.randn_like(ours)
    wanted = [q, k, v, table] if biased else [q, k, v]
    mine = torch.autograd.grad((ours * weight).sum(), wanted)
    expected = torch.autograd.grad((theirs * weight).sum(), wanted)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(mine, expected, strict=True))


def test_a_window_that_looks_both_ways_is_refused():
    module = torch.nn.Module()
    module.is_causal = False
    with pytest.raises(ValueError, match="both ways"):
        per_example_attention(module, *inputs(4, 4, torch.float32), None, cu_seq_lens_q=starts(), sliding_window=4)


@pytest.mark.parametrize("argument", [{"softcap": 50.0}, {"s_aux": torch.zeros(4)}, {"is_causal": False}])
def test_attention_it_cannot_do_is_refused(argument):
    with pytest.raises(ValueError, match="per-example attention has no"):
        per_example_attention(
            torch.nn.Module(), *inputs(4, 4, torch.float32), None, cu_seq_lens_q=starts(), max_length_q=17, **argument
        )


def test_more_than_one_row_is_refused():
    tensors = [tensor.expand(2, -1, -1, -1) for tensor in inputs(4, 4, torch.float32)]
    with pytest.raises(ValueError, match="one flattened row"):
        per_example_attention(torch.nn.Module(), *tensors, None, cu_seq_lens_q=starts(), max_length_q=17)


def test_without_starts_it_is_plain_causal_attention():
    tensors = inputs(4, 4, torch.float32)
    ours, _ = per_example_attention(torch.nn.Module(), *tensors, None)
    assert torch.allclose(ours, scaled_dot_product_attention(*tensors, is_causal=True).transpose(1, 2))


def test_registering_twice_does_no_harm():
    per_example.register()
    per_example.register()
    assert AttentionInterface()[per_example.PER_EXAMPLE] is per_example_attention


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch's varlen_attn")
@pytest.mark.parametrize("window", [None, 4])
def test_flash_attention_on_a_gpu_equals_the_cpu(window):
    tensors = inputs(4, 2, torch.bfloat16, "cuda")
    arguments = {"scaling": 0.3, "max_length_q": 17, "sliding_window": window}
    ours, _ = per_example_attention(torch.nn.Module(), *tensors, None, cu_seq_lens_q=starts("cuda"), **arguments)
    on_cpu = [tensor.detach().float().cpu() for tensor in tensors]
    theirs, _ = per_example_attention(torch.nn.Module(), *on_cpu, None, cu_seq_lens_q=starts(), **arguments)
    assert torch.allclose(ours.float().cpu(), theirs, atol=2e-2)
    assert all(torch.isfinite(gradient).all() for gradient in torch.autograd.grad(ours.float().sum(), tensors))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch's varlen_attn")
def test_attention_across_on_a_gpu_equals_the_cpu():
    """Targets of `LENGTHS` look at sources of `SOURCE_LENGTHS`, all of each."""
    torch.manual_seed(0)
    module = torch.nn.Module()
    module.is_causal, module.is_decoder = False, True
    tensors = [torch.randn(1, 4, sum(n), 16, dtype=torch.bfloat16) for n in (LENGTHS, SOURCE_LENGTHS, SOURCE_LENGTHS)]
    sources = torch.tensor([0, *SOURCE_LENGTHS]).cumsum(0).to(torch.int32)
    results = [
        per_example_attention(
            module, *(tensor.to(device) for tensor in tensors), None, max_length_q=17, max_length_k=12,
            cu_seq_lens_q=starts(device), cu_seq_lens_k=sources.to(device),
        )[0].float().cpu()
        for device in ("cuda", "cpu")
    ]  # fmt: skip
    assert torch.allclose(*results, atol=2e-2)


@pytest.mark.parametrize("window", [None, 90])
@pytest.mark.parametrize("length", [3, 700, 736])
def test_bf16_examples_short_and_long_agree_with_fp32(length, window):
    """A CPU attends in fp32 where that is faster (short examples), and long ones get an even length: choices of speed, not of result."""
    torch.manual_seed(0)
    tensors = [torch.randn(1, heads, length, 32, dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2, 2)]
    starts = torch.tensor([0, length], dtype=torch.int32)
    told = {"cu_seq_lens_q": starts, "max_length_q": length, "sliding_window": window}
    ours, _ = per_example_attention(torch.nn.Module(), *tensors, None, **told)
    exact = [tensor.detach().float().requires_grad_() for tensor in tensors]
    theirs, _ = per_example_attention(torch.nn.Module(), *exact, None, **told)
    assert ours.dtype is torch.bfloat16 and ours.shape == (1, length, 4, 32)
    assert torch.allclose(ours.float(), theirs, atol=2e-2)
    mine = torch.autograd.grad(ours.float().square().sum(), tensors)
    wanted = torch.autograd.grad(theirs.square().sum(), exact)
    for a, b in zip(mine, wanted, strict=True):
        assert float((a.float() - b).norm() / b.norm()) < 2e-2
