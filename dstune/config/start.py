"""`model.path` that names another run: the model that the run began with, and the checkpoint that this one begins with."""

import json
from collections.abc import Callable
from pathlib import Path

from dstune.config.schema import RunConfig
from dstune.errors import ConfigError, Problem
from dstune.paths import RunPaths, is_address, step_directory, step_of

_WHERE = "model.path"
_ONLY_TRAINED = "a checkpoint holds only what its run trained"


def begun(config: RunConfig, base: Path, load: Callable[[Path], RunConfig]) -> RunConfig:
    """`config` with its `model.path` resolved where it names a run (`runs/NAME` or `runs/NAME@STEP`); any other is left as it is.

    Where that run trained an adapter, this one goes on with it, or without `model.adapter` begins with the weights that it makes.
    `load` reads a run's config.yaml. The newest step is taken by its name; whether it is whole shows when it is read. Raises
    ConfigError where the run has no such checkpoint, or trained other parameters than this one will.
    """
    written, _, step = config.model.path.partition("@")
    directory = (base / Path(written).expanduser()).absolute()
    if not RunPaths(directory).config.is_file() or not RunPaths(directory).env.is_file():
        return config
    theirs = load(RunPaths(directory).config)
    their_base = _base_of(RunPaths(directory).env)
    if problems := _differences(config, theirs, written):
        raise ConfigError(problems)
    checkpoint = _checkpoint(_checkpoints(theirs, their_base, directory), step)
    ours, other = config.model, theirs.model
    model = ours.model_copy(
        update={
            "path": _absolute(other.path, their_base),
            "revision": other.revision,
            "tokenizer": ours.tokenizer or (other.tokenizer and _absolute(other.tokenizer, their_base)),
            "new_tokens": other.new_tokens,
            "init": other.init,
            "overrides": {**other.overrides, **ours.overrides},
            "trust_remote_code": ours.trust_remote_code or other.trust_remote_code,
            "start": str(checkpoint),
        }
    )
    return RunConfig.model_validate(config.model_dump(by_alias=True) | {"model": model.model_dump()})


def _base_of(env: Path) -> Path:
    """What the relative paths of the other run's file are relative to."""
    try:
        return Path(json.loads(env.read_text(encoding="utf-8"))["base"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            Problem(_WHERE, f"{env} cannot be read: {error!r}", "a run's directory as dstune made it")
        ) from None


def _differences(config: RunConfig, theirs: RunConfig, written: str) -> list[Problem]:
    """What keeps the weights of the one from being the other's."""
    ours, other = config.model.adapter, theirs.model.adapter
    if config.model.new_tokens and config.model.new_tokens != theirs.model.new_tokens:
        came = f"other `model.new_tokens` than {written} has: {_ONLY_TRAINED}"
        return [Problem(_WHERE, came, do=f"Add them to what `dstune export {written} OUT` writes.")]
    if ours is None and other is not None:
        # It is added to the weights that it was trained on, which must be in files, and all be read from the checkpoint.
        random = theirs.model.init == "random" or theirs.model.path.startswith("builtin:")
        if not random and not config.train.freeze:
            return []
        came = f"{written} trained an adapter{' of a random model' if random else ''}, and this run has none"
        do = (
            f"`model.adapter` as there goes on with it; or train on what `dstune export {written} OUT --merged` writes."
        )
        return [Problem(_WHERE, came, do=do)]
    if ours is not None and (
        other is None or ours.model_dump(exclude={"dropout"}) != other.model_dump(exclude={"dropout"})
    ):
        came = f"{written} trained {'no adapter' if other is None else 'another adapter'}: {_ONLY_TRAINED}"
        merged = "" if other is None else " --merged"
        return [Problem(_WHERE, came, do=f"Train the adapter on what `dstune export {written} OUT{merged}` writes.")]
    if config.train.freeze or theirs.train.freeze:
        came = f"`train.freeze` here or in {written}: {_ONLY_TRAINED}"
        return [Problem(_WHERE, came, do=f"Train on what `dstune export {written} OUT` writes.")]
    return []


def _checkpoints(theirs: RunConfig, base: Path, directory: Path) -> Path:
    written = theirs.checkpoint.directory
    return (base / Path(written).expanduser()).absolute() / theirs.name if written else RunPaths(directory).checkpoints


def _checkpoint(checkpoints: Path, step: str) -> Path:
    steps = sorted(found for path in checkpoints.glob("*") if (found := step_of(path)) is not None)
    chosen = [one for one in steps if not step or str(one) == step]
    if not chosen:
        known = ", ".join(map(str, steps)) or "none"
        raise ConfigError(Problem(_WHERE, f"no committed step {step or 'at all'} in {checkpoints}", f"one of: {known}"))
    return step_directory(checkpoints, chosen[-1])


def _absolute(written: str, base: Path) -> str:
    """A directory relative to the other run's file, made absolute; hub ids and builtin models stay."""
    place = (base / Path(written).expanduser()).absolute()
    return str(place) if place.exists() and not is_address(written) else written
