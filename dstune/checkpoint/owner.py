"""Of which run the checkpoints in a directory are. A file beside them says so, and one of another run there counts as damaged.

A checkpoint can be whole and still be the wrong one: copied from a run with another seed, or written by a run of the same name that
uses the same `checkpoint.dir`.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dstune.atomic import write_json
from dstune.config import identity
from dstune.config.schema import RunConfig
from dstune.errors import Problem, UsageError
from dstune.paths import owner_file, step_of

_ELSEWHERE = ("model.path", "model.tokenizer", "model.revision", "model.start")
"""Keys that say where files are: what a checkpoint holds does not change with them."""


@contextlib.contextmanager
def claimed(checkpoints: Path, config: RunConfig, prepared: str) -> Iterator[None]:
    """The directory is this run's (`prepared`: its data's fingerprint), and nobody else drives a run on it meanwhile.

    Raises UsageError where somebody does, or where another run's checkpoints are kept.
    """
    checkpoints.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(checkpoints, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _lock(descriptor, checkpoints)
        _refuse_others(checkpoints, config, prepared)
        write_json(
            owner_file(checkpoints), {"prepared": prepared, "config": config.model_dump(mode="json", by_alias=True)}
        )
        yield
    finally:
        os.close(descriptor)


def _refuse_others(checkpoints: Path, config: RunConfig, prepared: str) -> None:
    said = strange(checkpoints, identity.fingerprints(config, prepared))
    if said and any(step_of(path) is not None for path in checkpoints.iterdir()):
        came = f"holds checkpoints of another run; seen from there, this one {said}"
        raise UsageError(
            Problem(str(checkpoints), came, do="another `name:` or another `checkpoint.dir` keeps them apart")
        )


def _lock(descriptor: int, checkpoints: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        do = "another `name:` or another `checkpoint.dir` keeps them apart"
        raise UsageError(Problem(str(checkpoints), "another run writes its checkpoints there", do=do)) from None
    except OSError:
        return  # a file system without locks on directories (NFS)


def strange(checkpoints: Path, fingerprints: Mapping[str, Any]) -> str:
    """What shows that a checkpoint there, with these fingerprints, is another run's; empty where nothing does."""
    try:
        ours = json.loads(owner_file(checkpoints).read_text(encoding="utf-8"))
        config = RunConfig.model_validate(ours["config"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""  # nobody has claimed it, or an older or a newer dstune did
    prepared = fingerprints.get("prepared")
    if prepared not in (None, ours.get("prepared")):
        return "is of a run on other data"
    differing = {key: pair for key, pair in identity.differences(fingerprints, config).items() if key not in _ELSEWHERE}
    said = ", ".join(f"{key} {before!r} (here {now!r})" for key, (before, now) in list(differing.items())[:3])
    return f"is of another run: {said}" if said else ""
