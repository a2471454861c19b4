"""The summed loss against torch's own cross-entropy over full logits: values and gradients, on one worker and under ZeRO-3."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from dstune.batch import Collator, Share, collate
from dstune.config.schema import ModelSection
from dstune.engine.world import World
from dstune.engine.zero import ZeroEngine
from dstune.errors import ConfigError
from dstune.model.build import build
from dstune.model.kernels.fused_head import FusedLoss
from dstune.model.kernels.linear_cross_entropy import Logits, summed_linear_cross_entropy
from dstune.model.loss import IGNORED, summed_cross_entropy, summed_token_loss
from tests.model.architectures import keep_apart, tiny
from tests.spawn import run_workers
from tests.test_batch import Prepared, Stored


def plain(module: torch.nn.Module, batch) -> torch.Tensor:
    """Full logits, torch's own loss."""
    inputs = dict(batch.inputs)
    if "decoder_input_ids" in inputs:
        inputs["decoder_input_ids"] = inputs["decoder_input_ids"].clone()
        inputs["decoder_input_ids"][:, 0] = module.config.decoder_start_token_id
    logits = module(**inputs, use_cache=False).logits.float()
    return cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED, reduction="sum")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_and_its_gradient_over_several_chunks(dtype):
    torch.manual_seed(0)
    # More rows than one chunk.
    logits = (torch.randn(1100, 50) * 3).to(dtype).requires_grad_()
    targets = torch.randint(0, 50, (1100,))
    ours = summed_cross_entropy(logits, targets) * 0.25
    (gradient,) = torch.autograd.grad(ours, logits)
    exact = logits.detach().double().requires_grad_()
    expected = cross_entropy(exact, targets, reduction="sum") * 0.25
    (wanted,) = torch.autograd.grad(expected, exact)
    assert ours.dtype is torch.float32 and gradient.dtype is dtype
    assert torch.allclose(ours.double(), expected, rtol=1e-5)
    # In bf16 the gradient is rounded once.
    assert torch.allclose(gradient.double(), wanted, rtol=1e-6 if dtype is torch.float32 else 2**-8, atol=1e-7)


def test_the_gradient_is_the_derivative():
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 7, (5,))
    step = torch.zeros_like(logits)
    step[2, 3] = 1e-2
    change = summed_cross_entropy(logits + step, targets) - summed_cross_entropy(logits - step, targets)
    (gradient,) = torch.autograd.grad(summed_cross_entropy(logits, targets), logits)
    assert float(gradient[2, 3]) == pytest.approx(float(change.detach()) / 2e-2, rel=1e-2, abs=1e-4)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "gemma2", "cohere", "mixtral", "bart", "t5"])
@pytest.mark.parametrize("kind", ["packed", "padded"])
def test_every_architecture_gives_its_own_full_loss(name, kind):
    """Scaled and capped logits (Gemma 2, Cohere), tied heads and T5's scale among them."""
    module = tiny(name).eval()
    layout = "seq2seq" if module.config.is_encoder_decoder else kind
    batch = collate(Prepared(), [0, 1], layout, pad_id=0)
    losses, gradients = [], []
    for compute in (lambda: summed_token_loss(module, batch)[0], lambda: plain(module, batch)):
        loss = compute()
        module.zero_grad()
        loss.backward()
        losses.append(loss.detach())
        gradients.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in module.parameters()])
    assert summed_token_loss(module, batch)[1] == batch.supervised == 4
    assert torch.allclose(losses[0], losses[1], rtol=1e-5)
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "mixtral"])
def test_a_row_of_even_length_has_the_loss_and_the_gradients_of_its_examples(name):
    module = keep_apart(tiny(name)).eval()
    found = []
    for batch in (
        collate(Prepared(), [0, 1], "packed", pad_id=0),
        Collator(Prepared(), "packed", 0, Share(0, 1), torch.device("cpu"))([0, 1]),
    ):
        loss, count = summed_token_loss(module, batch)
        module.zero_grad()
        loss.backward()
        assert count == 4
        found.append((loss.detach(), [torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters()]))
    (loss, wanted), (even, gradients) = found
    assert torch.allclose(loss, even, rtol=1e-6)
    largest = max(float(gradient.abs().max()) for gradient in wanted)
    for ours, theirs in zip(gradients, wanted, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6 * largest)


@pytest.mark.parametrize("name", ["t5", "mt5", "umt5", "bart"])
def test_packed_pairs_have_the_loss_and_the_gradients_of_padded_ones(name):
    """Rows of several examples, one of them longer than T5's exact distances and, laid end to end, than BART's table."""
    prepared = Pairs()
    losses, gradients = [], []
    for layout, module in (("seq2seq", tiny(name).eval()), ("packed-seq2seq", keep_apart(tiny(name)).eval())):
        batch = collate(prepared, [0, 1], layout, pad_id=0)
        loss, count = summed_token_loss(module, batch)
        loss.backward()
        assert count == batch.supervised and batch.num_examples == len(Pairs.LENGTHS)
        losses.append(loss.detach())
        gradients.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in module.parameters()])
    assert torch.allclose(*losses, rtol=1e-5)
    largest = max(float(gradient.abs().max()) for gradient in gradients[0])
    for theirs, ours in zip(*gradients, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5 * largest)


class Pairs(Prepared):
    """Six pairs in two rows, of these source and target lengths."""

    LENGTHS = ((55, 3), (4, 20), (9, 1), (30, 8), (1, 5), (17, 40))

    def __init__(self) -> None:
        draw = np.random.RandomState(3)
        self.examples = [
            Stored(draw.randint(3, 1000, source + target).astype(np.int32), np.arange(source + target) >= source)
            for source, target in self.LENGTHS
        ]
        self.rows = [np.array([0, 3, 1], np.int32), np.array([5, 2, 4], np.int32)]


@pytest.mark.parametrize("name", ["llama", "mixtral", "t5"])
@pytest.mark.parametrize("kind", ["packed", "padded"])
def test_a_batch_of_padding_rows_costs_nothing(name, kind):
    module = tiny(name)
    layout = kind
    if module.config.is_encoder_decoder:
        layout = "packed-seq2seq" if kind == "packed" else "seq2seq"
        module = keep_apart(module) if kind == "packed" else module
    loss, count = summed_token_loss(module, collate(Prepared(), [None], layout, pad_id=0))
    assert count == 0 and loss.item() == 0.0 and loss.requires_grad
    loss.backward()
    assert all(p.grad is None or float(p.grad.abs().max()) == 0.0 for p in module.parameters())


@pytest.mark.parametrize(("name", "start"), [("t5", 0), ("bart", 2)])
def test_a_decoder_begins_with_its_models_own_token(name, start):
    """As the model itself does with labels: T5 begins with its padding, BART with its end of sequence."""
    module = tiny(name).eval()
    assert module.config.decoder_start_token_id == start
    batch = collate(Prepared(), [1], "seq2seq", pad_id=9)
    own = module(input_ids=batch.inputs["input_ids"], labels=batch.targets).loss * batch.supervised
    assert torch.allclose(summed_token_loss(module, batch)[0], own)
    module.config.decoder_start_token_id = module.config.bos_token_id = None
    with pytest.raises(ConfigError, match="decoder_start_token_id"):
        summed_token_loss(module, batch)


def test_only_supervised_positions_reach_the_head():
    module = tiny("llama")
    rows: list[int] = []
    module.lm_head.register_forward_hook(lambda head, inputs, output: rows.append(inputs[0].numel() // 32))
    summed_token_loss(module, collate(Prepared(), [0, 1], "packed", pad_id=0))
    assert rows == [4]


def test_without_gradients_there_are_none():
    module = tiny("llama")
    with torch.no_grad():
        loss, _ = summed_token_loss(module, collate(Prepared(), [0], "packed", pad_id=0))
    assert not loss.requires_grad


CASES = {"llama": 3, "llama-tied": 3, "builtin:tiny-t5": 3, "gpt2": 2}


def partitioned_norms(folder: Path) -> dict[str, list[float]]:
    """Gradient norms of a step with the plain and of one with the fused loss; worker 1 has nothing but a padding row."""
    world = World.from_environment()
    world.init()
    found: dict[str, list[float]] = {}
    for name, stage in CASES.items():
        ds_config = {"zero_optimization": {"stage": stage}}
        path = name if name.startswith("builtin:") else str(folder / name)
        pairs = name.startswith("builtin:")
        module = build(ModelSection(path=path, dtype="fp32"), Path(), "per-example" if pairs else "sdpa", 1, ds_config)
        engine = ZeroEngine(
            module, lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, ds_config=ds_config, world=world
        )
        layout = "packed-seq2seq" if pairs else "packed"
        shares = [[0, 1], [None, None]][world.rank]
        found[name] = []
        for compute in (summed_token_loss, FusedLoss(module, summed_linear_cross_entropy, Logits())):
            for number, row in enumerate(shares):
                batch = collate(Prepared(), [row], layout, pad_id=0)
                loss, _ = compute(engine.module, batch)
                engine.backward(loss * world.world_size, last=number == len(shares) - 1)
            found[name].append(engine.step(0.0).grad_norm)
    return found


@pytest.mark.dist
def test_gradients_under_zero_are_those_of_the_whole_batch_on_one_worker(tmp_path):
    expected: dict[str, float] = {}
    World().init()
    for name in CASES:
        if name.startswith("builtin:"):
            module = build(
                ModelSection(path=name, dtype="fp32"), Path(), "sdpa", 1, {"zero_optimization": {"stage": 1}}
            )
        else:
            module = tiny(name)
            module.save_pretrained(tmp_path / name)
        layout = "seq2seq" if module.config.is_encoder_decoder else "padded"
        plain(module.train(), collate(Prepared(), [0, 1], layout, pad_id=0)).backward()
        expected[name] = float(torch.stack([p.grad.norm() for p in module.parameters() if p.grad is not None]).norm())
    torch.distributed.destroy_process_group()
    for found in run_workers(partitioned_norms, 2, tmp_path):
        for name, norm in expected.items():
            assert found[name] == pytest.approx([norm, norm], rel=1e-4), name


def test_a_model_without_logits_to_keep_is_read_in_full():
    """Foreign models may take no more than input ids."""

    class Foreign(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(50, 50)

        def forward(self, input_ids: torch.Tensor, use_cache: bool = True) -> SimpleNamespace:
            return SimpleNamespace(logits=self.table(input_ids))

    module = Foreign()
    batch = collate(Prepared(), [0, 1], "packed", pad_id=0)
    rows = batch.targets != IGNORED
    wanted = cross_entropy(module.table(batch.inputs["input_ids"])[rows], batch.targets[rows], reduction="sum")
    assert torch.allclose(summed_token_loss(module, batch)[0], wanted)
