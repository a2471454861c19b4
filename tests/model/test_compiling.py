"""Compiled layers learn what layers learn that are not, under ZeRO-3, whatever the lengths; what cannot be compiled is refused."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dstune.batch import Batch, Share
from dstune.config.adapter import AdapterSection
from dstune.config.schema import ModelSection
from dstune.engine.world import World
from dstune.engine.zero import ZeroEngine
from dstune.errors import ConfigError
from dstune.model import build as model
from dstune.model import compiling, fp8, sequence_parallel
from dstune.model.isolation import packed_inputs
from dstune.model.loss import summed_token_loss
from dstune.model.per_example import PER_EXAMPLE
from dstune.planning.hardware import DEVICES
from tests.engine.tiny import GATHERED, OPTIMIZERS, ds_config
from tests.model.architectures import tiny, tiny_config
from tests.spawn import run_workers

LENGTHS = [(5, 7, 9), (30, 3), (50,), (8, 8, 8, 8), (21, 22)]
"""Of the examples of each step's row: other numbers of other lengths."""
DROPOUT = {"attention_dropout": 0.2}


def losses(world: World, path: Path, change: Any, attention: str = PER_EXAMPLE, **section: Any) -> list[float]:
    """Of a few steps under ZeRO-3, with frozen embeddings and recomputed activations, `change` made to the model before.

    Rows are packed where attention is; else each step has one example of as many tokens.
    """
    config = ds_config(3, zero=GATHERED)
    settings = ModelSection(path=str(path), init="random", activation_checkpointing=True, **section)
    module = model.build(settings, path, attention, 0, config)
    module.get_input_embeddings().weight.requires_grad_(False)
    change(module)
    engine = ZeroEngine(module, lr=1e-2, ds_config=config, world=world, **OPTIMIZERS["adamw"])
    found: list[float] = []
    for step, lengths in enumerate(LENGTHS):
        torch.manual_seed(step)
        examples = [{"input_ids": torch.randint(1, 1000, (1, length))} for length in lengths]
        inputs: dict[str, Any] = packed_inputs(examples)
        ids = inputs["input_ids"]
        if attention != PER_EXAMPLE:
            inputs = {"input_ids": ids}
        logits = engine.module(**inputs, use_cache=False).logits[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:])
        engine.backward(loss, last=True)
        engine.step(1e-2)
        found.append(loss.item())
    return found


def all_ways(path: Path) -> dict[str, Any]:
    from torch._dynamo.utils import counters

    world = World.from_environment()
    world.init()
    graphs: list[int] = []

    def compiled(module: Any) -> None:
        compiling.compile_layers(module, "cpu")
        module.register_forward_pre_hook(lambda *_: graphs.append(counters["stats"]["unique_graphs"]))

    def traced(module: Any) -> None:
        """All of compiling but writing C++, which takes longest."""
        compiling.torch = SimpleNamespace(compile=partial(torch.compile, backend="aot_eager"), ones=torch.ones)
        compiled(module)

    found = {
        "plain": losses(world, path, lambda module: None, "sdpa", dtype="fp32", overrides=DROPOUT),
        "compiled": losses(world, path, compiled, "sdpa", dtype="fp32", overrides=DROPOUT),
        "packed": losses(world, path, lambda module: None),
        "packed, fp8": losses(world, path, lambda module: fp8.multiply_in_fp8(module, torch.device("cpu"))),
        "packed, traced": losses(world, path, traced),
        "graphs": graphs,
    }
    world.close()
    return found


def test_under_zero3_compiled_layers_and_8_bit_products_learn_as_plain_ones(tmp_path):
    """Three layers share what is compiled, rows of other lengths too; embeddings are frozen, so the first layer's input has no gradient."""
    config = tiny_config("llama")
    config.num_hidden_layers = 3
    config.save_pretrained(tmp_path)
    (found,) = run_workers(all_ways, 1, tmp_path)
    assert found["compiled"] == pytest.approx(found["plain"], rel=1e-5)
    assert found["packed, traced"] == pytest.approx(found["packed"], rel=1e-4)
    assert found["packed, fp8"] == pytest.approx(found["packed"], rel=0.01) and found["packed, fp8"] != found["packed"]
    first, second = found["graphs"][: len(LENGTHS)], found["graphs"][len(LENGTHS) :]
    assert first[0] < first[1] == first[-1] and second[0] < second[2] == second[-1], (
        "rows of other lengths were compiled again"
    )


def shared_rows(path: Path, compiled: bool) -> list[float]:
    """This worker's part of the losses, training and validating, of rows that two share under ZeRO-3."""
    world = World.from_environment()
    world.init(60)
    attention = sequence_parallel.register(sequence_parallel.Workers(world.row_group(2)))
    config = ds_config(3, zero=GATHERED)
    section = ModelSection(path=str(path), init="random", dtype="fp32", adapter=AdapterSection(rank=4))
    module = model.build(section, path, attention, 0, config)
    if compiled:
        compiling.torch = SimpleNamespace(compile=partial(torch.compile, backend="aot_eager"), ones=torch.ones)
        compiling.compile_layers(module, "cpu")
    engine = ZeroEngine(module, lr=1e-2, ds_config=config, world=world, **OPTIMIZERS["adamw"])
    found: list[float] = []
    for step, lengths in enumerate(LENGTHS[:2]):
        torch.manual_seed(step)
        inputs = packed_inputs([{"input_ids": torch.randint(1, 1000, (1, length))} for length in lengths])
        row = Batch(inputs, inputs["input_ids"].roll(-1, 1), np.arange(len(lengths)), lengths, sum(lengths))
        piece = Share(world.rank, 2, 2).piece(row, pad_id=0)
        for learning in (True, False):
            engine.module.train(learning)
            with torch.set_grad_enabled(learning):
                loss, _ = summed_token_loss(engine.module, piece)
            found.append(loss.item())
            if learning:
                engine.backward(loss * 2 / row.supervised, last=True)
                engine.step(1e-2)
    world.close()
    return found


@pytest.mark.dist
def test_two_workers_that_share_rows_may_compile_their_layers(tmp_path):
    """With an adapter, whose base is frozen; and in between they validate."""
    tiny_config("llama").save_pretrained(tmp_path)
    plain, compiled = (run_workers(shared_rows, 2, tmp_path, way) for way in (False, True))
    for one, other in zip(compiled, plain, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    assert sum(part[1] for part in plain) < sum(part[0] for part in plain), "nothing was learnt"


@pytest.mark.parametrize("name", ["mixtral", "qwen3_next", "qwen3_5_text"])
def test_layers_that_choose_or_carry_something_over_are_refused(name):
    with pytest.raises(ConfigError, match=r"model.compile.*experts, or a recurrent state"):
        compiling.compile_layers(tiny(name), "cpu")


def test_a_machine_without_compiler_is_told_so_before_training(monkeypatch):
    module = tiny("llama")
    monkeypatch.setenv("CXX", "/nowhere/g++")
    with pytest.raises(ConfigError, match=r"cannot compile: there is no compiler \(/nowhere/g\+\+\)"):
        compiling.compile_layers(module, "cpu")
    assert "forward" not in module.model.layers[0].__dict__
    monkeypatch.setattr(compiling, "find_spec", lambda name: None)
    assert compiling.missing("cuda") == "triton is not installed"


def test_a_plan_says_what_is_compiled_and_rounded(tmp_path):
    tiny_config("llama").save_pretrained(tmp_path)
    section = ModelSection(path=str(tmp_path), compile="layers", fp8=True)
    assert compiling.planned(section, tmp_path).startswith("layers (2 of LlamaDecoderLayer, by torch.compile")
    assert fp8.planned(section, tmp_path, DEVICES["h200"]).startswith("the products of 14 linear maps in the layers")
    assert compiling.planned(ModelSection(path=str(tmp_path)), tmp_path) == "off"
