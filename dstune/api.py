"""Every command as a typed function, for notebooks and pipelines. `import dstune; dstune.train("run.yaml")`.

`RUN` is a run file, a run's name or its directory; a `LoadedRun` serves where a run file does. Hooks receive records (plain
dictionaries, as the run directory's logs have them), never the trainer. Functions raise `dstune.errors.DstuneError`s.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dstune.checkpoint_api import checkpoints as checkpoints
from dstune.checkpoint_api import export as export
from dstune.checkpoint_api import prune_checkpoints as prune_checkpoints
from dstune.checkpoint_api import verify_checkpoints as verify_checkpoints
from dstune.config.load import LoadedRun, load_run
from dstune.errors import EXIT_DONE, UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from dstune.data.shards import Prepared
    from dstune.launch.driver import DriveEnd
    from dstune.paths import RunPaths

RunFile = str | Path | LoadedRun
Hook = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class RunResult:
    """How a run ended."""

    name: str
    directory: str
    state: str
    """`succeeded`, `failed`, `stopped` or `preempted`."""
    step: int
    """The last step done, or the committed one that a resume goes on from."""
    exit_status: int
    message: str = ""
    compared: Mapping[str, Any] | None = None
    """`predicted` and `measured` memory and speed of the last attempt."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def schema(file: str = "run") -> dict[str, Any]:
    """JSON Schema of a run file, a `site` file or a `tasks` file."""
    from dstune.config.schema import RunConfig, SiteConfig

    if file == "tasks":
        from dstune.evaluation.tasks import TasksFile

        return TasksFile.model_json_schema(by_alias=True)
    return (SiteConfig if file == "site" else RunConfig).model_json_schema(by_alias=True)


def cleaning_steps() -> dict[str, Any]:
    """What `data.clean` may list: each step's JSON Schema with its settings, their meaning and defaults."""
    from dstune.data.cleaning import registry

    return registry.described()


def recipes() -> dict[str, str]:
    """The recipes that `init` knows, each with a line on what it is for."""
    from dstune.config import recipes as known

    return {name: known.summary(name) for name in known.names()}


def init(directory: str | Path = ".", recipe: str = "quickstart") -> Path:
    """Write a commented run file from a recipe; its path. Raises UsageError rather than overwrite one."""
    from dstune.config import recipes as known

    return known.write(Path(directory), recipe)


def prepare(run: RunFile, overrides: Sequence[str] = (), *, progress: bool = False) -> "Prepared":
    """The run's data as a prepared directory, `data.select` heeded; a finished one is reused. Raises DataError, ConfigError."""
    from dstune.launch.ray_pool import prepared_where_asked
    from dstune.records.console import PreparationProgress
    from dstune.selection import choose

    loaded = _loaded(run, overrides)
    with PreparationProgress(shown=progress) as show:
        return choose.prepared(loaded.config, loaded.base, show, prepared_where_asked)


def select(run: RunFile, overrides: Sequence[str] = (), *, count: int = 5, progress: bool = False) -> dict[str, Any]:
    """What `data.select` takes and why, as plain values; `count` examples of each side. `train` then takes exactly these.

    Raises ConfigError, DataError, RunFailed.
    """
    from dstune.launch.ray_pool import prepared_where_asked
    from dstune.records.console import PreparationProgress
    from dstune.selection import report

    loaded = _loaded(run, overrides)
    with PreparationProgress(shown=progress) as show:
        return report.explain(loaded.config, loaded.base, count, show, prepared_where_asked)


def preview(
    run: RunFile, overrides: Sequence[str] = (), *, count: int = 5, seed: int = 0
) -> Iterable["RenderableType"]:
    """What `dstune preview` prints, for rich; `run` may be a prepared directory."""
    from dstune.data import preview as room

    prepared, tokenizer = _previewed(run, overrides)
    return room.preview(prepared, tokenizer, count, seed)


def preview_json(run: RunFile, overrides: Sequence[str] = (), *, count: int = 5, seed: int = 0) -> dict[str, Any]:
    """The same facts as plain values."""
    from dstune.data import preview as room

    prepared, tokenizer = _previewed(run, overrides)
    return room.preview_json(prepared, tokenizer, count, seed)


def preview_html(
    run: RunFile,
    overrides: Sequence[str] = (),
    *,
    file: str | Path,
    count: int = 20,
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Write the same and more (histograms, rows, extremes) as one self-contained HTML page; its absolute path.

    A page that was made here is replaced; any other file only with `overwrite`. Raises UsageError before anything is prepared.
    """
    from dstune import atomic
    from dstune.data import preview as room

    path = Path(file).absolute()
    room.require_writable(path, overwrite)
    prepared, tokenizer = _previewed(run, overrides)
    atomic.write_text(path, room.html_page(prepared, tokenizer, count, seed))
    return path


def plan(run: RunFile, overrides: Sequence[str] = (), **machines: Any) -> dict[str, Any]:
    """What a run would do and need: steps, memory by part, the ways to run, time, checkpoints, DeepSpeed config.

    `machines`: the fields of `launch.preview.Asked` (`workers`, `nodes`, `gpus_per_node`, `gpu`, `gpu_memory`, `host_memory`, `nvme`,
    `network`, `price`, `node_hours`, `without_data`), sizes in bytes or as `80GB`. Prepares the data where it is not yet; looks at no
    GPU and no weights.
    `fits` in it says whether the run as it stands should fit. Raises UsageError, ConfigError, DataError, FitError.
    """
    from dstune.launch import preview, start

    asked = preview.Asked.of(**machines)
    loaded = _loaded(run, overrides)
    start.check(loaded)
    if preview.does_without_data(loaded, asked):
        return dict(preview.preview(loaded, None, asked))
    prepared = prepare(loaded)
    start.warn_of_few_rows(loaded, prepared)
    return dict(preview.preview(loaded, prepared, asked))


def train(
    run: RunFile,
    overrides: Sequence[str] = (),
    *,
    address: str | None = None,
    progress: bool = False,
    on_step: Hook | None = None,
    on_evaluate: Hook | None = None,
    on_commit: Hook | None = None,
) -> RunResult:
    """Start a new run and drive it to its end, or one that left nothing but its checkpoints (see `launch.adoption`).

    Raises UsageError where its directory exists already, or where the checkpoints there are another run's.
    """
    from dstune.launch import rundir

    loaded = _loaded(run, overrides)
    paths = _create(loaded, progress)
    return _drive(rundir.load(paths), paths, address, progress, (on_step, on_evaluate, on_commit))


def resume(
    run: str | Path,
    overrides: Sequence[str] = (),
    *,
    address: str | None = None,
    progress: bool = False,
    on_step: Hook | None = None,
    on_evaluate: Hook | None = None,
    on_commit: Hook | None = None,
) -> RunResult:
    """Go on from the newest committed step, with overrides that do not touch the data order (see `rundir.change`)."""
    loaded, paths = _found_again(run, overrides, progress)
    if (done := _finished(loaded, paths)) is not None:
        return done
    return _drive(loaded, paths, address, progress, (on_step, on_evaluate, on_commit))


def drive(run_directory: str | Path, *, address: str | None = None, progress: bool = False) -> RunResult:
    """Start or continue a run directory as it stands: what Slurm batches and Ray jobs execute."""
    from dstune.launch import rundir

    paths = rundir.find(run_directory)
    return _drive(rundir.load(paths), paths, address, progress, (None, None, None), ("planned", "queued"))


def work(run: str | Path, overrides: Sequence[str] = ()) -> int:
    """This process's part of a run that torchrun or srun started; worker 0's process drives it too. The exit status.

    A run file starts a new run; a run directory (or a restart by torchrun or Slurm itself) goes on with one. On CPUs start your program
    as `engine.heap.at_start` says: memory is planned for that.
    """
    from dstune import worker
    from dstune.engine.threads import compute_here
    from dstune.launch import bare, rundir, start
    from dstune.launch.driver import DriveLimits
    from dstune.launch.observers import Watcher

    compute_here(1)  # worker 0 plans in this thread, and trains in another
    world = worker.joining_world()
    if world.rank != 0:
        bare.take_environment(run, overrides)
        return worker.follow(world)
    paths = rundir.find(run) if bare.exists(run) else _create(_loaded(run, overrides))
    loaded = rundir.load(paths)
    prepared = start.open_prepared(loaded, paths)
    executor = bare.JoinedExecutor(world.world_size, lambda directory, attempt: worker.lead(world, directory, attempt))
    limits = DriveLimits(workers_wanted=world.world_size, workers_min=world.world_size, max_failures=0)
    with Watcher(start.total_steps(loaded, prepared), loaded.config.report.console) as observe:
        return start.drive_with(loaded, paths, prepared, executor, limits, observe, restarts=False).exit_status


def status(run: str | Path) -> dict[str, Any]:
    """Where a run stands, wherever it was submitted, and what was predicted of its newest attempt beside what was measured."""
    from dstune.launch import comparison, rundir, submission

    paths = rundir.find(run)
    found = submission.status(paths)
    return found | (comparison.compared(paths, int(found["attempt"])) or {})


def logs(run: str | Path, *, follow: bool = False, rank: int | None = None) -> Iterator[str]:
    """What the driver (or the worker of `rank`) wrote; `follow` goes on until the run ends."""
    from dstune.launch import rundir, submission

    return submission.logs(rundir.find(run), follow=follow, rank=rank)


def stop(run: str | Path, *, wait: bool = False) -> dict[str, Any]:
    """Ask for a checkpoint and a stop at the end of the step; the status then."""
    from dstune.launch import rundir, submission

    return submission.stop(rundir.find(run), wait=wait)


def submit(
    run: RunFile,
    to: str,
    overrides: Sequence[str] = (),
    *,
    site: str | None = None,
    address: str | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Prepare the data, make the run directory and hand the run to Ray Jobs or Slurm; where it went (or what would be sent)."""
    from dstune.launch import rundir, start, submission

    loaded = _loaded(run, overrides)
    start.check(loaded)
    where = start.site_of(loaded, site)
    if dry_run:
        return {"would_send": submission.describe(rundir.run_paths(loaded), loaded.config, to, where, address)}
    paths = _create(loaded)
    return submission.submit(paths, loaded.config, to, where, address)


def resubmit(
    run: str | Path, to: str, overrides: Sequence[str] = (), *, site: str | None = None, address: str | None = None
) -> dict[str, Any]:
    """`resume`, but as a Ray job or a Slurm batch."""
    from dstune.launch import start, submission

    loaded, paths = _found_again(run, overrides)
    return submission.submit(paths, loaded.config, to, start.site_of(loaded, site), address)


def import_deepspeed(
    run: RunFile, directory: str | Path, *, tag: str | None = None, step: int | None = None, skip_objects: bool = False
) -> dict[str, Any]:
    """Commit a DeepSpeed checkpoint (ZeRO 1, 2, 3; weights and moments) into a run that has no history; what was made of it.

    `step`: where the run then stands (default: DeepSpeed's count). Raises CheckpointError, UsageError, ConfigError, DataError.
    """
    from dstune.launch import importing

    return asdict(importing.import_deepspeed(run, prepare, Path(directory), tag, step, skip_objects))


def evaluate(
    model: str | Path, tasks: str | Path, *, out: str | Path | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Generate answers for every task of a tasks file and score them; results, and files in `out`."""
    from dstune.evaluation.evaluate import evaluate as run_tasks

    return run_tasks(str(model), Path(tasks), Path(out) if out is not None else None, overwrite=overwrite)


def results_table(results: dict[str, Any]) -> "RenderableType":
    """Evaluation results as a table for rich."""
    from dstune.evaluation.table import results_table as table

    return table(results)


def chat(
    model: str | Path,
    *,
    system: str | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    template: str = "auto",
    dtype: str = "auto",
    device: str = "auto",
    as_json: bool = False,
) -> int:
    """Talk to a model in this terminal (or answer the questions on stdin, one a line); the exit status."""
    from dstune import chatting

    return chatting.chat(
        str(model),
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        as_json=as_json,
        template=template,
        dtype=dtype,
        device=device,
    )


def _loaded(run: RunFile, overrides: Sequence[str]) -> LoadedRun:
    if isinstance(run, LoadedRun):
        if overrides:
            raise UsageError("overrides go with a run file, not with a run that is loaded already")
        return run
    return load_run(run, overrides)


def _create(loaded: LoadedRun, progress: bool = False) -> "RunPaths":
    """Everything that can be wrong is found before the run directory is made; the data is ready when it is there."""
    from dstune.launch import adoption, rundir, start

    rundir.refuse_existing(loaded)
    start.check(loaded)
    return adoption.create(loaded, lambda run: prepare(run, progress=progress))


def _found_again(run: str | Path, overrides: Sequence[str], progress: bool = False) -> tuple[LoadedRun, "RunPaths"]:
    """A run that exists, with overrides put over it; or one that left its checkpoints alone, in a new directory."""
    from dstune.launch import adoption, control, rundir, start
    from dstune.launch.driver import driver_lock

    if adoption.lost(run):
        paths = _create(load_run(run, overrides), progress)
        return rundir.load(paths), paths
    paths = rundir.find(run)
    with driver_lock(paths):
        loaded = rundir.change(paths, list(overrides), start.check)
        control.clear(paths)
    return loaded, paths


def _drive(
    loaded: LoadedRun,
    paths: "RunPaths",
    address: str | None,
    progress: bool,
    hooks: Sequence[Hook | None],
    waiting: Sequence[str] = ("planned",),
) -> RunResult:
    """`waiting`: states in which a run is that nobody drives yet."""
    from dstune.launch import comparison, start
    from dstune.launch.driver import last_attempt
    from dstune.launch.observers import Watcher
    from dstune.launch.status import told

    with told(paths, waiting):
        prepared = start.open_prepared(loaded, paths)
        shown = loaded.config.report.console if progress else None
        with Watcher(start.total_steps(loaded, prepared), shown, *hooks) as observe:
            observe.say(f"starting Ray{' at ' + address if address else ''} and the workers; logs: {paths.logs}")
            end: DriveEnd = start.start(loaded, paths, prepared, address, observe)
    compared = comparison.compared(paths, last_attempt(paths))
    return RunResult(loaded.config.name, str(paths.root), end.state, end.step, end.exit_status, end.message, compared)


def _finished(loaded: LoadedRun, paths: "RunPaths") -> RunResult | None:
    """The result of a run that has nothing left to do; no worker is started for it."""
    from dstune.launch import start

    if (step := start.finished_at(loaded, paths)) is None:
        return None
    return RunResult(loaded.config.name, str(paths.root), "succeeded", step, EXIT_DONE, "every step was done already")


def _previewed(run: RunFile, overrides: Sequence[str]) -> tuple["Prepared", Any]:
    """The prepared data of a run file, or an existing prepared directory, with its tokenizer."""
    from dstune.data import preview as room
    from dstune.data.tokenize import load_tokenizer

    if not isinstance(run, LoadedRun) and Path(run).is_dir():
        return room.opened(run)
    loaded = _loaded(run, overrides)
    return prepare(loaded), load_tokenizer(loaded.config.model, loaded.base)
