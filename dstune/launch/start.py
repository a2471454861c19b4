"""From a run file to a driven run: the data prepared and checked, the directory made, each attempt planned, the driver started."""

import glob
import secrets
import shutil
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstune.checkpoint.owner import claimed
from dstune.checkpoint.remote import Store
from dstune.config.load import LoadedRun, load_site
from dstune.config.schema import ClusterSection, RunConfig, SiteConfig
from dstune.data import order
from dstune.data.shards import Prepared
from dstune.data.task import is_seq2seq, packs, vocabulary_size
from dstune.errors import CheckpointError, ConfigError, DataError, Problem, UsageError
from dstune.launch import forecast, machine, rundir
from dstune.launch.attempts import DriveLimits
from dstune.launch.driver import DriveEnd, Observer, drive
from dstune.launch.local import RayExecutor
from dstune.launch.ray_pool import prepared_where_asked
from dstune.launch.sizes import sizes
from dstune.launch.status import read_status
from dstune.loggers import get_logger
from dstune.paths import RunPaths
from dstune.planning import deepspeed, hardware, plan, reachable, reasons
from dstune.protocols import Executor
from dstune.records.sinks import EventLog
from dstune.selection.choose import prepared as prepare

log = get_logger(__name__)

_UNKNOWN = "the machines are not known here: `cluster.gpu` names their GPUs for the planner"

_LAYOUTS: dict[tuple[bool, bool], plan.Layout] = {
    (False, False): "padded",
    (False, True): "packed",
    (True, False): "seq2seq",
    (True, True): "packed-seq2seq",
}
"""By whether the model is a sequence-to-sequence one, and whether rows are packed."""


@dataclass(frozen=True)
class Planner:
    """Writes the plan of each attempt of one run (`driver.MakePlan`)."""

    run: LoadedRun
    paths: RunPaths
    data: plan.DataFacts
    elsewhere: bool = False
    """Whether workers may be on other machines than this one."""
    by_ray: bool = True
    """Whether Ray starts them."""

    def __call__(self, attempt: int, world_size: int, resume_from: Path | None, start_step: int) -> plan.Plan:
        run, base = self.run, self.run.base
        plan.require_rows(run.config, world_size)
        seen = self._forecast(world_size)
        config = seen.config if seen else run.config
        steps = order.num_steps(self.data.total_positions, config.train.global_batch_size)
        made = plan.make(
            config,
            base,
            self.data,
            attempt=attempt,
            world_size=world_size,
            checkpoints=rundir.checkpoints_of(config, base, self.paths),
            store=rundir.store_of(config),
            store_owner=rundir.environment(self.paths).get("store_owner"),
            resume_from=resume_from,
            start_step=start_step,
            cpus_per_worker=machine.cores_of_worker(config.cluster, self.elsewhere),
            gpus=not seen.cluster.device.is_cpu if seen else config.cluster.gpus_per_node is not None,
            why=seen.why if seen else _UNKNOWN,
            predicted=seen.predicted(steps) if seen else None,
        )
        ds_config = deepspeed.make(config, base)
        plan.write(made, ds_config, self.paths)
        if came := reachable.left_out(ds_config, world_size):
            log.warning("%s", came)
        told = {"plan": described(made), "why": made.why, "predicted": made.predicted}
        EventLog(self.paths.events).event("planned", attempt=attempt, **told)
        return made

    def _forecast(self, world_size: int) -> forecast.Forecast | None:
        """What the workers should take; None where their machines are not known."""
        cluster = machine.cluster_of(self.run.config, world_size, self.elsewhere, self.by_ray)
        if cluster is None:
            return None
        rows = forecast.Rows.of(Prepared.open(self.data.directory))
        seen = forecast.forecast(self.run, sizes(self.run.config, self.run.base, cluster.device.kind), rows, cluster)
        self._check_fit(seen)
        return seen

    def _check_fit(self, seen: forecast.Forecast) -> None:
        if self.run.config.deepspeed.preset == "auto":
            seen.require_fit()
        elif not seen.this.fits:
            log.warning("%s is not expected to fit: it lacks %s", reasons.named(seen.this), reasons.lacking(seen.this))


def described(made: plan.Plan) -> str:
    """What a plan chose, in one line."""
    again = {False: "", True: ", recomputing activations", "offload": ", recomputing activations from host memory"}
    batches = f"{made.micro_batches} x {made.micro_batch_size} rows a worker and step"
    return f"{made.preset}, {batches}{again[made.activation_checkpointing]}"


def data_facts(config: RunConfig, prepared: Prepared) -> plan.DataFacts:
    """What a plan needs to know of the data."""
    settings = prepared.manifest["settings"]
    positions = order.total_positions(
        prepared.num_rows, config.train.epochs, config.train.max_steps, config.train.global_batch_size
    )
    return plan.DataFacts(
        directory=prepared.root,
        fingerprint=prepared.fingerprint,
        num_rows=prepared.num_rows,
        total_positions=positions,
        has_validation=prepared.manifest["validation"] is not None,
        layout=_LAYOUTS[settings["seq2seq"], settings["packing"]],
    )


def total_steps(run: LoadedRun, prepared: Prepared) -> int:
    """Steps of the whole run."""
    return order.num_steps(data_facts(run.config, prepared).total_positions, run.config.train.global_batch_size)


def finished_at(run: LoadedRun, paths: RunPaths) -> int | None:
    """The last step of a run that has nothing left to do; None where there is more, or its data is gone."""
    try:
        status, noted = read_status(paths), rundir.environment(paths).get("prepared")
    except UsageError as error:
        log.warning("%s", error)  # what a driver writes for others to read is nothing that a run needs
        return None
    if status["state"] != "succeeded" or noted is None or not Path(noted["directory"]).is_dir():
        return None
    step = int(status["step"])
    return step if step >= total_steps(run, Prepared.open(noted["directory"])) else None


def check(run: LoadedRun) -> None:
    """Find what is wrong with a run before anything slow is done for it. Raises ConfigError, FitError."""
    _check_pieces(run, deepspeed.make(run.config, run.base))
    if not isinstance(run.config.model.kernels, str):
        from dstune.model.kernels import choice

        choice.require_known(run.config.model)
    layout = _layout(run)
    if _asks_of_the_model(run.config):
        from dstune.model import requirements

        named = run.config.cluster.gpu
        requirements.require(run.config, run.base, layout, hardware.find_device(named) if named else None)
    if run.config.cluster.sequence_parallel > 1:
        require_sharing(run)
    if run.config.cluster.tensor_parallel > 1:
        from dstune.model import tensor_parallel
        from dstune.model.config import load_config

        model = run.config.model
        tensor_parallel.prove(model, load_config(model, run.base), run.config.cluster.tensor_parallel)
    if run.config.checkpoint.best and not run.config.data.validation and run.config.data.prepared is None:
        came = "no rows are held out: no checkpoint would ever be the best"
        raise ConfigError(Problem("checkpoint.best", came, "a share for data.validation, such as 0.01"))
    plan.require_rows(run.config, workers_range(run.config.cluster, 1)[0])
    model, freeze = run.config.model, run.config.train.freeze
    if model.adapter is not None or model.new_tokens or freeze:
        from dstune.model.footprint import footprint

        footprint(model, run.base, freeze)


def _check_pieces(run: LoadedRun, ds_config: Mapping[str, Any]) -> None:
    """As far as it is known here how many workers there will be at most; each attempt's plan looks again."""
    zero = ds_config["zero_optimization"]
    if "buffer_size" in (zero.get("offload_param") or {}) or zero.get(reachable.QUANTIZED_WEIGHTS):
        most = workers_range(run.config.cluster, local_gpus() or 1)[1]
        forecast.require_pieces(run.config, ds_config, sizes(run.config, run.base, "cpu"), most)


def require_sharing(run: LoadedRun) -> None:
    """Raises ConfigError where the model, or rows as they will be prepared, cannot be cut over `cluster.sequence_parallel` workers."""
    from dstune.model import sequence_parallel
    from dstune.model.config import load_config

    model, layout = run.config.model, _layout(run)
    sequence_parallel.prove(model, load_config(model, run.base), run.config.cluster.sequence_parallel)
    if layout is not None:
        plan.require_shareable(run.config, layout)


def _asks_of_the_model(config: RunConfig) -> bool:
    """Whether there is anything that an architecture may not have. Looking for it loads torch; dstune's own models have the usual."""
    model = config.model
    asked = (model.compile, model.mlp_tile, model.attention) != ("off", "off", "auto") or model.fp8
    return bool(asked or config.train.lr_scales or not model.path.startswith("builtin:"))


def _layout(run: LoadedRun) -> plan.Layout | None:
    """Of rows that will be prepared."""
    if run.config.data.prepared is not None:
        return None
    packing = run.config.data.packing
    packed = packs(run.config.model, run.base) if packing == "auto" else packing
    return _LAYOUTS[is_seq2seq(run.config.model, run.base), packed]


def reached_store(config: RunConfig, new: bool = False, owner: str | None = None) -> Store | None:
    """The store that the run's checkpoints go to, found to take objects; None where they stay on a disk.

    Raises ConfigError where it does not take them, UsageError where it holds checkpoints already and the run is `new`,
    CheckpointError where it was taken over from `owner`.
    """
    address = rundir.store_of(config)
    if address is None:
        return None
    store = Store(address, owner=owner)
    store.probe()
    store.require_ours()
    if new and (steps := store.committed()):
        came = f"holds checkpoints of a run of this name already (the newest of step {steps[-1]})"
        raise UsageError(Problem(address, came, do="another `name:` or another `checkpoint.dir` starts a new run"))
    return store


def warn_of_few_rows(run: LoadedRun, prepared: Prepared) -> None:
    """A step that takes every row several times is seldom what was meant."""
    batch = run.config.train.global_batch_size
    if prepared.num_rows < batch:
        log.warning(
            "the data makes %d rows of up to %d tokens, and a step takes %d: each step sees every row more than once; "
            "lower train.global_batch_size or data.max_length, or bring more data",
            prepared.num_rows, run.config.data.max_length, batch,
        )  # fmt: skip


def require_vocabulary(run: LoadedRun, prepared: Prepared) -> None:
    """Every token must have an embedding: another model's tokenizer is found before a worker meets it. Raises ConfigError."""
    known = vocabulary_size(run.config.model, run.base)
    largest = prepared.largest_token()
    if known is not None and largest >= known:
        came = f"the data holds token {largest}, the model has embeddings for {known}"
        raise ConfigError(Problem("model.tokenizer", came, "the tokenizer that the model was trained with"))


def create(run: LoadedRun, prepared: Prepared) -> RunPaths:
    """The directory of a new run with its data, once the two are known to fit; its store is this directory's from now on.

    Raises ConfigError, UsageError, CheckpointError.
    """
    require_vocabulary(run, prepared)
    warn_of_few_rows(run, prepared)
    paths = rundir.create(run)
    rundir.note(paths, prepared={"directory": str(prepared.root), "fingerprint": prepared.fingerprint})
    if address := rundir.store_of(run.config):
        owner = secrets.token_hex(8)
        rundir.note(paths, store_owner=owner)
        try:
            Store(address, owner=owner).claim(socket.gethostname())
        except CheckpointError:
            shutil.rmtree(paths.root)
            raise
    return paths


def open_prepared(run: LoadedRun, paths: RunPaths) -> Prepared:
    """The data of a run that exists, every hash checked; prepared again where its directory is gone (the same, byte for byte)."""
    noted = rundir.environment(paths).get("prepared")
    if noted is None or not Path(noted["directory"]).is_dir():
        prepared = prepare(run.config, run.base, preparation=prepared_where_asked)
        if noted is not None and prepared.fingerprint != noted["fingerprint"]:
            came = f"{prepared.root} is not what the run was started with ({noted['directory']}, which is gone)"
            raise DataError(f"{came}\n    the sources, the tokenizer or the settings have changed since")
    else:
        prepared = Prepared.open(noted["directory"])
    prepared.verify()
    rundir.note(paths, prepared={"directory": str(prepared.root), "fingerprint": prepared.fingerprint})
    return prepared


def start(run: LoadedRun, paths: RunPaths, prepared: Prepared, address: str | None, observe: Observer) -> DriveEnd:
    """Drive the run until it ends, on an embedded Ray or the cluster at `address`."""
    cluster = run.config.cluster
    address = address or cluster.address
    least, most = workers_range(cluster, local_gpus() or 1)
    executor = RayExecutor(
        workers=most,
        cpus_per_worker=machine.cores_of_worker(cluster, elsewhere=address is not None),
        gpus=address is not None and (cluster.gpu is not None or cluster.gpus_per_node is not None),
        address=address,
        log_directory=paths.logs / "ray",
    )
    with executor:
        if address is not None and cluster.workers == "auto" and cluster.nodes is None:
            least, most = cluster.group, workers_range(cluster, executor.available_workers())[1]
        limits = DriveLimits(
            workers_wanted=most,
            workers_min=least,
            max_failures=cluster.max_failures,
            group=cluster.group,
        )
        return drive_with(run, paths, prepared, executor, limits, observe, elsewhere=address is not None)


def drive_with(
    run: LoadedRun,
    paths: RunPaths,
    prepared: Prepared,
    executor: Executor,
    limits: DriveLimits,
    observe: Observer,
    *,
    restarts: bool = True,
    elsewhere: bool = False,
) -> DriveEnd:
    """Drive the run until it ends, on workers that `executor` places. `restarts`: it can place them more than once; `elsewhere`: they
    may be on other machines.
    """
    checkpoints = rundir.checkpoints_of(run.config, run.base, paths)
    with claimed(checkpoints, run.config, prepared.fingerprint):
        return drive(
            paths,
            executor,
            Planner(run, paths, data_facts(run.config, prepared), elsewhere, isinstance(executor, RayExecutor)),
            limits,
            observe,
            checkpoints=checkpoints,
            store=reached_store(run.config, owner=rundir.environment(paths).get("store_owner")),
            workers_check=restarts,
            environment=site_of(run).env,
        )


def site_of(run: LoadedRun, name: str | None = None) -> SiteConfig:
    """The site file that the run, or the command line, names; an empty one where neither does."""
    chosen = name or run.config.site
    return load_site(chosen, run.base) if chosen else SiteConfig()


def workers_range(cluster: ClusterSection, auto: int) -> tuple[int, int]:
    """The least and the most workers that the run file allows; where it leaves the number open, `auto` in whole groups, one at least."""
    if cluster.nodes is not None:
        fixed = cluster.nodes * (cluster.gpus_per_node or 1)
        return fixed, fixed
    if cluster.workers == "auto":
        whole = max(1, auto // cluster.group) * cluster.group
        return whole, whole
    if isinstance(cluster.workers, int):
        return cluster.workers, cluster.workers
    return cluster.workers


def local_gpus() -> int:
    """NVIDIA GPUs of this machine that its workers get, found without importing torch."""
    found = [path for path in glob.glob("/dev/nvidia[0-9]*") if path.removeprefix("/dev/nvidia").isdigit()]  # noqa: PTH207
    return machine.visible(len(found))
