"""A run whose workers torchrun or srun started, without Ray: worker 0's process drives, and every process works."""

import contextlib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from dstune.config.load import load_run
from dstune.errors import DstuneError
from dstune.launch import rundir, start
from dstune.protocols import AttemptOutcome

_RESTART_COUNTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")


class JoinedExecutor:
    """`protocols.Executor` over workers that are there already: `work(run_directory, attempt)` is this process's part.

    One attempt only: when it failed, whoever started the workers (torchrun's `--max-restarts`, Slurm's requeue) starts again.
    """

    def __init__(self, world_size: int, work: Callable[[str, int], None]) -> None:
        self._world_size, self._work = world_size, work
        self._killed = threading.Event()

    def available_workers(self) -> int:
        return self._world_size

    def run(self, run_directory: str, attempt: int, world_size: int, environment: Mapping[str, str]) -> AttemptOutcome:
        os.environ.update(environment)
        try:
            self._work(run_directory, attempt)
        except DstuneError as error:
            return AttemptOutcome("failed", str(error), (0,))
        except Exception as error:  # noqa: BLE001 - its traceback is in the run directory; the driver reads the cause there
            return AttemptOutcome("failed", f"{type(error).__name__}: {error}", (0,))
        return AttemptOutcome("finished")

    def kill(self) -> None:
        """End this process at once; whoever started the workers ends the others."""
        os._exit(1)

    def close(self) -> None:
        """Nothing to give back: the workers are not ours."""


def restarted() -> bool:
    """Whether the workers' own launcher started them again after a failure: then an existing run is gone on with."""
    return any(os.environ.get(name, "0") not in ("", "0") for name in _RESTART_COUNTS)


def take_environment(run: str | Path, overrides: Sequence[str]) -> None:
    """Put what the run's site file sets for every worker into this process's environment, before it joins the others.

    What is wrong with the run is worker 0's to say.
    """
    with contextlib.suppress(DstuneError):
        loaded = rundir.load(rundir.find(run)) if exists(run) else load_run(run, overrides)
        os.environ.update(start.site_of(loaded).env)


def exists(run: str | Path) -> bool:
    """Whether `run` names a run that is there, rather than a run file to start."""
    return Path(run).is_dir() or (restarted() and rundir.exists(run))
