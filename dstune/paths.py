"""Every file name that dstune writes, spelled once: run directories, checkpoints, prepared data, caches and shipped files."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

_STEP_DIRECTORY = re.compile(r"step-([0-9]{8}|[1-9][0-9]{8,})")


@dataclass(frozen=True)
class RunPaths:
    """The files of one run directory (`runs/<name>/`)."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def env(self) -> Path:
        return self.root / "env.json"

    @property
    def submission(self) -> Path:
        return self.root / "submission.json"

    @property
    def status(self) -> Path:
        return self.root / "status.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def evaluations(self) -> Path:
        return self.root / "evaluations.jsonl"

    @property
    def events(self) -> Path:
        return self.root / "events.jsonl"

    @property
    def lock(self) -> Path:
        """Held (flock) by the driver for as long as it lives: two drivers never share a run."""
        return self.root / "driver.lock"

    @property
    def control(self) -> Path:
        return self.root / "control"

    @property
    def stop_request(self) -> Path:
        return self.control / "stop.json"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def verified(self) -> Path:
        """Which checkpoints were read to the last byte, and when (`checkpoint.verified`)."""
        return self.root / "verified.json"

    @property
    def export(self) -> Path:
        return self.root / "export"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def driver_log(self) -> Path:
        return self.logs / "driver.log"

    def rank_log(self, rank: int) -> Path:
        return self.logs / f"rank-{rank}.log"

    @property
    def errors(self) -> Path:
        return self.root / "errors"

    def rank_error(self, rank: int) -> Path:
        """The full traceback of this rank's failure."""
        return self.errors / f"rank-{rank}.txt"

    def rank_trace(self, rank: int) -> Path:
        """What torch's profiler saw of this rank's steps (`train.profile`)."""
        return self.root / "profile" / f"rank-{rank}.json"

    def rank_failure(self, attempt: int, rank: int) -> Path:
        """The same failure as JSON: time, rank, node, kind, message. Earliest time = root cause."""
        return self.attempt(attempt) / f"failure-{rank}.json"

    @property
    def attempts(self) -> Path:
        return self.root / "attempts"

    def attempt(self, number: int) -> Path:
        return self.attempts / str(number)

    def plan(self, attempt: int) -> Path:
        return self.attempt(attempt) / "plan.json"

    def ds_config(self, attempt: int) -> Path:
        return self.attempt(attempt) / "ds_config.json"

    def outcome(self, attempt: int) -> Path:
        """How the workers ended, written by worker 0 at the end of its loop; absent after a crash."""
        return self.attempt(attempt) / "outcome.json"

    @property
    def workers_lock(self) -> Path:
        """Held (flock, shared) by every worker for as long as it lives: an attempt starts when nobody holds it."""
        return self.control / "workers.lock"

    def workers(self, attempt: int) -> Path:
        """Which process is which rank: a list of {"rank", "node", "pid", "started"}, written by the executor."""
        return self.attempt(attempt) / "workers.json"

    def make(self) -> None:
        """Create the directory and its folders."""
        for folder in (self.root, self.control, self.checkpoints, self.logs, self.errors, self.attempts):
            folder.mkdir(parents=True, exist_ok=True)


@dataclass(frozen=True)
class CheckpointPaths:
    """The files of one committed checkpoint (`checkpoints/step-00000200/`)."""

    root: Path

    def shard(self, rank: int, world_size: int) -> Path:
        return self.root / f"shard-{rank:05d}-of-{world_size:05d}.safetensors"

    @property
    def state(self) -> Path:
        return self.root / "state.json"

    @property
    def manifest(self) -> Path:
        return self.root / "manifest.json"


def step_directory(checkpoints: Path, step: int) -> Path:
    """Where the committed checkpoint of `step` stands."""
    return checkpoints / f"step-{step:08d}"


def owner_file(checkpoints: Path) -> Path:
    """Whose run's checkpoints are in this directory."""
    return checkpoints / "run.json"


def step_of(directory: Path) -> int | None:
    """The step of a committed checkpoint's directory name; None for any other name (temporary ones among them)."""
    match = _STEP_DIRECTORY.fullmatch(directory.name)
    return int(match.group(1)) if match else None


@dataclass(frozen=True)
class PreparedPaths:
    """The files of one prepared directory."""

    root: Path

    def data(self, shard: int, num_shards: int) -> Path:
        return self.root / f"data-{shard:05d}-of-{num_shards:05d}.arrow"

    @property
    def rows(self) -> Path:
        return self.root / "rows.arrow"

    @property
    def manifest(self) -> Path:
        return self.root / "manifest.json"

    @property
    def rejects(self) -> Path:
        return self.root / "rejects.jsonl"

    @property
    def dataset_info(self) -> Path:
        return self.root / "dataset_info.json"

    @property
    def dataset_state(self) -> Path:
        return self.root / "state.json"

    @property
    def validation(self) -> Path:
        return self.root / "validation"


def is_address(written: str) -> bool:
    """Whether a run file names a place by an address (`s3://…`) rather than a path."""
    return "://" in written


def cache_directory() -> Path:
    """`$DSTUNE_CACHE`, or `~/.cache/dstune` (`$XDG_CACHE_HOME` respected)."""
    if chosen := os.environ.get("DSTUNE_CACHE"):
        return Path(chosen).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dstune"


def selection_scores(base: str, method: str, digest: str) -> Path:
    """The scores of one choice among the examples of the prepared directory named `base`: beside it in the cache."""
    return cache_directory() / "prepared" / f"{base}.{method}-{digest}.arrow"


def selection_losses(base: str, digest: str) -> Path:
    """The folder of a model's losses on these examples, in chunks."""
    return cache_directory() / "prepared" / f"{base}.losses-{digest}"


def model_sizes(digest: str) -> Path:
    """What planning counted of a model."""
    return cache_directory() / "sizes" / f"{digest}.json"


def config_directory() -> Path:
    """Where a user's site files are looked up after the run file's own directory."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "dstune"


def shared_files(kind: str) -> Path:
    """The directory of shipped files of `kind` (`ds_configs`, `cluster`): inside an installed wheel, or in the checkout."""
    installed = Path(__file__).parent / "_share" / kind
    return installed if installed.is_dir() else Path(__file__).parent.parent / kind


def builtin_model(name: str) -> Path:
    """The directory with the config.json of `builtin:NAME`; whether it exists says whether there is such a model."""
    return Path(__file__).parent / "model" / "builtin" / name
