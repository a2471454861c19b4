"""A feed-forward layer that takes its tokens tile by tile gives the same loss and gradients, and keeps less for the backward pass."""

from typing import Any

import pytest
import torch

from dstune.engine.world import World
from dstune.errors import ConfigError
from dstune.model import tiling
from tests.engine import tiny as engines
from tests.model.architectures import tiny
from tests.spawn import run_workers


@pytest.mark.parametrize(
    ("kind", "layers"),
    [
        ("llama", ["model.layers.0.mlp", "model.layers.1.mlp"]),
        ("gemma2", ["model.layers.0.mlp", "model.layers.1.mlp"]),
        ("gpt2", ["transformer.h.0.mlp", "transformer.h.1.mlp"]),
        ("t5", [f"{side}.block.{n}.layer.{k}.DenseReluDense" for side, k in (("encoder", 1), ("decoder", 2)) for n in range(2)]),
        ("mixtral", []),
        ("bart", []),
    ],
)  # fmt: skip
def test_feed_forward_layers_are_found_by_their_build(kind: str, layers: list[str]) -> None:
    assert tiling.feed_forwards(tiny(kind)) == layers


def test_an_architecture_without_such_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.mlp_tile: no feed-forward layer of BartForConditionalGeneration"):
        tiling.tile(tiny("bart"), 8)


def _kept_bytes(module: torch.nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, int]:
    kept: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        logits = module(input_ids=ids, use_cache=False).logits
    return logits, sum(kept.values())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_logits_and_gradients_are_the_same_and_less_is_kept(kind: str) -> None:
    plain, tiled = tiny(kind).train(), tiny(kind).train()
    ids = torch.randint(0, 1000, (3, 21), generator=torch.Generator().manual_seed(0))
    tiling.tile(tiled, 8)
    seen: list[int] = []
    inner = next(part for name, part in tiled.named_modules() if name.endswith(("gate_proj", "c_fc")))
    inner.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].shape[-2]))
    expected, kept_plain = _kept_bytes(plain, ids)
    logits, kept = _kept_bytes(tiled, ids)
    assert torch.allclose(logits, expected, atol=1e-6) and kept < 0.8 * kept_plain
    assert seen == [8] * 7 + [7]
    for one in (expected, logits):
        one.logsumexp(-1).sum().backward()
    for (name, a), b in zip(plain.named_parameters(), tiled.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-5), name
    assert len(seen) == 16


def test_by_itself_a_tile_has_as_many_tokens_as_the_layer_is_wide() -> None:
    module: Any = tiny("llama")
    tiling.tile(module, "auto")
    seen: list[int] = []
    module.model.layers[0].mlp.up_proj.register_forward_hook(
        lambda _module, inputs, _output: seen.append(inputs[0].shape[1])
    )
    module(input_ids=torch.zeros(1, 35, dtype=torch.long), use_cache=False)
    assert seen == [32, 3]


CASES: dict[str, list[dict[str, Any]]] = {
    "qwen2": [{}, {"mlp_tile": 7}, {"mlp_tile": 7, "activation_checkpointing": True}],
    "qwen2-lora": [{}, {"mlp_tile": 7, "activation_checkpointing": "offload"}],
    "t5": [{}, {"mlp_tile": "auto"}],
}


def _losses() -> dict[str, list[list[float]]]:
    world = World.from_environment()
    world.init(60)
    found: dict[str, list[list[float]]] = {}
    for name, cases in CASES.items():
        kind, _, adapter = name.partition("-")
        found[name] = []
        for settings in cases:
            engine = engines.engine(
                world, 3, kind=kind, adapter=bool(adapter), dtype="fp32", zero=engines.GATHERED, settings=settings
            )
            assert bool(engine.leaf_modules) == ("mlp_tile" in settings)
            found[name].append(engines.train(engine, world, range(4)))
    world.close()
    return found


@pytest.mark.dist
def test_two_workers_learn_the_same_with_tiles_and_without() -> None:
    for name, curves in run_workers(_losses, 2)[0].items():
        for curve in curves[1:]:
            assert curve == pytest.approx(curves[0], rel=1e-5), name
        assert curves[0][-1] < curves[0][0]
