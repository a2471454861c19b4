"""AdamW in 8 bits learns what AdamW learns; which parameters keep fp32; small gradients beside large ones do not explode."""

import torch

from dstune.engine.adamw8bit import AdamW8bit
from dstune.engine.blockwise import Blocks
from dstune.engine.optimizers import Settings, rule_of
from dstune.engine.partitions import Piece
from tests.engine import tiny

RULE = rule_of(Settings(name="adamw8bit", betas=(0.9, 0.999), eps=1e-8))


def _placed(flat: torch.Tensor, pieces: list[Piece], lr: float) -> AdamW8bit:
    group = {"params": [flat], "weight_decay": 0.0, "kind": "hidden"}
    optimizer = RULE.build([group], lr)
    assert isinstance(optimizer, AdamW8bit)
    RULE.prepare(optimizer, flat, group, pieces)
    optimizer.place({flat: pieces}, flat.device)
    return optimizer


def test_it_learns_what_adamw_learns() -> None:
    """A regression in two matrices, of which this worker's pieces begin within a row, and padding behind them."""
    generator = torch.Generator().manual_seed(0)
    target, inputs = torch.randn(64, 100, generator=generator), torch.randn(200, 100, generator=generator)
    pieces = [Piece("a", (64, 100), 130, 6270, 0), Piece("b", (3, 100), 7, 200, 6270)]
    losses: dict[str, list[float]] = {}
    for name in ("8 bits", "32 bits"):
        flat = torch.zeros(6480).requires_grad_()
        optimizer = (
            _placed(flat, pieces, 0.02) if name == "8 bits" else torch.optim.AdamW([flat], lr=0.02, weight_decay=0)
        )
        losses[name] = []
        for _ in range(150):
            found = torch.cat([torch.zeros(130), flat[:6270]]).view(64, 100)
            loss = ((found - target) @ inputs.T).square().mean() + flat[6270:6470].square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[name].append(loss.item())
        assert not flat[6470:].any()
    ours, theirs = (torch.tensor(losses[name]) for name in ("8 bits", "32 bits"))
    assert theirs[-1] < 0.15 * theirs[0]
    assert (ours / theirs - 1).abs().max() < 0.04 and not torch.equal(ours, theirs)


def test_small_gradients_beside_large_ones_do_not_explode() -> None:
    """Of one block, one number's gradient is a million times the others', which fall to zero half the way: no step exceeds AdamW's own."""
    lr = 1e-3
    flat = torch.zeros(256).requires_grad_()
    optimizer = _placed(flat, [Piece("a", (16, 16), 0, 256, 0)], lr)
    for step in range(40):
        before = flat.detach().clone()
        flat.grad = torch.full((256,), 1e-4 if step < 20 else 0.0)
        flat.grad[17] = 100.0
        optimizer.step()
        assert (flat.detach() - before).abs().max() < 1.5 * lr


def test_embeddings_vectors_and_small_matrices_keep_fp32() -> None:
    module = tiny.build()
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = RULE.groups(module, 0.1)
    kinds = {names[id(one)]: group["kind"] for group in groups for one in group["params"]}
    layer = "model.layers.0"
    assert kinds["model.embed_tokens.weight"] == kinds[f"{layer}.self_attn.k_proj.weight"] == "matrix"
    assert kinds["model.norm.weight"] == "vector"
    assert (
        kinds["lm_head.weight"]
        == kinds[f"{layer}.mlp.up_proj.weight"]
        == kinds[f"{layer}.self_attn.q_proj.weight"]
        == "hidden"
    )
    for group in groups:
        optimizer = torch.optim.SGD([flat := torch.zeros(10)])
        RULE.prepare(optimizer, flat, group, [Piece("a", (10, 1), 0, 10, 0)])
        kept = optimizer.state[flat]["exp_avg"]
        assert isinstance(kept["a"], Blocks) if group["kind"] == "hidden" else kept.dtype is torch.float32
