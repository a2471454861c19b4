"""Weights on NVMe: put there as a model is built, trained and resumed to the last digit as in memory; frozen ones beside an adapter."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dstune.checkpoint.commit import Intent, commit
from dstune.checkpoint.reader import Reader
from dstune.checkpoint.shard_writer import ShardWriter
from dstune.config.schema import ModelSection
from dstune.engine import leaves
from dstune.engine.parameters import local_piece, on_nvme
from dstune.engine.swapping import require_buffers
from dstune.engine.world import World
from dstune.engine.zero import ZeroEngine
from dstune.errors import ConfigError
from dstune.model import build as model
from dstune.paths import step_directory
from tests.engine import tiny
from tests.spawn import run_workers

STEP = 2
LATER = range(STEP, STEP + 2)
WIDE = {"hidden_size": 512, "intermediate_size": 2048}
"""Pieces below 1 MiB stay in memory: on two workers all but the six matrices of the feed-forward layers."""


def _zero(where: str, disk: Path, **more: int) -> dict[str, Any]:
    if where == "cpu":
        states: dict[str, Any] = {"device": "cpu"}
        weights = states
    else:
        states = {"device": "nvme", "nvme_path": str(disk)}
        weights = {**states, "max_in_cpu": 0, "buffer_count": 2, **more}
    return {"stage": 3, "sub_group_size": 2_000_000, "offload_optimizer": states, "offload_param": weights}


def _engine(world: World, where: str, disk: Path) -> ZeroEngine:
    return tiny.engine(world, 3, zero=_zero(where, disk, buffer_size=1_000_000), sizes=WIDE)


def _lora(world: World, where: str, disk: Path) -> ZeroEngine:
    """Recomputing keeps the three frozen matrices of a layer at once."""
    settings = {"overrides": {**WIDE, "vocab_size": tiny.VOCABULARY}, "activation_checkpointing": True}
    if where == "nvme":
        with pytest.raises(ConfigError, match=r"buffer_count: 2, and .* reads 3 weights at once; expected at least 3"):
            tiny.engine(world, 3, kind="llama", adapter=True, settings=settings, zero=_zero(where, disk))
    return tiny.engine(world, 3, kind="llama", adapter=True, settings=settings, zero=_zero(where, disk, buffer_count=3))


def _digests(module: torch.nn.Module) -> Iterator[tuple[str, float]]:
    for name, parameter in module.named_parameters():
        with local_piece(parameter) as piece:
            weights = torch.arange(1, 1 + len(piece.tensor), dtype=torch.float64)
            yield name, float((piece.tensor.double() * weights).sum())


def _same_pieces(source: Path, disk: Path) -> int:
    """How many weights of a model on NVMe have gone there, each with what it has in memory."""
    section = ModelSection(path=str(source), dtype="bf16")
    in_memory, away = (
        model.build(section, Path(), "sdpa", 0, tiny.ds_config(3, zero=_zero(where, disk))) for where in ("cpu", "nvme")
    )
    assert list(_digests(away)) == list(_digests(in_memory))
    return sum(map(on_nvme, away.parameters()))


def _work(root: Path, source: Path) -> dict[str, Any]:
    world = World.from_environment()
    world.init(60)
    control, disk = world.control(60), root / "disk"
    losses: dict[str, list[str]] = {}
    for where in ("cpu", "nvme"):
        engine = _engine(world, where, disk)
        curve = tiny.train(engine, world, range(STEP))
        if where == "nvme":
            swapped = sum(file.stat().st_size for file in disk.rglob("*param.tensor.swp"))
            intent = Intent(STEP, {"optimizer_steps": engine.optimizer_steps}, {}, {})
            commit(root, intent, ShardWriter(engine.slices).stream, control)
        losses[where] = [repr(loss) for loss in curve + tiny.train(engine, world, LATER)]
    for where in ("cpu", "nvme"):
        engine = _engine(world, where, disk)
        reader = Reader(step_directory(root, STEP))
        engine.load(reader.fill, reader.state["optimizer_steps"])
        losses[f"resumed, {where}"] = [repr(loss) for loss in tiny.train(engine, world, LATER)]
        losses[f"adapter, {where}"] = [repr(loss) for loss in tiny.train(_lora(world, where, disk), world, range(2))]
    with pytest.raises(
        ConfigError, match=r"offload_param\.buffer_count: 2, and .* reads 6 weights at once; expected at least 6"
    ):
        leaves.gather_whole(engine.module.module)
        require_buffers(engine.module.module)
    loaded = _same_pieces(source, disk)
    world.close()
    return {"losses": losses, "swapped": swapped, "loaded": loaded}


@pytest.mark.dist
@pytest.mark.usefixtures("async_io")
def test_weights_on_nvme_learn_what_they_learn_in_memory(tmp_path: Path) -> None:
    source = tmp_path / "source"
    tiny.build(**WIDE).save_pretrained(source)
    for rank, found in enumerate(run_workers(_work, 2, tmp_path, source)):
        losses = found["losses"]
        assert losses["nvme"] == losses["cpu"] and len(set(losses["nvme"])) == STEP + len(LATER), rank
        assert losses["resumed, nvme"] == losses["resumed, cpu"] == losses["cpu"][STEP:]
        assert losses["adapter, nvme"] == losses["adapter, cpu"]
        assert found["swapped"] >= 12 << 20
        assert found["loaded"] == 6
    assert not list((tmp_path / "disk").glob("dstune-swap-*/*.swp")), "what was on NVMe goes with its worker"
