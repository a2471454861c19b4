"""One worker of one attempt: the room that knows every other, and joins them. It reads config.yaml and the attempt's plan,
nothing else; it raises on failure, after leaving its error where the driver finds it.
"""

import contextlib
import json
import os
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dstune import loggers
from dstune.atomic import write_json
from dstune.batch import Batch, Share
from dstune.checkpoint.home import Home
from dstune.checkpoint.loading import Loading
from dstune.config import identity
from dstune.config.load import load_run
from dstune.config.schema import RunConfig
from dstune.data.shards import Prepared
from dstune.data.tokenize import load_tokenizer
from dstune.engine import communication, leaves, swapping
from dstune.engine.construction import DTYPES
from dstune.engine.threads import compute_here
from dstune.engine.world import World, joined
from dstune.engine.zero import ZeroEngine
from dstune.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, DstuneError, Problem
from dstune.exporting.merged import whole_model
from dstune.exporting.tensors import Masters
from dstune.model import (
    attention,
    compiling,
    fp8,
    freezing,
    isolation,
    neftune,
    padding,
    patterns,
    rotary,
    sequence_parallel,
    tensor_parallel,
    tiling,
)
from dstune.model.build import build, checkpoint_names, masters_from_files
from dstune.model.config import load_config, model_directory
from dstune.model.footprint import footprint
from dstune.model.kernels import choice as kernels
from dstune.model.reference import base_reference, require_same
from dstune.model.weights import WeightFiles
from dstune.paths import CheckpointPaths, RunPaths
from dstune.planning.plan import Plan
from dstune.protocols import MODEL_STATES, WEIGHTS, Control, Slice
from dstune.training.books import RunBooks
from dstune.training.last_words import leave_failure
from dstune.training.loop import Loop, LoopEnd, require_targets
from dstune.training.phases import Utilisation, peak_flops
from dstune.training.profiling import Trace
from dstune.training.saver import CheckpointSaver
from dstune.training.state import TrainState
from dstune.training.validation import Validator

log = loggers.get_logger(__name__)

_ARRIVAL_SECONDS = 6 * 3600.0
"""Workers wait so long for worker 0, which may have data to prepare and a checkpoint to check; when it fails, its launcher ends them."""


def main(run_directory: str | Path, attempt: int) -> None:
    """Run this process's part of `attempt`; the world comes from the environment. Raises what went wrong."""
    world = World.from_environment()
    with _accounted(RunPaths(Path(run_directory)), attempt, world):
        world.init()
        _work(RunPaths(Path(run_directory)), attempt, world, world.control())


def joining_world() -> World:
    """The world of workers that torchrun or srun started. All but worker 0 ignore signals: it decides for all."""
    world = World.from_environment()
    if world.rank != 0:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
    return world


def lead(world: World, run_directory: str, attempt: int) -> None:
    """Worker 0's part where torchrun or srun started the workers: tell them what was planned, then work."""
    with _accounted(RunPaths(Path(run_directory)), attempt, world):
        world.init(arrival_seconds=_ARRIVAL_SECONDS)
        control = world.control()
        control.broadcast([str(Path(run_directory).absolute()), attempt])
        _work(RunPaths(Path(run_directory)), attempt, world, control)


def follow(world: World) -> int:
    """The other workers' part: hear from worker 0 what to work on. The exit status."""
    world.init(arrival_seconds=_ARRIVAL_SECONDS)
    control = world.control()
    run_directory, attempt = control.broadcast(["", 0])
    paths = RunPaths(Path(str(run_directory)))
    try:
        with _accounted(paths, int(attempt), world):
            end = _work(paths, int(attempt), world, control)
    except Exception as error:
        if not joined():
            raise
        return error.exit_status if isinstance(error, DstuneError) else EXIT_FAILED  # it is written down
    return EXIT_DONE if end.state == "succeeded" else EXIT_STOPPED


@contextlib.contextmanager
def _accounted(paths: RunPaths, attempt: int, world: World) -> Iterator[None]:
    """Log to this rank's file; leave a failure where the driver and a person find it."""
    loggers.configure(file=paths.rank_log(world.rank))
    try:
        yield
    except BaseException as error:
        leave_failure(paths, attempt, world.rank, error)
        world.abandon()
        raise
    else:
        world.close()
    finally:
        swapping.remove_folders()


def _work(paths: RunPaths, attempt: int, world: World, control: Control) -> LoopEnd:
    plan = Plan.read(paths.plan(attempt))
    config = plan.settle(load_run(paths.config).config)
    if plan.gpus:
        world.require_gpu()
    if world.world_size != plan.world_size:
        came = f"{world.world_size} workers were started"
        raise DstuneError(Problem(str(paths.plan(attempt)), came, f"{plan.world_size}, as planned"))
    compute_here(plan.cpus_per_worker)
    torch.use_deterministic_algorithms(config.train.deterministic)
    _say_where(paths, plan, control)
    home = Home.find(Path(plan.checkpoints), plan.store, control, plan.store_owner)
    end = _train(config, plan, paths, home, world, control)
    if world.rank == 0:
        write_json(paths.outcome(attempt), {"state": end.state, "step": end.step, "reason": end.reason})
    control.barrier()
    return end


def _say_where(paths: RunPaths, plan: Plan, control: Control) -> None:
    """Put every worker's node and process into the events: who has to be killed, or looked at."""
    workers = control.gather({"rank": control.rank, "node": socket.gethostname(), "pid": os.getpid()})
    if control.rank == 0:
        RunBooks(paths).events.event("workers", attempt=plan.attempt, workers=workers)


def _train(config: RunConfig, plan: Plan, paths: RunPaths, home: Home, world: World, control: Control) -> LoopEnd:
    base = Path(plan.base)
    ds_config = json.loads(paths.ds_config(plan.attempt).read_text(encoding="utf-8"))
    prepared = Prepared.open(plan.prepared)
    require_targets(prepared)
    kernel = _attention(config, plan, base, world)
    module = build(config.model, base, kernel, config.train.seed, ds_config, config.train.freeze)
    rotary.take_piece(module, Share.of(plan, world.rank).place)
    freezing.freeze(module, config.train.freeze)
    loss = _put_in(config, module, world.device)
    frozen = ""
    if config.model.adapter is None and not all(parameter.requires_grad for parameter in module.parameters()):
        frozen = freezing.frozen_digest(module, WeightFiles(model_directory(config.model, base)), control)
    engine = _engine(config, plan, module, ds_config, world)
    reference = _reference(config, base, control)
    pad_id = load_tokenizer(config.model, base).pad_token_id or 0
    validator = _validator(config, plan, engine, loss, prepared, control, world, pad_id)
    saver = _saver(config, plan, paths, home, engine, control, world, reference)
    state, whole = _initial_state(config, plan, engine, frozen, home, control, reference)
    if not whole and control.rank == 0:
        RunBooks(paths).events.event("optimizer_restarted", step=plan.start_step)
    if plan.resume_from is not None:
        saver.catch_up(plan.start_step)
    loop = Loop(
        config=config,
        plan=plan,
        engine=engine,
        loss=loss,
        prepared=prepared,
        validator=validator,
        control=control,
        state=state,
        saver=saver,
        books=RunBooks(paths),
        device=world.device,
        pad_id=pad_id,
        utilisation=_utilisation(config, base, world),
        trace=None
        if config.train.profile is None
        else Trace(*config.train.profile, paths.rank_trace(world.rank), world.device),
    )
    return loop.run()


def _attention(config: RunConfig, plan: Plan, base: Path, world: World) -> str:
    """The attention to build the model with, shown to be right for this run's rows."""
    model_config = load_config(config.model, base)
    kernel = attention.choose(config.model, model_config, plan.layout)
    if plan.layout in ("packed", "packed-seq2seq"):
        isolation.prove(model_config, kernel)
    elif plan.micro_batch_size > 1:
        padding.prove(model_config, kernel)
    if plan.sequence_parallel > 1:
        sequence_parallel.prove(config.model, model_config, plan.sequence_parallel)
        group = world.row_group(plan.sequence_parallel)
        kernel = sequence_parallel.register(sequence_parallel.Workers(group, communication.collectives()))
    if plan.tensor_parallel > 1:
        tensor_parallel.prove(config.model, model_config, plan.tensor_parallel)
    log.info("attention %s, layout %s", kernel, plan.layout)
    return kernel


def _engine(config: RunConfig, plan: Plan, module: Any, ds_config: dict[str, Any], world: World) -> ZeroEngine:
    stored = checkpoint_names(module, config.model)
    engine = ZeroEngine(
        module,
        lr=config.train.lr,
        optimizer=config.train.optimizer,
        betas=config.train.betas,
        eps=config.train.eps,
        momentum=config.train.momentum,
        scale_parameter=config.train.scale_parameter,
        weight_decay=config.train.weight_decay,
        ema=config.train.ema,
        lr_scales=patterns.lr_scales(module, config.train.lr_scales, stored),
        ds_config=ds_config,
        world=world,
        names=stored,
        planned_bytes=plan.planned_bytes,
    )
    if engine.leaf_modules:
        log.info("gathered whole: %s", leaves.summary(engine.leaf_modules))
    return engine


def _put_in(config: RunConfig, module: Any, device: torch.device) -> Callable[[Any, Batch], torch.Tensor]:
    """Make `module` compute as the run file says; the loss to train with.

    NOTE: in this order: a kernel takes the place of a layer's forward pass, tiles and 8-bit products go around or into what is there
    then, and all of that is compiled.
    """
    loss = kernels.put_in(kernels.chosen(config.model, module, device.type), module, device.type)
    if config.model.mlp_tile != "off":
        tiling.tile(module, config.model.mlp_tile)
    if config.train.neftune_alpha is not None:
        neftune.add_noise(module, config.train.neftune_alpha)
    if config.model.fp8:
        fp8.multiply_in_fp8(module, device)
    if config.model.compile == "layers":
        compiling.compile_layers(module, device.type)
    return lambda module, batch: loss(module, batch)[0]  # the plan knows the count


def _utilisation(config: RunConfig, base: Path, world: World) -> Utilisation | None:
    """Worker 0 counts for all."""
    if world.rank != 0 or (peak := peak_flops(world.device, DTYPES[config.model.dtype])) is None:
        return None
    return Utilisation(footprint(config.model, base, config.train.freeze), peak)


def _validator(
    config: RunConfig,
    plan: Plan,
    engine: ZeroEngine,
    loss: Callable[[Any, Batch], torch.Tensor],
    prepared: Prepared,
    control: Control,
    world: World,
    pad_id: int,
) -> Validator | None:
    held_out = prepared.validation() if plan.has_validation else None
    if held_out is None:
        return None
    return Validator(
        module=engine.module,
        loss=loss,
        prepared=held_out,
        max_rows=config.validate_.max_rows,
        micro_batch_size=plan.micro_batch_size,
        layout=plan.layout,
        pad_id=pad_id,
        control=control,
        device=world.device,
        share=Share.of(plan, world.rank),
    )


def _reference(config: RunConfig, base: Path, control: Control) -> Mapping[str, Any] | None:
    """The model that an adapter's checkpoints name in place of its weights; None for a run that trains them all. A collective."""
    if config.model.adapter is None:
        return None
    return control.broadcast(base_reference(config.model, base, config.train.seed) if control.rank == 0 else {})


def _saver(
    config: RunConfig,
    plan: Plan,
    paths: RunPaths,
    home: Home,
    engine: ZeroEngine,
    control: Control,
    world: World,
    reference: Mapping[str, Any] | None,
) -> CheckpointSaver:
    return CheckpointSaver(
        config.checkpoint,
        home,
        engine,
        control,
        behind=world.control(),
        fingerprints=identity.fingerprints(config, plan.prepared_fingerprint)
        | ({} if reference is None else {"base": reference}),
        events=RunBooks(paths).events,
        pinned=world.device.type == "cuda",
    )


def _initial_state(
    config: RunConfig,
    plan: Plan,
    engine: ZeroEngine,
    frozen: str,
    home: Home,
    control: Control,
    reference: Mapping[str, Any] | None,
) -> tuple[TrainState, bool]:
    """Step 0, or the checkpoint that the plan names, loaded into the engine; and whether the optimizer's states were in it."""
    state = TrainState(
        prepared_fingerprint=plan.prepared_fingerprint,
        seed=config.train.seed,
        global_batch_size=config.train.global_batch_size,
        total_steps=plan.total_steps,
        frozen=frozen,
    )
    if plan.resume_from is None:
        if config.model.start is not None:
            _start_from(Path(config.model.start), config, Path(plan.base), engine, control, reference)
        elif fill := masters_from_files(engine.module.module, config.model, Path(plan.base)):
            engine.load(fill, 0)
        return state, True
    loading = Loading(home.bring(Path(plan.resume_from), control), control)
    reader = loading.reader
    if reference is not None:
        require_same(reader.manifest.fingerprints.get("base"), reference, str(reader.directory))
    state = state.resumed(reader.state, str(CheckpointPaths(reader.directory).state))
    engine.load_extra_state(state.engine)
    whole = not reader.has_weights_alone
    if not whole:
        state = replace(state, optimizer_steps=0)
    engine.load(loading.fill if whole else loading.fill_weights, state.optimizer_steps)
    loading.settle()
    log.info("loaded %s (written by %d workers)", reader.directory, reader.manifest.world_size)
    return state, whole


def _start_from(
    checkpoint: Path,
    config: RunConfig,
    base: Path,
    engine: ZeroEngine,
    control: Control,
    reference: Mapping[str, Any] | None,
) -> None:
    """Take the weights of another run's checkpoint, in fp32 as they are there; this run's average of them begins with them too.

    An adapter there, where this run has none, is added to the weights that it was trained on.
    """
    loading = Loading(checkpoint, control)
    if reference is not None:
        require_same(loading.reader.manifest.fingerprints.get("base"), reference, str(checkpoint))
    source = (
        contextlib.nullcontext(loading.reader) if config.model.adapter else whole_model(loading.reader, config, base)
    )
    with source as masters:

        def fill(piece: Slice) -> None:
            if piece.state in MODEL_STATES and masters is loading.reader:
                loading.fill(replace(piece, state=WEIGHTS))
            elif piece.state in MODEL_STATES:
                loading.read(lambda: _fill_from(masters, piece))

        engine.load(fill, 0)
    loading.settle()
    log.info("begins with the weights of %s%s", checkpoint, "" if masters is loading.reader else ", its adapter merged")


def _fill_from(masters: Masters, piece: Slice) -> None:
    values = torch.empty(piece.tensor.numel())
    masters.read_into(WEIGHTS, piece.name, piece.offset, values)
    piece.tensor.copy_(values)
