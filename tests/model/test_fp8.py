"""Products in 8-bit floats beside the same numbers multiplied in double precision, and which maps are left alone."""

from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from dstune.config.schema import ModelSection
from dstune.errors import ConfigError
from dstune.model import fp8
from dstune.model.adapters import attach
from tests.model.architectures import tiny


def stands_for(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    rounded = fp8.Rounded.of(tensor, dtype)
    return rounded.values.double() * rounded.scale.double()


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(((found.double() - wanted).norm() / wanted.norm()).detach())


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 1e-3)])
def test_products_and_gradients_are_those_of_the_rounded_numbers(dtype, allowed):
    """21 tokens, no multiple of 16; a gradient a million times smaller than what 8 bits reach without a factor."""
    torch.manual_seed(0)
    rows = (torch.randn(21, 64) * 30).to(dtype).requires_grad_()
    weight = (torch.randn(48, 64) * 0.02).to(dtype).requires_grad_()
    upstream = (torch.randn(21, 48) * 1e-5).to(dtype)
    result: Any = fp8.Multiply.apply(rows, weight)
    of_rows, of_weight = torch.autograd.grad(result, [rows, weight], upstream)
    left, right = stands_for(rows, torch.float8_e4m3fn), stands_for(weight, torch.float8_e4m3fn)
    gradient = stands_for(upstream, torch.float8_e5m2)
    assert result.dtype is of_rows.dtype is of_weight.dtype is dtype
    assert apart(result, left @ right.t()) < allowed
    assert apart(of_weight, gradient.t() @ left) < allowed
    if dtype is not torch.float16:  # in which 1e-7 is no number of many digits
        assert apart(of_rows, gradient @ right) < allowed
    assert apart(result, rows.detach().double() @ weight.detach().double().t()) < 0.05


def test_zeros_stay_zeros_and_what_is_not_finite_is_seen():
    zeros = fp8.Rounded.of(torch.zeros(3, 16), torch.float8_e4m3fn)
    assert float(zeros.values.float().abs().max()) == 0.0 and float(zeros.scale) == 1.0
    for bad in (float("inf"), float("nan")):
        rows = torch.ones(2, 16)
        rows[0, 0] = bad
        result: Any = fp8.Multiply.apply(rows, torch.ones(16, 16))
        assert not bool(torch.isfinite(result).all())


def test_the_maps_of_the_layers_are_rounded_and_no_others():
    """Not the head, no map whose sizes are no multiples of 16, not an adapter's own matrices; biases are added."""
    module: Any = tiny("qwen2")
    module.model.layers[0].mlp.up_proj = nn.Linear(32, 40)
    section = ModelSection.model_validate({"path": "x", "adapter": {"targets": ["q_proj"], "rank": 16}})
    assert section.adapter is not None
    attach(module, section.adapter, 0)
    fp8.multiply_in_fp8(module, torch.device("cpu"))
    rounded = {name for name, part in module.named_modules() if "forward" in part.__dict__}
    assert "model.layers.1.mlp.up_proj" in rounded and "model.layers.0.mlp.up_proj" not in rounded
    assert "model.layers.0.self_attn.q_proj.base_layer" in rounded
    assert not any("lora_" in name or "lm_head" in name or "embed" in name for name in rounded)
    key = module.model.layers[1].self_attn.k_proj
    key.bias.data.fill_(7.0)
    values = torch.randn(2, 3, 32)
    assert torch.allclose(key(values), nn.functional.linear(values, key.weight, key.bias), atol=0.02)


def test_where_there_are_no_8_bit_products_they_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(
        ConfigError, match=r"A100 has compute capability 8.0: 8-bit products begin with compute capability 8.9"
    ):
        fp8.multiply_in_fp8(tiny("llama"), torch.device("cuda"))
    with pytest.raises(ConfigError, match="experts, or a recurrent state"):
        fp8.multiply_in_fp8(tiny("mixtral"), torch.device("cpu"))


def test_a_compiled_layer_holds_its_products_in_one_graph_for_all_lengths():
    """Without a break, and with the same result: what rounds is then compiled together with what stands before."""
    torch._dynamo.reset()
    counters.clear()
    layer = nn.Linear(32, 48)
    plain = fp8._linear(layer)
    compiled = torch.compile(plain, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (21, 32, 7):
        values = torch.randn(tokens, 32).requires_grad_()
        ours, theirs = (
            torch.autograd.grad(run(values).square().sum(), [values, layer.weight]) for run in (compiled, plain)
        )
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert counters["stats"]["unique_graphs"] == 1
