"""A run whose directory is lost, with its machine perhaps: found again by its run file, from the checkpoints that it left behind.

They are in a store, or in a directory of `checkpoint.dir`. A run goes on from them only where every one was saved by this very run:
the same name, model, settings and data. Where one was not, nothing is started, and nothing there is touched.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dstune.checkpoint import resolve
from dstune.checkpoint.layout import Manifest, load_manifest
from dstune.checkpoint.objects import Unavailable
from dstune.checkpoint.remote import Store
from dstune.config import identity
from dstune.config.load import LoadedRun, load_run
from dstune.data.shards import Prepared
from dstune.errors import CheckpointError, DataError, Problem, UsageError
from dstune.launch import rundir, start
from dstune.loggers import get_logger
from dstune.paths import RunPaths
from dstune.records.sinks import EventLog

log = get_logger(__name__)

_ANOTHER = "Another `name:` or another `checkpoint.dir` starts a new run."
_SHOWN_KEYS = 5


def lost(run: str | Path) -> bool:
    """Whether `run` is a run file without a run directory here, and with checkpoints. Raises CheckpointError where they cannot be read."""
    if Path(run).suffix not in (".yaml", ".yml") or rundir.exists(run):
        return False
    loaded = load_run(run)
    address = rundir.store_of(loaded.config)
    return bool(_left(loaded, Store(address) if address else None))


def create(run: LoadedRun, prepare: Callable[[LoadedRun], Prepared]) -> RunPaths:
    """The directory of a run that has none here: of a new one, or of one that goes on from the checkpoints that it left.

    `prepare` makes its data. Raises UsageError and DataError where the checkpoints are another run's, CheckpointError where they
    cannot be read; nothing was made then.
    """
    left = _left(run, start.reached_store(run.config))
    _require_same_run(run, left)
    prepared = prepare(run)
    for place, manifest in left.items():
        _require_same_data(place, manifest, prepared)
    paths = start.create(run, prepared)
    if left:
        newest = max(manifest.step for manifest in left.values())
        EventLog(paths.events).event("adopted", step=newest, checkpoints=list(left), run_file=str(run.file))
        store = rundir.store_of(run.config)
        where = store or rundir.checkpoints_of(run.config, run.base, paths)
        elsewhere = " Where it still runs elsewhere, its next upload is refused." if store else ""
        said = "%s: checkpoints of this run, up to step %d, and no run directory here: going on from the newest whole one.%s %s"
        log.warning(said, where, newest, elsewhere, _ANOTHER)
    return paths


def _left(run: LoadedRun, store: Store | None) -> dict[str, Manifest]:
    """The manifest of every committed checkpoint, by its place. Raises CheckpointError where there are some, and none can be read."""
    found: dict[str, Callable[[], Manifest]] = {}
    for one in resolve.committed(rundir.checkpoints_of(run.config, run.base, rundir.run_paths(run))):
        found[str(one.directory)] = lambda directory=one.directory: load_manifest(directory)
    for step in store.committed() if store else []:
        found[store.address_of(step)] = lambda store=store, step=step: store.manifest(step)
    manifests: dict[str, Manifest] = {}
    problems: list[Problem] = []
    for place, read in found.items():
        try:
            manifests[place] = read()
        except Unavailable:
            raise
        except CheckpointError as error:
            problems += error.problems
    if problems and not manifests:
        do = f"Whose checkpoints they are cannot be told. Bring one back from a copy. {_ANOTHER}"
        raise CheckpointError([*problems[:-1], Problem(problems[-1].where, problems[-1].came, do=do)])
    return manifests


def _require_same_run(run: LoadedRun, left: Mapping[str, Manifest]) -> None:
    """Raises UsageError with what differs, of the newest checkpoint that is another run's."""
    for place, manifest in sorted(left.items(), key=lambda item: -item[1].step):
        differing = identity.differences(manifest.fingerprints, run.config)
        if differing:
            keys = sorted(differing, key=lambda key: (key.count("."), key))
            shown = [f"{key} was {_words(differing[key][0])}, is {_words(differing[key][1])}" for key in keys]
            more = f" (and {len(shown) - _SHOWN_KEYS} more)" if len(shown) > _SHOWN_KEYS else ""
            came = f"holds a checkpoint of another run: {'; '.join(shown[:_SHOWN_KEYS])}{more}"
            do = f"Write these keys as they were, and the run goes on from there. {_ANOTHER}"
            raise UsageError(Problem(place, came, do=do))


def _require_same_data(place: str, manifest: Manifest, prepared: Prepared) -> None:
    recorded = manifest.fingerprints.get("prepared")
    if recorded != prepared.fingerprint:
        came = f"was trained on other data: {str(recorded)[:12]}…, and {prepared.root} is {prepared.fingerprint[:12]}…"
        do = (
            "The sources, the tokenizer, the template (or the day, where it writes the date) or the data's settings are others. Bring "
            f"the prepared directory over and name it in `data.prepared`. {_ANOTHER}"
        )
        raise DataError(Problem(place, came, "the very same prepared data", do))


def _words(value: Any) -> str:
    return "not there" if value is None else repr(value)
