"""Run directories: made once from a run file, found again by file, name or path, never silently continued or overwritten."""

import difflib
import glob
import json
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dstune.atomic import write_json, write_text
from dstune.config import identity
from dstune.config.load import LoadedRun, dump, load_run, resolve
from dstune.config.schema import RunConfig
from dstune.errors import Problem, UsageError
from dstune.launch.status import StatusFile
from dstune.loggers import get_logger
from dstune.paths import RunPaths
from dstune.records.sinks import EventLog

log = get_logger(__name__)

_PACKAGES = (
    "dstune",
    "torch",
    "deepspeed",
    "ray",
    "transformers",
    "datasets",
    "peft",
    "pyarrow",
    "numpy",
    "tokenizers",
)


def run_paths(run: LoadedRun) -> RunPaths:
    """The directory of the run that a run file describes (whether it is there or not)."""
    return RunPaths(resolve(run.config.runs_dir, run.base) / run.config.name)


def known(run: str | Path) -> tuple[RunPaths, LoadedRun]:
    """An existing run; or what a run file describes whose checkpoints go to a store, where they may be all that is left of it.

    Then there is no directory of it here. Raises as `find` and `load`.
    """
    if Path(run).suffix in (".yaml", ".yml") and not exists(run) and store_of((loaded := load_run(run)).config):
        return run_paths(loaded), loaded
    paths = find(run)
    return paths, load(paths)


def checkpoints_of(config: RunConfig, base: Path, paths: RunPaths) -> Path:
    """The directory on a disk where the run's checkpoints are committed, or staged on their way to the store."""
    written = config.checkpoint.directory
    return resolve(written, base) / config.name if written else paths.checkpoints


def store_of(config: RunConfig) -> str | None:
    """The address below which the run's checkpoints are uploaded; None where they stay on a disk."""
    address = config.checkpoint.address
    return f"{address.rstrip('/')}/{config.name}" if address else None


def refuse_existing(run: LoadedRun) -> None:
    """Raises UsageError where the run's directory is there already."""
    paths = run_paths(run)
    if paths.root.exists():
        problem = Problem(
            str(paths.root),
            "this run exists already",
            do=f"`dstune resume {paths.root}` goes on with it, or starts it, also with other key=value; another `name:` starts a new one",
        )
        raise UsageError(problem)


def exists(run_file: str | Path) -> bool:
    """Whether the run that a run file describes has been started."""
    return run_paths(load_run(run_file)).config.is_file()


def create(run: LoadedRun) -> RunPaths:
    """Make the run directory and write config.yaml and env.json. Raises UsageError where there is one already."""
    paths = run_paths(run)
    paths.root.parent.mkdir(parents=True, exist_ok=True)
    try:
        paths.root.mkdir()
    except FileExistsError:
        refuse_existing(run)
        raise
    paths.make()
    write_text(paths.config, dump(run.config))
    write_json(paths.env, _environment(run))
    StatusFile(paths).write(state="planned")
    return paths


def note(paths: RunPaths, **facts: Any) -> None:
    """Add facts to env.json (the prepared directory, say)."""
    write_json(paths.env, environment(paths) | facts)


def environment(paths: RunPaths) -> dict[str, Any]:
    """env.json: versions, the run file's place, the prepared directory. Raises UsageError where it is damaged."""
    try:
        noted = json.loads(paths.env.read_text(encoding="utf-8"))
    except ValueError as error:
        noted = error
    if not isinstance(noted, dict) or not isinstance(noted.get("base"), str):
        do = 'at least {"base": DIRECTORY} has to stand there: what the relative paths of the run file are relative to'
        raise UsageError(Problem(str(paths.env), f"is damaged: {noted}", do=do))
    return noted


def load(paths: RunPaths) -> LoadedRun:
    """The run as it was created (and changed by resumes): its config.yaml, relative to where its run file stood."""
    loaded = load_run(paths.config)
    return LoadedRun(loaded.config, Path(environment(paths)["base"]), paths.config)


def change(paths: RunPaths, overrides: list[str], check: Callable[[LoadedRun], None] = lambda run: None) -> LoadedRun:
    """Put overrides into config.yaml, where `check` finds nothing wrong with the run then. Raises what it raises, UsageError for a key
    that needs a new run.
    """
    before = load(paths)
    after = load_run(paths.config, overrides).config
    refused = [key for key in identity.changed(before.config, after) if not key.startswith(identity.MAY_CHANGE)]
    if refused:
        problem = Problem(
            ", ".join(refused),
            "a resume cannot change this",
            do=f"it may change {', '.join(identity.MAY_CHANGE)}; the others need a new run",
        )
        raise UsageError(problem)
    changed = LoadedRun(after, before.base, paths.config)
    if after != before.config:
        check(changed)
        write_text(paths.config, dump(after))
        _tell_change(paths, before.config, after)
    return changed


def _tell_change(paths: RunPaths, before: RunConfig, after: RunConfig) -> None:
    changed = identity.changed(before, after)
    EventLog(paths.events).event("config_changed", changed={key: list(pair) for key, pair in changed.items()})
    for key, (was, now) in changed.items():
        stays = "; the schedule is fitted to the new length" if key in ("train.epochs", "train.max_steps") else ""
        log.info("%s: %s -> %s%s", key, was, now, stays)


def find(run: str | Path) -> RunPaths:
    """The run directory that a run file, a run's name or a directory names. Raises UsageError with the nearest names."""
    path = Path(run)
    if path.is_dir() and RunPaths(path).config.is_file():
        return RunPaths(path.absolute())
    if path.suffix in (".yaml", ".yml"):
        paths = run_paths(load_run(path))
        if paths.config.is_file():
            return paths
        raise UsageError(
            Problem(str(run), f"this run has not been started (no {paths.root})", do=f"dstune train {run}")
        )
    named = Path("runs").absolute() / str(run)
    if RunPaths(named).config.is_file():
        return RunPaths(named)
    below = [
        path for path in sorted(Path.cwd().glob(f"*/runs/{glob.escape(str(run))}")) if RunPaths(path).config.is_file()
    ]
    if len(below) == 1:
        return RunPaths(below[0])
    known = (
        sorted(p.name for p in named.parent.glob("*") if RunPaths(p).config.is_file()) if named.parent.is_dir() else []
    )
    near = difflib.get_close_matches(str(run), known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"runs in {named.parent}: {', '.join(known) or 'none'}"
    raise UsageError(Problem(str(run), "no run of this name, and no run file or run directory", do=hint))


def _environment(run: LoadedRun) -> dict[str, Any]:
    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "run_file": str(run.file),
        "base": str(run.base),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "executable": sys.executable,
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
