"""States on NVMe: resumed to the last digit there and elsewhere, read group by group; what a dead worker left is removed."""

import os
from pathlib import Path
from typing import Any

import pytest

from dstune.checkpoint.commit import Intent, commit
from dstune.checkpoint.reader import Reader
from dstune.checkpoint.shard_writer import ShardWriter
from dstune.engine.swapping import SwapFolder, forget_compilations, remove_folders
from dstune.engine.world import World
from dstune.engine.zero import ZeroEngine
from dstune.errors import ConfigError
from dstune.paths import step_directory
from tests.engine import tiny
from tests.spawn import run_workers, start_worker, worker_environment

STEP = 3
LATER = range(STEP, STEP + 3)
WIDE = {"hidden_size": 256, "intermediate_size": 640}
"""Groups below 1 MiB stay in memory: these matrices are several, and each worker has two groups."""


def _engine(world: World, where: str, disk: Path, optimizer: str) -> ZeroEngine:
    offload = {"nvme": {"device": "nvme", "nvme_path": str(disk), "buffer_count": 5}, "cpu": {"device": "cpu"}}
    zero = {"stage": 3, "sub_group_size": 400_000, "offload_optimizer": offload[where]}
    ema = 0.9 if optimizer == "adamw" else None  # as many tensors of a group as there can be
    return tiny.engine(world, 3, optimizer=optimizer, zero_optimization=zero, sizes=WIDE, ema=ema)


def _run(root: Path, disk: Path, case: list[str], resume: bool) -> dict[str, Any]:
    """Train and commit, or resume."""
    where, optimizer = case
    world = World.from_environment()
    world.init(60)
    control = world.control(60)
    engine = _engine(world, where, disk, optimizer)
    if resume:
        reader = Reader(step_directory(root, STEP))
        engine.load(reader.fill, reader.state["optimizer_steps"])
    else:
        tiny.train(engine, world, range(STEP))
        intent = Intent(STEP, {"optimizer_steps": engine.optimizer_steps}, {}, {})
        commit(root, intent, ShardWriter(engine.slices).stream, control)
    swapped = sum(file.stat().st_size for file in disk.rglob("*.swp"))
    losses = [repr(loss) for loss in tiny.train(engine, world, LATER)]
    world.close()
    return {"losses": losses, "swapped": swapped}


@pytest.mark.dist
@pytest.mark.usefixtures("async_io")
@pytest.mark.parametrize("optimizer", ["adamw", "lion"])
def test_states_on_nvme_resume_there_and_in_memory(tmp_path: Path, optimizer: str) -> None:
    disk = tmp_path / "disk"
    first = run_workers(_run, 2, tmp_path / "run", disk, ["nvme", optimizer], False)[0]
    assert first["swapped"] > 4_000_000
    for where in ("nvme", "cpu"):
        again = run_workers(_run, 2, tmp_path / "run", disk, [where, optimizer], True)[0]
        assert again["losses"] == first["losses"]
    assert len(set(first["losses"])) == len(LATER)


def _leave(parent: Path, path: Path) -> None:
    folder = SwapFolder(parent)
    (folder.path / "a.swp").write_bytes(b"x" * 100)
    path.write_text(str(folder.path))
    os._exit(1)


def test_a_dead_workers_folder_goes_and_a_living_ones_stays(tmp_path: Path) -> None:
    living = SwapFolder(tmp_path / "disk")
    process = start_worker(_leave, tmp_path / "disk", tmp_path / "left", environment=worker_environment(0, 1, 0))
    process.join()
    left = Path((tmp_path / "left").read_text())
    assert left.is_dir() and living.path.is_dir()
    other = SwapFolder(tmp_path / "disk")
    assert not left.exists() and living.path.is_dir() and other.path.is_dir()
    config: dict[str, Any] = {"zero_optimization": {"offload_optimizer": {"nvme_path": str(tmp_path / "disk")}}}
    other.put_into(config)
    other.put_into(config, more_states=1)
    assert config["zero_optimization"]["offload_optimizer"] == {"nvme_path": str(other.path), "buffer_count": 5}
    path = other.path
    del other
    assert not path.exists()
    remove_folders()
    assert not living.path.exists()


def test_a_disk_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"nvme_path.*file.*a writable directory"):
        SwapFolder(tmp_path / "file")


@pytest.mark.parametrize("folder", ["async_io", "py311_cpu/pin_memory"])
def test_a_killed_compilation_holds_nobody_up(tmp_path: Path, folder: str) -> None:
    lock, object_file, foreign = (tmp_path / name for name in (f"{folder}/lock", f"{folder}/a.o", "another/lock"))
    for path in (lock, object_file, foreign):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    forget_compilations(tmp_path)
    assert not lock.exists() and object_file.exists() and foreign.exists()
