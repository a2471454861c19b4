"""From a run to its export: which step, in which form, where to."""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from dstune.checkpoint import origin, resolve
from dstune.config.schema import RunConfig
from dstune.config.units import size_bytes
from dstune.errors import Problem, UsageError
from dstune.exporting import huggingface, initial, push, state_dict
from dstune.exporting.directory import require_new
from dstune.launch import rundir
from dstune.loggers import get_logger
from dstune.paths import RunPaths
from dstune.protocols import AVERAGE, MODEL_STATES, WEIGHTS

log = get_logger(__name__)

FORMS = ("huggingface", "deepspeed-fp32", "deepspeed-fp32-bin")
_MOST_THREADS = 4


@dataclass(frozen=True, kw_only=True)
class Form:
    """What an export looks like."""

    to: str = "huggingface"
    """A Hugging Face directory, or what DeepSpeed's zero_to_fp32.py gives: as safetensors, or (`-bin`) as pytorch_model.bin."""
    dtype: str | None = None
    """bf16, fp16 or fp32; default: the run's."""
    weights: str = WEIGHTS
    """`fp32`: as the last update left them; `ema`: their average, of a run that keeps one (`train.ema`)."""
    merged: bool = False
    """Of a run with an adapter: the whole model with the adapter in it, and not the adapter alone."""
    max_shard_size: str | int | None = None
    """Of one file: `5GB`, `500MB`, a number of bytes. An adapter alone is always one file."""
    threads: int | None = None
    """Output files written at a time; default: the processors, up to 4."""


@dataclass(frozen=True)
class Hub:
    """Where an export is pushed to."""

    id: str
    public: bool = False


def export(run: str | Path, out: str | Path | None, step: str | int, form: Form, hub: Hub | None = None) -> Path:
    """Write a committed checkpoint of `run` to `out` (default: the run's export/), and push it to `hub`.

    Raises UsageError where `out` exists, there is no token to push with or the run cannot have this form, CheckpointError,
    ConfigError, RunFailed.
    """
    if form.to not in FORMS:
        raise UsageError(Problem("--to", repr(form.to), f"one of: {', '.join(FORMS)}"))
    if form.to != "huggingface" and (form.dtype not in (None, "fp32") or hub):
        raise UsageError(Problem("--to", f"{form.to} is fp32 weights alone", "neither --dtype nor --push with it"))
    token = push.require_token(hub.id) if hub else ""
    paths = rundir.find(run)
    loaded = rundir.load(paths)
    _require_sense(form, loaded.config)
    target = Path(out).absolute() if out is not None else paths.export
    require_new(target)
    checkpoints = rundir.checkpoints_of(loaded.config, loaded.base, paths)
    if target.resolve().is_relative_to(checkpoints.resolve()):
        came = "is among the run's checkpoints, where retention would delete it"
        raise UsageError(Problem(str(target), came, do="Name a directory of its own."))
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        _write(paths, _checkpoint(paths, step, Path(scratch)), target, form)
    if hub:
        log.info("pushed: %s", push.push(target, hub.id, token, public=hub.public))
    return target


def _require_sense(form: Form, config: RunConfig) -> None:
    """Raises UsageError for a form that a run with an adapter, or one without, does not have, or that nobody has."""
    if form.threads is not None and form.threads < 1:
        raise UsageError(Problem("--threads", str(form.threads), "at least 1"))
    if form.weights not in MODEL_STATES:
        raise UsageError(Problem("--weights", repr(form.weights), f"one of: {', '.join(MODEL_STATES)}"))
    if form.weights == AVERAGE and config.train.ema is None:
        came = f"{config.name} keeps no average of its weights (train.ema)"
        raise UsageError(
            Problem("--weights", came, do="Without --weights they are exported as the last update left them.")
        )
    if config.model.adapter is None:
        if form.merged:
            came = f"{config.name} trained the model itself, not an adapter (model.adapter)"
            raise UsageError(Problem("--merged", came, do="Without --merged the whole model is exported."))
    elif not form.merged:
        if form.to != "huggingface":
            came = f"{config.name} trained an adapter, and {form.to} is a whole model's weights"
            raise UsageError(
                Problem("--to", came, do="With --merged the base model is written with the adapter in it.")
            )
        if form.max_shard_size is not None:
            came = "an adapter alone is one file, peft knows no other"
            raise UsageError(Problem("--max-shard-size", came, do="Leave it out, or export the whole model: --merged."))


def _checkpoint(paths: RunPaths, step: str | int, scratch: Path) -> Path:
    """The committed directory that `step` names; 0 is made for the moment, but where a run began with an imported step 0."""
    loaded = rundir.load(paths)
    checkpoints = rundir.checkpoints_of(loaded.config, loaded.base, paths)
    if str(step) == "0" and all(one.step != 0 for one in resolve.committed(checkpoints)):
        if loaded.config.model.start is not None:
            return Path(loaded.config.model.start)
        return initial.commit_initial(scratch, loaded.config, loaded.base)
    kept = loaded.config.checkpoint
    store = rundir.store_of(loaded.config)
    return origin.choose(checkpoints, store, str(step), kept.best, kept.best_mode, into=scratch).directory


def _write(paths: RunPaths, checkpoint: Path, target: Path, form: Form) -> None:
    loaded = rundir.load(paths)
    config, base = loaded.config, loaded.base
    max_file_bytes = huggingface.MAX_FILE_BYTES if form.max_shard_size is None else _size(form.max_shard_size)
    threads = max(1, form.threads or min(_MOST_THREADS, os.cpu_count() or 1))
    if form.to == "huggingface":
        noted = rundir.environment(paths).get("prepared")
        huggingface.export(
            checkpoint,
            target,
            config,
            base,
            dtype=form.dtype or config.model.dtype,
            max_file_bytes=max_file_bytes,
            threads=threads,
            prepared=Path(noted["directory"]) if noted else None,
            merged=form.merged,
            weights=form.weights,
        )
        return
    pickled = form.to == "deepspeed-fp32-bin"
    state_dict.export(
        checkpoint,
        target,
        config,
        base,
        pickled=pickled,
        max_file_bytes=max_file_bytes,
        threads=threads,
        weights=form.weights,
    )


def _size(value: str | int) -> int:
    try:
        return size_bytes(value)
    except ValueError as error:
        raise UsageError(Problem("--max-shard-size", str(error))) from None
