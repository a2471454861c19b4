"""The model of a run before its first step, as a checkpoint: what a tuned one is compared with."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dstune.checkpoint import commit
from dstune.config.schema import RunConfig
from dstune.engine.world import World
from dstune.model.build import build, checkpoint_names
from dstune.paths import step_directory
from dstune.protocols import Slice

_ONE_PIECE = {"zero_optimization": {"stage": 1}}


class _Alone:
    """`protocols.Control` of a single process."""

    rank = 0
    world_size = 1

    def barrier(self) -> None:
        """Nobody to wait for."""

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def broadcast(self, value: Any) -> Any:
        return value


def commit_initial(checkpoints: Path, config: RunConfig, base: Path) -> Path:
    """Commit the run's initial weights as step 0 below `checkpoints`; the directory. Builds the whole model in this process."""
    world = World()
    world.init()
    try:
        module = build(config.model, base, "sdpa", config.train.seed, _ONE_PIECE)
        slices = _slices(module, checkpoint_names(module, config.model), config.model.adapter is not None)
        commit.save(checkpoints, 0, slices, {"step": 0}, _Alone(), {"run": config.name})
    finally:
        world.close()
    return step_directory(checkpoints, 0)


def _slices(module: Any, names: Mapping[str, str], trained_only: bool) -> Iterator[Slice]:
    """Every parameter whole, a tied one once; or only those that would be trained."""
    for name, parameter in module.named_parameters():
        if parameter.requires_grad or not trained_only:
            values = parameter.detach().float().flatten()
            yield Slice("fp32", names.get(name, name), tuple(parameter.shape), 0, values)
