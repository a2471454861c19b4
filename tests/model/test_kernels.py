"""Kernels beside what they stand for: the fused loss against fp32 and each model's own logits, what is refused, and who chooses."""

from pathlib import Path
from subprocess import CalledProcessError
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig

from dstune.batch import collate
from dstune.config.schema import ModelSection
from dstune.errors import ConfigError
from dstune.model import build, failures
from dstune.model.adapters import attach
from dstune.model.kernels import choice, fused_head, liger, linear_cross_entropy, proof
from dstune.model.kernels.fused_head import FusedLoss
from dstune.model.kernels.linear_cross_entropy import Logits, summed_linear_cross_entropy
from dstune.model.loss import IGNORED, summed_token_loss
from tests.model.architectures import keep_apart, tiny, tiny_config
from tests.model.test_loss import Pairs
from tests.test_batch import Prepared

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a GPU")
VOCABULARY, WIDTH = 300, 16


def drawn(count: int, dtype: torch.dtype, bias: bool) -> tuple[list[torch.Tensor], torch.Tensor]:
    torch.manual_seed(count)
    shapes = [(count, WIDTH), (VOCABULARY, WIDTH), *([(VOCABULARY,)] if bias else [])]
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes], torch.randint(0, VOCABULARY, (count,))


def reference(given: list[torch.Tensor], targets: torch.Tensor, scale: float, cap: float | None) -> torch.Tensor:
    """torch's own, over all logits."""
    logits = given[0] @ given[1].t()
    if len(given) == 3:
        logits = logits + given[2]
    logits = logits * scale
    return cross_entropy(logits if cap is None else cap * (logits / cap).tanh(), targets, reduction="sum")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bias", "scale", "cap"), [(False, 1.0, None), (True, 0.3, None), (True, 1.0, 3.0)])
@pytest.mark.parametrize("count", [60, 100, 500])
def test_the_fused_loss_and_its_gradients_are_those_of_all_logits(dtype, bias, scale, cap, count, monkeypatch):
    """60 and 100 are one chunk, 100 with the weight's gradient in its memory, 500 are several: 16 bits are no further off than plain."""
    tokens = 120 if dtype is torch.float32 else 100
    monkeypatch.setattr(linear_cross_entropy, "_CHUNK_BYTES", tokens * VOCABULARY * dtype.itemsize)
    monkeypatch.setattr(linear_cross_entropy, "_BLOCK_BYTES", 140 * WIDTH * 2)  # does not divide 300 rows
    given, targets = drawn(count, dtype, bias)
    exact = [one.detach().double().requires_grad_() for one in given]
    wanted = reference(exact, targets, scale, cap)
    upstream = 1 / 37  # not a power of two: scaling is seen
    gradients = torch.autograd.grad(wanted * upstream, exact)
    bare = [one.detach().requires_grad_() for one in given]
    plain = torch.autograd.grad(reference(bare, targets, scale, cap) * upstream, bare)
    loss = summed_linear_cross_entropy(given[0], given[1], given[2] if bias else None, targets, Logits(scale, cap))
    found = torch.autograd.grad(loss * upstream, given)
    assert count != 100 or found[1].untyped_storage().nbytes() == 128 * VOCABULARY * dtype.itemsize
    assert loss.dtype is torch.float32
    assert torch.allclose(loss.double(), wanted, rtol=1e-5 if dtype is torch.float32 else 2e-3)
    for ours, theirs, right in zip(found, plain, gradients, strict=True):
        error, allowed = ((one.double() - right).norm() / right.norm() for one in (ours, theirs))
        assert ours.dtype is dtype
        assert error <= max(1.1 * allowed, 1e-6)


def test_the_weights_gradient_is_summed_in_fp32(monkeypatch):
    """Of 4,000 small parts in bf16, a sum in bf16 stops growing where a part is below its last digit."""
    monkeypatch.setattr(linear_cross_entropy, "_CHUNK_BYTES", 1)
    monkeypatch.setattr(
        linear_cross_entropy, "_chunks", lambda count, weight, summed: [slice(i, i + 8) for i in range(0, count, 8)]
    )
    hidden = torch.full((4000, 4), 1.0).bfloat16()
    weight = torch.zeros(8, 4).bfloat16().requires_grad_()
    targets = torch.zeros(4000, dtype=torch.long)
    (gradient,) = torch.autograd.grad(summed_linear_cross_entropy(hidden, weight, None, targets, Logits()), weight)
    assert torch.allclose(gradient[0].float(), torch.tensor(-3500.0), rtol=2**-8)
    assert torch.allclose(gradient[1:].float(), torch.tensor(500.0), rtol=2**-8)


def test_no_tokens_cost_nothing_and_reach_every_gradient():
    given, targets = drawn(0, torch.bfloat16, True)
    loss = summed_linear_cross_entropy(given[0], given[1], given[2], targets, Logits())
    found = torch.autograd.grad(loss, given)
    assert loss.item() == 0.0 and [one.shape for one in found] == [one.shape for one in given]
    assert all(float(one.abs().sum()) == 0.0 for one in found)


def test_what_learns_nothing_is_not_computed():
    given, targets = drawn(5, torch.float32, False)
    with torch.no_grad():
        loss = summed_linear_cross_entropy(given[0], given[1], None, targets, Logits())
    assert not loss.requires_grad and torch.allclose(loss, reference(given, targets, 1.0, None))
    frozen = summed_linear_cross_entropy(given[0], given[1].detach(), None, targets, Logits())
    (alone,) = torch.autograd.grad(frozen, given[:1])
    (both, _) = torch.autograd.grad(reference(given, targets, 1.0, None), given)
    assert torch.allclose(alone, both, atol=1e-5)


def both_ways(module: torch.nn.Module, batch, fused: FusedLoss) -> list[tuple[torch.Tensor, list[torch.Tensor]]]:
    found = []
    for compute in (fused, summed_token_loss):
        loss, count = compute(module, batch)
        assert count == batch.supervised
        module.zero_grad()
        loss.backward()
        found.append(
            (loss.detach(), [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in module.parameters()])
        )
    return found


CASES = [
    "llama",
    "llama-tied",
    "gpt2",
    "gemma2",
    "gemma3_text",
    "cohere",
    "granite",
    "mixtral",
    "phi",
    "bart",
    "t5",
    "mt5",
    "umt5",
    "recurrent_gemma",
]


@pytest.mark.parametrize("name", CASES)
def test_every_architecture_trains_with_a_fused_head_as_without(name):
    """Scaled and capped logits (Gemma 2, Cohere, Granite), biases (Phi, BART), tied heads, T5's scale; packed rows."""
    module = tiny(name).eval()
    if name == "bart":
        module.final_logits_bias.normal_()
    packed = "packed-seq2seq" if module.config.is_encoder_decoder else "packed"
    if name == "recurrent_gemma":
        packed = "padded"
    batch = collate(Pairs() if packed == "packed-seq2seq" else Prepared(), [0, 1], packed, pad_id=0)
    module = keep_apart(module) if packed == "packed-seq2seq" else module
    logits = proof.prove(module.config, summed_linear_cross_entropy, "cpu")
    assert isinstance(logits, Logits), logits
    (ours, mine), (theirs, wanted) = both_ways(module, batch, FusedLoss(module, summed_linear_cross_entropy, logits))
    assert torch.allclose(ours, theirs, rtol=1e-5)
    largest = max(float(one.abs().max()) for one in wanted)
    for a, b in zip(mine, wanted, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * largest)
    assert "forward" not in module.get_output_embeddings().__dict__ and not module._forward_hooks


def test_a_config_whose_decoder_has_a_vocabulary_and_a_start_of_its_own_is_made_small():
    """Marian's, of which the last token is padding and the decoder's first."""
    last = {"vocab_size": 1000, "decoder_vocab_size": 1000, "pad_token_id": 999, "decoder_start_token_id": 999}
    found = proof.prove(AutoConfig.for_model("marian", **last), summed_linear_cross_entropy, "cpu")
    assert isinstance(found, Logits), found


def test_the_head_sees_supervised_tokens_and_the_model_no_logits():
    module, seen = tiny("llama"), []

    def counting(hidden, weight, bias, targets, logits):
        seen.append(hidden.shape)
        return summed_linear_cross_entropy(hidden, weight, bias, targets, logits)

    FusedLoss(module, counting, Logits())(module, collate(Prepared(), [0, 1], "padded", pad_id=0))
    assert seen == [(4, 32)]
    logits = module(input_ids=torch.tensor([[1, 2, 3]])).logits  # as ever, outside of the loss
    assert logits.shape == (1, 3, 1000)


def test_a_processors_products_have_even_numbers_of_rows():
    """Whatever number of tokens there is: its library compiles and keeps one for each number that it meets."""

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
                seen.update(size for matrix in args if matrix.dim() == 2 for size in matrix.shape)
            return func(*args, **(kwargs or {}))

    seen: set[int] = set()
    weight = torch.randn(512, 96, dtype=torch.bfloat16, requires_grad=True)
    for count in (1, 63, 64, 65, 331):
        hidden = torch.randn(count, 96, dtype=torch.bfloat16, requires_grad=True)
        with Sizes():
            summed_linear_cross_entropy(hidden, weight, None, torch.zeros(count).long(), Logits()).backward()
        assert hidden.grad is not None and hidden.grad.shape == (count, 96)
    assert seen == {96, 512, 64, 128, 384}


def test_a_padding_row_costs_nothing_with_a_fused_head():
    module = tiny("llama-tied")
    fused = FusedLoss(module, summed_linear_cross_entropy, Logits())
    loss, count = fused(module, collate(Prepared(), [None], "packed", pad_id=0))
    loss.backward()
    assert count == 0 and loss.item() == 0.0
    assert all(p.grad is not None and float(p.grad.abs().max()) == 0.0 for p in module.parameters())


@pytest.mark.parametrize(
    ("name", "hidden"), [("cohere", "_SCALES"), ("gemma2", "final_logit_softcapping"), ("bart", "_BIAS")]
)
def test_logits_that_are_not_understood_are_left_to_the_model(name, hidden, monkeypatch):
    """A scale, a soft cap and a buffer behind the head that the fused function is not told of."""
    config = tiny_config(name)
    if hidden == "final_logit_softcapping":
        monkeypatch.setattr(proof, "candidates", lambda config: [Logits()])
    else:
        monkeypatch.setattr(fused_head, hidden, () if hidden == "_SCALES" else "no_such_buffer")
    proof._proven.cache_clear()
    reason = proof.prove(config, summed_linear_cross_entropy, "cpu")
    proof._proven.cache_clear()
    assert isinstance(reason, str) and "more to its logits" in reason


def test_a_head_that_is_no_plain_layer_is_refused():
    section = ModelSection.model_validate({"path": "builtin:tiny-llama", "adapter": {"targets": ["lm_head"]}})
    module = tiny("llama")
    assert section.adapter is not None
    attach(module, section.adapter, 0)
    found = choice.chosen(section, module, "cpu")[0]
    assert found.name == "linear-cross-entropy" and not found.on and "no plain linear layer" in found.why
    assert choice.put_in(choice.chosen(section, module, "cpu"), module, "cpu") is summed_token_loss


def section(kernels) -> ModelSection:
    return ModelSection.model_validate({"path": "builtin:tiny-llama", "kernels": kernels})


@pytest.mark.parametrize(
    ("kernels", "on"),
    [
        ("auto", [True, True, True, False]),
        ("off", [False] * 4),
        ([], [False] * 4),
        (["linear-cross-entropy"], [True, False, False, False]),
        ({"linear-cross-entropy": False}, [False, True, True, False]),
    ],
)
def test_the_run_file_turns_kernels_on_and_off(kernels, on):
    choices = choice.planned(section(kernels), Path(), "cpu")
    assert [one.name for one in choices] == ["linear-cross-entropy", "rms-norm", "rotary", "gated-mlp"]
    assert [one.on for one in choices] == on and all(one.why for one in choices)
    module = tiny("llama")
    loss = choice.put_in(choices, module, "cpu")
    assert isinstance(loss, FusedLoss) if on[0] else loss is summed_token_loss


def test_a_kernel_that_is_named_and_cannot_be_had_is_an_error(monkeypatch):
    with pytest.raises(ConfigError, match=r"gated-mlp was asked for: for CUDA only"):
        choice.planned(section(["gated-mlp"]), Path(), "cpu")
    monkeypatch.setattr(liger, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"liger-kernel and triton not installed"):
        choice.planned(section({"rms-norm": True}), Path(), "cuda")
    by_default = choice.planned(section("auto"), Path(), "cuda")
    assert [one.on for one in by_default] == [True, False, False, False]
    assert "pip install liger-kernel" in by_default[1].why


def test_who_plans_touches_no_gpu(monkeypatch):
    """A driver that did would hold half a gigabyte of the first GPU for as long as the run lasts. The worker's model has storage."""
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(liger, "missing", lambda: None)
    monkeypatch.setattr(liger.LigerLayers, "_patch", lambda self, kind: object())
    monkeypatch.setattr(liger, "_disproof", lambda config, layers, device: asked.append(device))
    monkeypatch.setattr(proof, "prove", lambda config, function, device: asked.append(device) or Logits())
    outline = build.skeleton(tiny_config("llama"), section("auto"))
    assert all(one.on for one in choice.chosen(section("auto"), outline, "cuda"))
    assert asked == ["cpu"]
    choice.chosen(section("auto"), tiny("llama"), "cuda")
    assert asked[1:] == ["cuda"] * 4


@pytest.mark.parametrize(("dtype", "frozen"), [(torch.float16, False), (torch.bfloat16, True)])
def test_torch_computes_what_liger_would_get_wrong(dtype, frozen, monkeypatch):
    """Liger gives a head whose hidden states learn nothing no gradient, and loses small derivatives in fp16."""
    monkeypatch.setattr(liger, "importlib", None)
    (hidden, weight), targets = drawn(60, dtype, False)
    hidden = hidden.detach() if frozen else hidden
    learning = [weight] if frozen else [hidden, weight]
    found = torch.autograd.grad(liger.linear_cross_entropy(hidden, weight, None, targets, Logits()), learning)
    wanted = torch.autograd.grad(summed_linear_cross_entropy(hidden, weight, None, targets, Logits()), learning)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_what_liger_is_called_with(monkeypatch):
    """In the places of its forward pass, as of 0.8: input, weight, target, bias, class weights, the token that is none, …"""
    seen = []
    function = SimpleNamespace(apply=lambda *given: seen.append(given) or [torch.zeros(())])
    module = SimpleNamespace(LigerFusedLinearCrossEntropyFunction=function)
    monkeypatch.setattr(liger, "importlib", SimpleNamespace(import_module=lambda name: module))
    (hidden, weight), targets = drawn(60, torch.bfloat16, False)
    liger.linear_cross_entropy(hidden, weight, None, targets, Logits(cap=3.0))
    with torch.no_grad():  # validation
        liger.linear_cross_entropy(hidden.detach(), weight, None, targets, Logits(cap=3.0))
    for given in seen:
        assert torch.equal(given[0], hidden) and given[1] is weight and given[2] is targets
        assert given[3:] == (None, None, IGNORED, 0.0, 0.0, "sum", 3.0, False, torch.float32)
    assert len(seen) == 2


def test_a_kernel_that_triton_cannot_compile_here_is_left_out(monkeypatch):
    """No headers, a cache that cannot be written, a device too small: the run goes on without."""
    too_small = type("OutOfResources", (Exception,), {})
    monkeypatch.setattr(failures, "find_spec", lambda name: object())
    errors = SimpleNamespace(TritonError=too_small)
    monkeypatch.setattr(failures, "importlib", SimpleNamespace(import_module=lambda name: errors))
    for error in (too_small("shared memory"), PermissionError("cache"), CalledProcessError(1, "gcc")):

        def fails(*given, error=error):
            raise error

        proof._proven.cache_clear()
        assert "fails with a fused head" in proof.prove(tiny_config("llama"), fails, "cpu")
    proof._proven.cache_clear()


@needs_gpu
@pytest.mark.skipif(liger.missing() is not None, reason="wants liger-kernel")
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_on_a_gpu_ligers_kernels_change_no_gradient(name):
    module = tiny(name).eval().cuda()
    batch = collate(Prepared(), [0, 1], "packed", pad_id=0).to(torch.device("cuda"))
    wanted = proof.gradients(module, summed_token_loss(module, batch)[0])
    choices = choice.chosen(section("auto"), module, "cuda")
    assert all(one.on for one in choices), choices
    loss = choice.put_in(choices, module, "cuda")
    assert proof.difference(proof.gradients(module, loss(module, batch)[0]), wanted) < 1e-3


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_a_gpu_the_fused_loss_is_the_cpus(dtype, monkeypatch):
    monkeypatch.setattr(linear_cross_entropy, "_CHUNK_BYTES", 50 * VOCABULARY * 2)
    given, targets = drawn(500, dtype, False)
    placed = [one.detach().cuda().requires_grad_() for one in given]
    functions = [summed_linear_cross_entropy] + ([liger.linear_cross_entropy] if liger.missing() is None else [])
    exact = [one.detach().double().requires_grad_() for one in given]
    wanted = torch.autograd.grad(reference(exact, targets, 1.0, 3.0), exact)
    for function in functions:
        loss = function(placed[0], placed[1], None, targets.cuda(), Logits(1.0, 3.0))
        for ours, right in zip(torch.autograd.grad(loss, placed), wanted, strict=True):
            assert float((ours.cpu().double() - right).norm() / right.norm()) < (
                1e-2 if dtype is torch.bfloat16 else 1e-4
            )


def test_targets_that_are_none_are_not_read():
    """-100 never reaches the function."""
    module = tiny("llama")
    batch = collate(Prepared(), [0], "padded", pad_id=0)
    assert bool((batch.targets == IGNORED).any())
    seen = []
    fused = FusedLoss(
        module, lambda h, w, b, t, z: seen.append(t) or summed_linear_cross_entropy(h, w, b, t, z), Logits()
    )
    fused(module, batch)
    assert bool((seen[0] >= 0).all())
