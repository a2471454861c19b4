"""DeepSpeed's own checkpoints into a run: its weights and moments under the run's names, committed as a step to go on from.

What DeepSpeed does not know is set by the run file: the data and its order (the run's own, from position `step * global_batch_size`
on), the schedule and every setting of the optimizer. Where that differs from what DeepSpeed went by, it is said.
"""

import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from dstune.checkpoint import importer, resolve
from dstune.checkpoint.deepspeed_files import DeepSpeedCheckpoint
from dstune.config import identity
from dstune.config.load import LoadedRun, load_run
from dstune.data.shards import Prepared
from dstune.engine.optimizers import Settings, rule_of
from dstune.errors import CheckpointError, Problem, UsageError
from dstune.launch import rundir, start
from dstune.launch.driver import driver_lock
from dstune.model import freezing, names
from dstune.model.build import skeleton
from dstune.model.config import is_builtin, load_config, model_directory
from dstune.model.weights import WeightFiles
from dstune.paths import RunPaths
from dstune.protocols import AVERAGE, WEIGHTS, Slice
from dstune.records.sinks import EventLog
from dstune.training.schedule import learning_rate
from dstune.training.state import TrainState

_SETTINGS = ("betas", "eps")
_SAME_RATE = 1e-3


@dataclass(frozen=True)
class Imported:
    """What was imported, and where the run goes on."""

    step: int
    run: str
    checkpoint: str
    source: str
    stage: int
    world_size: int
    """Workers that wrote it; as many shards were made."""
    optimizer_steps: int
    position: int
    """The first row of the next step, counted in the run's own order."""
    parameters: int
    bytes: int
    notes: list[str]
    """What could not be known, and how it was set; what differs from what DeepSpeed went by."""


def import_deepspeed(
    run: str | Path | LoadedRun,
    prepare: Callable[[LoadedRun], Prepared],
    directory: Path,
    tag: str | None = None,
    step: int | None = None,
    skip_objects: bool = False,
) -> Imported:
    """Commit a DeepSpeed checkpoint into a new run (a run file), or one that has committed nothing yet.

    `prepare` makes a new run's data. `step`: where the run then stands (default: DeepSpeed's own count of steps).
    Everything is checked before the run directory is made. Raises CheckpointError, UsageError, ConfigError, DataError.
    """
    paths, loaded = _found(run)
    if loaded.config.model.adapter is not None:
        came = f"{loaded.config.name} trains an adapter, and DeepSpeed's checkpoint has a whole model's weights and moments"
        do = "Export the weights there and name them in `model.path`; or leave `model.adapter` out, to train all of them."
        raise UsageError(Problem("model.adapter", came, "a run that trains the model itself", do))
    if paths is not None:
        _refuse_history(loaded, paths)
    source = DeepSpeedCheckpoint(directory, tag, skip_objects)
    renamed = _stored_names(source, loaded)
    step = source.global_steps if step is None else step
    with ExitStack() as stack:
        if paths is not None:
            stack.enter_context(driver_lock(paths))
            _refuse_history(loaded, paths)
            state = _state(source, loaded, start.open_prepared(loaded, paths), step)
        else:
            rundir.refuse_existing(loaded)
            _refuse_history(loaded, rundir.run_paths(loaded))
            start.check(loaded)
            start.reached_store(loaded.config, new=True)
            prepared = prepare(loaded)
            state = _state(source, loaded, prepared, step)
            paths = start.create(loaded, prepared)
            stack.callback(_remove_unfinished, paths, loaded)
        return _commit(source, loaded, paths, renamed, state)


def _found(run: str | Path | LoadedRun) -> tuple[RunPaths | None, LoadedRun]:
    """The run's directory where there is one, and its config; a run file that was not started yet has none."""
    if isinstance(run, LoadedRun):
        return None, run
    if Path(run).suffix in (".yaml", ".yml") and not rundir.exists(run):
        return None, load_run(run)
    paths = rundir.find(run)
    return paths, rundir.load(paths)


def _commit(
    source: DeepSpeedCheckpoint, loaded: LoadedRun, paths: RunPaths, renamed: Mapping[str, str], state: TrainState
) -> Imported:
    averaged = loaded.config.train.ema is not None
    shards = [partial(_slices, source, rank, renamed, averaged) for rank in range(source.world_size)]
    fingerprints = identity.fingerprints(loaded.config, state.prepared_fingerprint)
    fingerprints["imported_from"] = source.directory.name
    checkpoints = rundir.checkpoints_of(loaded.config, loaded.base, paths)
    record = importer.commit_shards(checkpoints, state.step, shards, state.to_json(), fingerprints)
    seconds = round(record.seconds, 3)
    event = {"step": state.step, "bytes": record.bytes, "seconds": seconds, "imported_from": str(source.directory)}
    EventLog(paths.events).event("commit", **event)
    return Imported(
        step=state.step,
        run=str(paths.root),
        checkpoint=str(record.directory),
        source=str(source.directory),
        stage=source.stage,
        world_size=source.world_size,
        optimizer_steps=state.optimizer_steps,
        position=state.step * state.global_batch_size,
        parameters=sum(math.prod(shape) for shape in source.shapes.values()),
        bytes=record.bytes,
        notes=_notes(source, loaded, state),
    )


def _slices(source: DeepSpeedCheckpoint, rank: int, renamed: Mapping[str, str], averaged: bool) -> Iterator[Slice]:
    """`averaged`: the run keeps an average of its weights, which begins at those that DeepSpeed had."""
    for piece in source.pieces(rank):
        states = piece.states | ({AVERAGE: piece.states[WEIGHTS]} if averaged else {})
        for state, tensor in states.items():
            yield Slice(state, renamed[piece.name], source.shapes[piece.name], piece.offset, tensor)


def _remove_unfinished(paths: RunPaths, loaded: LoadedRun) -> None:
    """A run directory that was made for an import which then failed: the next try must read the run file again."""
    if not resolve.committed(rundir.checkpoints_of(loaded.config, loaded.base, paths)):
        shutil.rmtree(paths.root)


def _refuse_history(loaded: LoadedRun, paths: RunPaths) -> None:
    checkpoints = rundir.checkpoints_of(loaded.config, loaded.base, paths)
    if found := resolve.committed(checkpoints):
        came = f"step {found[-1].step} is committed: this run has a history of its own"
        raise UsageError(
            Problem(str(checkpoints), came, "a run that has committed nothing", "another `name:` starts a new run")
        )


def _state(source: DeepSpeedCheckpoint, loaded: LoadedRun, prepared: Prepared, step: int) -> TrainState:
    """Where the run stands behind the imported step. Raises UsageError where nothing would be left to do."""
    total = start.total_steps(loaded, prepared)
    if not 0 <= step < total:
        raise UsageError(
            Problem(
                str(source.directory),
                f"step {step}, and this run ends at step {total}",
                f"a step from 0 to {total - 1}",
                "--step 0 takes the weights and moments and begins with the data and the schedule; train.epochs or "
                "train.max_steps lengthen the run",
            )
        )
    scale = source.loss_scale
    return TrainState(
        prepared_fingerprint=prepared.fingerprint,
        seed=loaded.config.train.seed,
        global_batch_size=loaded.config.train.global_batch_size,
        total_steps=total,
        step=step,
        optimizer_steps=source.optimizer_steps,
        frozen=_frozen_digest(loaded),
        engine={"optimizer": loaded.config.train.optimizer} | ({} if scale is None else {"loss_scaler": scale}),
    )


def _outline(loaded: LoadedRun) -> PreTrainedModel:
    """The run's model without storage; what it leaves frozen has no `requires_grad`."""
    section = loaded.config.model
    outline = skeleton(load_config(section, loaded.base), section)
    freezing.freeze(outline, loaded.config.train.freeze)
    return outline


def _frozen_digest(loaded: LoadedRun) -> str:
    if not loaded.config.train.freeze:
        return ""
    return freezing.frozen_digest(_outline(loaded), WeightFiles(model_directory(loaded.config.model, loaded.base)))


def _notes(source: DeepSpeedCheckpoint, loaded: LoadedRun, state: TrainState) -> list[str]:
    train = loaded.config.train
    batch = train.global_batch_size
    notes = [
        "which data DeepSpeed had read cannot be known: the run goes on at row "
        f"{state.step * batch:,} (step {state.step} times {batch} rows) of its own order, whatever the other order was"
    ]
    if source.batch_size not in (None, batch):
        notes.append(f"train.global_batch_size is {batch}, DeepSpeed's steps took {source.batch_size} rows")
    if state.step != source.global_steps:
        notes.append(f"DeepSpeed stood at step {source.global_steps}; --step says {state.step}")
    if source.buffers:
        notes.append(f"buffers are taken from the model itself, not from there: {', '.join(source.buffers[:5])}")
    rate = learning_rate(train, state.step, state.total_steps)
    last = source.settings.get("lr")
    if last is not None and abs(float(last) - rate) > _SAME_RATE * rate:
        notes.append(
            f"the next step's learning rate is {rate:.6g} by the run file, DeepSpeed's last one was {last:.6g}"
        )
    for key in _SETTINGS:
        theirs, ours = source.settings.get(key), getattr(train, key)
        if (
            theirs is not None
            and ours is not None
            and (tuple(theirs) != tuple(ours) if key == "betas" else float(theirs) != ours)
        ):
            notes.append(f"train.{key} is {ours}, DeepSpeed's was {theirs}")
    return notes


def _stored_names(source: DeepSpeedCheckpoint, loaded: LoadedRun) -> dict[str, str]:
    """For each of DeepSpeed's parameters the name in our checkpoints. Raises CheckpointError where the model is another."""
    outline = _outline(loaded)
    train = loaded.config.train
    rule = rule_of(Settings(name=train.optimizer, betas=train.betas, eps=train.eps, momentum=train.momentum))
    if missing := [state for state in ("fp32", *rule.keys) if state not in source.states]:
        came = f"holds {', '.join(source.states)}, and {', '.join(missing)} is not among them"
        raise CheckpointError(Problem(str(source.directory), came, f"the states of {train.optimizer}"))
    target_of = targets([*source.shapes, *source.frozen], outline, source.directory)
    stored = names.saved_names(outline)
    parameters = dict(outline.named_parameters())
    problems: list[str] = []
    found: dict[str, str] = {}
    for name, shape in source.shapes.items():
        target = target_of[name]
        if target in found:
            problems.append(f"{name} and {found[target]} are two weights there and one (tied) here")
        elif target not in parameters or not parameters[target].requires_grad:
            problems.append(f"{name} was trained there and is not here")
        elif tuple(parameters[target].shape) != shape:
            problems.append(f"{name} has shape {list(shape)}, this run's model {list(parameters[target].shape)}")
        found[target] = name
    frozen = {target_of[name]: name for name in source.frozen}
    for name, parameter in parameters.items():
        if parameter.requires_grad and name not in found:
            problems.append(f"{name} {'was frozen there and is trained here' if name in frozen else 'is not in it'}")
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise CheckpointError(
            Problem(str(source.directory), "; ".join(problems[:5]) + more, "a checkpoint of this run's model.path")
        )
    untouched = {name: frozen[name] for name in frozen if name in parameters and name not in found}
    _check_frozen(source, untouched, outline, loaded)
    return {name: stored.get(target_of[name], target_of[name]) for name in source.shapes}


def targets(theirs: list[str], outline: PreTrainedModel, directory: Path) -> dict[str, str]:
    """Each of DeepSpeed's names as the model's own: wrappers put a prefix before all (`module.`), older versions named otherwise.

    Raises CheckpointError for one that the model has not.
    """
    ours = names.canonical_names(outline)
    prefixes = {name[: -len(own)] for name in theirs[:1] for own in ours if name == own or name.endswith(f".{own}")}
    for prefix in ["", *sorted(prefixes - {""}, key=len)]:
        bare = {name: name.removeprefix(prefix) for name in theirs}
        renamed = {one.sources[0]: one.target for one in names.loading_plan(outline, bare.values()) if one.is_renaming}
        found = {name: ours.get(own) or ours.get(renamed.get(own, "")) for name, own in bare.items()}
        if all(found.values()):
            return {name: target for name, target in found.items() if target}
    longest = max(prefixes, key=len, default="")
    strange = next((name for name in theirs if name.removeprefix(longest) not in ours), theirs[0])
    came = f"has {strange}, which {type(outline).__name__} has not as one parameter"
    raise CheckpointError(Problem(str(directory), came, "a checkpoint of this run's model.path"))


def _check_frozen(
    source: DeepSpeedCheckpoint, frozen: Mapping[str, str], outline: PreTrainedModel, loaded: LoadedRun
) -> None:
    """What was not trained there is taken from the model's files here: it must be the same. Raises CheckpointError."""
    if not frozen:
        return
    section = loaded.config.model
    if is_builtin(section) or section.init == "random":
        raise CheckpointError(Problem(str(source.directory), "has frozen weights", "a model.path that has them too"))
    files = WeightFiles(model_directory(section, loaded.base))
    file_names = {one.target: one.sources[0] for one in names.loading_plan(outline, files.names()) if one.is_renaming}
    for name, theirs in frozen.items():
        value = source.frozen_weight(theirs)
        if name not in file_names or not torch.equal(files.read(file_names[name]).to(value.dtype), value):
            came = f"its frozen {theirs} is not that of {files.directory}"
            raise CheckpointError(Problem(str(source.directory), came, "the model that DeepSpeed began with"))
