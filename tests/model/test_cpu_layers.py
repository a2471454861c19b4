"""The layers' kernels for a processor beside transformers' own steps: values, gradients, what is kept, and what is left alone."""

from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers.models.cohere2.modeling_cohere2 import Cohere2LayerNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated
from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpTextRMSNorm

from dstune.batch import collate
from dstune.config.schema import ModelSection
from dstune.model.config import load_config
from dstune.model.footprint import footprint
from dstune.model.kernels import blocked_norm, choice, liger, proof, rotation
from dstune.model.kernels.blocked_norm import Formula, rms_norm
from dstune.model.kernels.liger import LigerLayers
from dstune.model.loss import summed_token_loss
from tests.model.architectures import tiny
from tests.test_batch import Prepared

NORMS = {
    LlamaRMSNorm: Formula(),
    Olmo2RMSNorm: Formula(late=True),
    Gemma3RMSNorm: Formula(offset=1.0, late=True),
}


def with_gradients(result: torch.Tensor, given: list[torch.Tensor], upstream: torch.Tensor) -> list[torch.Tensor]:
    return [result.detach(), *torch.autograd.grad(result, given, upstream)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", NORMS)
def test_a_norm_in_blocks_is_no_further_from_the_truth_than_in_steps(kind, dtype, monkeypatch):
    monkeypatch.setattr(blocked_norm, "_CACHED_ELEMENTS", 3 * 32)  # blocks do not divide the rows
    torch.manual_seed(0)
    norm = kind(32, eps=1e-3)
    norm.weight.data = torch.randn(32)
    norm.to(dtype)
    x, upstream = torch.randn(2, 5, 32).to(dtype).requires_grad_(), torch.randn(2, 5, 32).to(dtype)
    exact_x, exact_weight = (one.detach().double().requires_grad_() for one in (x, norm.weight))
    scale = (exact_x.square().mean(-1, keepdim=True) + 1e-3).rsqrt()
    wanted = exact_x * scale * (exact_weight + NORMS[kind].offset)
    right = with_gradients(wanted, [exact_x, exact_weight], upstream.double())
    plain = with_gradients(norm(x), [x, norm.weight], upstream)
    found = with_gradients(rms_norm(x, norm.weight, 1e-3, NORMS[kind]), [x, norm.weight], upstream)
    for ours, theirs, truth in zip(found, plain, right, strict=True):
        error, allowed = (float((one.double() - truth).norm() / truth.norm()) for one in (ours, theirs))
        assert ours.dtype is dtype and error <= max(1.05 * allowed, 1e-6)


def test_of_a_norm_only_what_learns_gets_a_gradient():
    x, weight = torch.randn(4, 8, requires_grad=True), torch.ones(8)
    rms_norm(x, weight, 1e-6, Formula()).sum().backward()
    assert x.grad is not None and weight.grad is None
    rms_norm(x.detach(), weight.requires_grad_(), 1e-6, Formula()).sum().backward()
    assert weight.grad is not None
    assert rms_norm(torch.empty(0, 8), weight, 1e-6, Formula()).shape == (0, 8)


@pytest.mark.parametrize(("kind", "formula"), [*NORMS.items(), (Cohere2LayerNorm, None), (Qwen3NextRMSNormGated, None)])
def test_the_formula_of_a_norm_is_found_by_experiment(kind, formula):
    known = blocked_norm._known(kind)
    assert (None if known is None else known.formula) == formula


def test_a_norm_that_differs_from_others_of_its_class_is_left_alone():
    model = torch.nn.ModuleList([Qwen4ExpTextRMSNorm(64), Qwen4ExpTextRMSNorm(64, group_size=32)])
    assert list(blocked_norm._norms(model)) == [model[0]]


def test_a_norm_of_another_dtype_than_its_input_is_the_models_own():
    norm = LlamaRMSNorm(8, eps=1e-5)
    blocked_norm.put_into(norm)
    assert norm(torch.ones(2, 8).bfloat16()).dtype is torch.float32
    assert norm.double()(torch.ones(2, 8).double().requires_grad_()).sum().backward() is None


def test_what_a_norm_gives_may_be_changed_in_place():
    norm = LlamaRMSNorm(8, eps=1e-5)
    blocked_norm.put_into(norm)
    x = torch.randn(2, 3, 8, requires_grad=True)
    result = norm(x)
    result *= 2.0
    (wanted,) = torch.autograd.grad(2.0 * LlamaRMSNorm(8, eps=1e-5)(x), x, torch.ones(2, 3, 8))
    torch.testing.assert_close(torch.autograd.grad(result, x, torch.ones(2, 3, 8))[0], wanted)


def test_layers_with_kernels_are_compiled_once_for_all():
    module, ids = tiny("llama"), torch.arange(5)[None]
    wanted = module(ids, use_cache=False).logits
    section = ModelSection.model_validate({"path": "x", "kernels": {"linear-cross-entropy": False}})
    choice.put_in(choice.chosen(section, module, "cpu"), module, "cpu")
    torch.compiler.reset()
    counter = CompileCounter()
    for layer in module.model.layers:
        layer.compile(backend=counter, fullgraph=True)
    torch.testing.assert_close(module(ids, use_cache=False).logits, wanted)
    assert counter.frame_count == 1 < len(module.model.layers)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gemma4_text", "mixtral", "phi3"])
def test_on_a_processor_the_layers_kernels_change_no_gradient(name):
    module = tiny(name).eval()
    batch = collate(Prepared(), [0, 1], "packed", pad_id=0)
    wanted = proof.gradients(module, summed_token_loss(module, batch)[0])
    section = ModelSection.model_validate({"path": "x", "kernels": {"linear-cross-entropy": False}})
    choices = choice.chosen(section, module, "cpu")
    turned = name != "gemma4_text"  # calls it once for queries and once for keys
    assert [one.on for one in choices] == [False, True, turned, False]
    loss = choice.put_in(choices, module, "cpu")
    assert proof.difference(proof.gradients(module, loss(module, batch)[0]), wanted) < 1e-5


@pytest.mark.parametrize("shape", [(8, 3), (3, 8)], ids=["heads-first", "tokens-first"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_turned_halves_are_the_models_own(shape, dtype):
    torch.manual_seed(0)
    given = [torch.randn(2, *shape, 16).to(dtype).transpose(1, 2).requires_grad_() for _ in "qk"]
    tokens = given[0].shape[2]
    cos, sin = (torch.randn(2, tokens, 16).to(dtype) for _ in "cs")
    upstream = [torch.randn_like(one) for one in given]
    plain = modeling_llama.apply_rotary_pos_emb

    def both(turn, given, cos, sin, upstream):
        found = turn(*given, cos, sin)
        return [*(one.detach() for one in found), *torch.autograd.grad(found, given, upstream)]

    exact = [one.detach().double().requires_grad_() for one in given]
    right = both(plain, exact, cos.double(), sin.double(), [one.double() for one in upstream])
    found = both(rotation._Turn(plain), given, cos, sin, upstream)
    theirs = both(plain, given, cos, sin, upstream)
    for ours, other, truth in zip(found, theirs, right, strict=True):
        error, allowed = (float((one.double() - truth).norm() / truth.norm()) for one in (ours, other))
        assert ours.dtype is dtype and error <= max(allowed, 1e-6)


def test_rotation_is_put_into_one_model_and_only_where_it_is_known():
    module, other, kernel = tiny("llama"), tiny("llama"), rotation.Rotation()
    plain = modeling_llama.apply_rotary_pos_emb
    assert kernel.find(module, "cpu").works
    kernel.put_in(module, "cpu", summed_token_loss)
    mine, theirs = (model.model.layers[0].self_attn.forward for model in (module, other))
    assert mine.__func__ is not type(mine.__self__).forward
    assert theirs.__func__ is type(theirs.__self__).forward and modeling_llama.apply_rotary_pos_emb is plain
    finding = kernel.find(tiny("cohere"), "cpu")  # turns neighbours, not halves
    assert not finding.works and "none that is known here" in finding.why
    assert "no layer of GPT2LMHeadModel calls" in kernel.find(tiny("gpt2"), "cpu").why


def test_angles_of_another_dtype_are_the_models_own():
    plain = modeling_llama.apply_rotary_pos_emb
    q, k, cos = torch.randn(1, 2, 3, 16), torch.randn(1, 2, 3, 16), torch.randn(1, 3, 16).double()
    for ours, theirs in zip(rotation._Turn(plain)(q, k, cos, cos), plain(q, k, cos, cos), strict=True):
        assert ours.dtype is torch.float64 and torch.equal(ours, theirs)


def test_a_plan_counts_what_is_kept_with_the_kernels_of_its_device():
    model = ModelSection(path="builtin:tiny-llama")
    off = ModelSection.model_validate({"path": "builtin:tiny-llama", "kernels": {"rms-norm": False}})
    plain, less = (footprint(model, Path(), device=device).layer_activations for device in (None, "cpu"))
    assert 0 < less < plain == footprint(off, Path(), device="cpu").layer_activations


def test_of_ligers_gated_layers_what_the_activation_makes_is_not_counted(monkeypatch):
    model = ModelSection(path="builtin:tiny-llama", dtype="bf16")
    monkeypatch.setattr(liger, "missing", lambda: None)
    monkeypatch.setattr(LigerLayers, "_patch", lambda self, kind: self.name == "gated-mlp" or None)
    plain, less = (footprint(model, Path(), device=device).layer_activations for device in (None, "cuda"))
    config = load_config(model, Path())
    assert plain - less == config.intermediate_size * 2


def test_queries_of_fewer_tokens_than_keys_are_the_models_own():
    def sliced(q, k, cos, sin, unsqueeze_dim=1):
        ends = (cos[:, -x.shape[2] :].unsqueeze(unsqueeze_dim) for x in (q, k))
        return tuple(x * end for x, end in zip((q, k), ends, strict=True))

    q, k, cos = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 9, 8)
    assert [x.shape for x in rotation._Turn(sliced)(q, k, cos, cos)] == [q.shape, k.shape]


def test_a_rotation_in_fp32_is_not_made_one_in_16_bits():
    def precise(q, k, cos, sin, unsqueeze_dim=1):
        found = modeling_llama.apply_rotary_pos_emb(*(one.float() for one in (q, k, cos, sin)), unsqueeze_dim)
        return found[0].to(q.dtype), found[1].to(k.dtype)

    assert rotation._is_known(modeling_llama.apply_rotary_pos_emb) and not rotation._is_known(precise)
