"""What `dstune checkpoint` and `dstune export` do, as typed functions: `dstune.api` hands them on.

`RUN` is a run file, a run's name or its directory; of a run whose directory is lost, the run file finds what is in the store.
Functions raise `dstune.errors.DstuneError`s.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dstune.errors import CheckpointError, Problem, UsageError

if TYPE_CHECKING:
    from dstune.checkpoint.keeping import Rules
    from dstune.checkpoint.verified import Verified
    from dstune.checkpoint.whereabouts import Place
    from dstune.config.load import LoadedRun
    from dstune.paths import RunPaths


def export(
    run: str | Path,
    out: str | Path | None = None,
    *,
    step: str | int = "newest",
    dtype: str | None = None,
    weights: str = "fp32",
    to: str = "huggingface",
    merged: bool = False,
    max_shard_size: str | int | None = None,
    threads: int | None = None,
    push: str | None = None,
    public: bool = False,
) -> Path:
    """Write a committed checkpoint as a Hugging Face directory (or `to` another form); `push` it to the hub then. See `launch.exports`.

    `step`: a committed step, `newest`, `best`, or 0: the model as it was before the first step. `weights`: `fp32`, or `ema`, their
    average. `merged`: the whole model of a run with an adapter, and not the adapter alone. Raises UsageError, CheckpointError.
    """
    from dstune.launch import exports

    form = exports.Form(
        to=to, dtype=dtype, weights=weights, merged=merged, max_shard_size=max_shard_size, threads=threads
    )
    return exports.export(run, out, step, form, exports.Hub(push, public) if push else None)


def checkpoints(run: str | Path, *, verify: bool = False, progress: bool = False) -> dict[str, Any]:
    """What is committed, oldest first, with time, size, world, metrics and why it is kept; and what was left over.

    Where checkpoints go to a store, those that are there are listed too, with their address as `directory`: of a run whose own
    directory is lost (give its run file) these alone. `loss` is the held-out rows' as of this checkpoint, `train_loss` that of the
    step's own batch. `verify` reads every byte, past the page cache; what was read so before, or by a resume, has `verified_at`.
    """
    from dstune.atomic import read_json_lines
    from dstune.checkpoint import listing, whereabouts
    from dstune.checkpoint.keeping import Rules
    from dstune.launch import rundir
    from dstune.launch.status import driver_lives
    from dstune.records.console import ReadingProgress

    paths, loaded = rundir.known(run)
    places, record = _places(paths, loaded), _record(paths)
    found: list[dict[str, Any]] = []
    with ReadingProgress(shown=progress and verify) as show:
        for place in places:
            rows = place.rows(verify, show.more, verified=record)
            listing.add_reasons(rows, Rules.of(loaded.config.checkpoint))
            found += rows
    trained = {record.get("step"): record.get("loss") for record in read_json_lines(paths.metrics)}
    for row in found:
        row |= {"loss": row["metrics"].get("loss"), "train_loss": trained.get(row["step"])}
    return {
        "directory": places[0].name,
        "checkpoints": sorted(found, key=lambda row: row["step"]),
        "left_overs": [row for place in places for row in whereabouts.described(place, place.left_overs())],
        "driven": driver_lives(paths),
    }


def verify_checkpoints(run: str | Path, *, step: int | None = None, progress: bool = False) -> dict[str, Any]:
    """Read every byte of what is committed (or of one step), past the page cache, in the store too: what is wrong, and the speed.

    What is whole is remembered for `checkpoints`. Raises CheckpointError where `step` is not committed.
    """
    from dstune.launch import rundir
    from dstune.records.console import ReadingProgress

    paths, loaded = rundir.known(run)
    places, record = _places(paths, loaded), _record(paths)
    committed = {place: place.steps() for place in places}
    sizes = [place.size(one) for place, steps in committed.items() for one in steps if step in (None, one)]
    if step is not None and not sizes:
        known = sorted({one for steps in committed.values() for one in steps})
        expected = f"one of: {', '.join(map(str, known)) or 'none'}"
        raise CheckpointError(Problem(_names(places), f"no committed step '{step}'", expected))
    with ReadingProgress(sum(sizes), shown=progress) as show:
        rows = [row for place in places for row in place.rows(True, show.more, step, record)]
    rows.sort(key=lambda row: row["step"])
    return {
        "directory": places[0].name,
        "checkpoints": rows,
        "bytes_read": show.bytes,
        "seconds": round(show.seconds, 3),
        "newest_whole": max((row["step"] for row in rows if row["verified"]), default=None),
    }


def prune_checkpoints(
    run: str | Path,
    *,
    keep: int | None = None,
    keep_every: int | None = None,
    best: str | None = None,
    best_mode: Literal["min", "max"] | None = None,
    dry_run: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Delete what the run's retention lets go, or these rules in its place, once a newer checkpoint was read back whole.

    The directory and the store are pruned each by itself; in a store the manifest goes first. Also what interrupted saves left
    behind, where nobody runs. Beside a running training it is safe: what a resume may start from stays. Raises UsageError for
    rules that cannot be meant.
    """
    from dstune.checkpoint import whereabouts
    from dstune.checkpoint.keeping import Rules
    from dstune.launch import rundir
    from dstune.launch.driver import deserted
    from dstune.records.console import ReadingProgress
    from dstune.records.sinks import EventLog

    paths, loaded = rundir.known(run)
    places, record, here = _places(paths, loaded), _record(paths), paths.config.is_file()
    asked = {"keep": keep, "keep_every": keep_every, "best": best, "best_mode": best_mode}
    rules = replace(
        Rules.of(loaded.config.checkpoint), **{name: value for name, value in asked.items() if value is not None}
    )
    _require_sense(rules, places)
    with ReadingProgress(shown=progress) as show:
        plans = [(place, place.plan(rules, show.more)) for place in places]
    done: dict[str, list[Any]] = {}
    with deserted(paths) if here else contextlib.nullcontext(False) as nobody:
        for place, planned in plans:
            account = whereabouts.carry_out(place, planned, nobody, dry_run)
            done = {key: done.get(key, []) + value for key, value in account.items()}
            gone = [one["step"] for one in account["deleted"]]
            record.note({}, [place.address_of(step) for step, findings in planned.looks if findings])
            if not dry_run and (gone or account["left_overs"]):
                record.note({}, map(place.address_of, gone))
                if here:
                    EventLog(paths.events).event(place.event, steps=gone, by="prune")
    return {
        "directory": places[0].name,
        "dry_run": dry_run,
        "newest_whole": max((one.newest_whole for _, one in plans if one.newest_whole is not None), default=None),
        **{key: value for key, value in done.items() if key != "freed_bytes"},
        "freed_bytes": sum(done["freed_bytes"]),
        "running": here and not nobody,
    }


def _places(paths: "RunPaths", loaded: "LoadedRun") -> list["Place"]:
    """The directory first."""
    from dstune.checkpoint import whereabouts
    from dstune.launch import rundir

    where = rundir.checkpoints_of(loaded.config, loaded.base, paths)
    return whereabouts.of(where, rundir.store_of(loaded.config))


def _record(paths: "RunPaths") -> "Verified":
    """What is remembered of readings; nothing where the run has no directory here."""
    from dstune.checkpoint.verified import Verified

    return Verified(paths.verified if paths.config.is_file() else None)


def _names(places: Sequence["Place"]) -> str:
    return ", ".join(place.name for place in places)


def _require_sense(rules: "Rules", places: Sequence["Place"]) -> None:
    if rules.keep < 1:
        raise UsageError(Problem("--keep", str(rules.keep), "at least 1: the newest whole checkpoint always stays"))
    if rules.keep_every is not None and rules.keep_every < 0:
        raise UsageError(Problem("--keep-every", str(rules.keep_every), "a number of steps, or 0 for none"))
    values = [value for place in places for value in place.values(rules.best)] if rules.best else []
    if values and all(value is None for value in values):
        do = "`dstune checkpoint list --json` shows each checkpoint's metrics"
        raise UsageError(Problem("--best", f"no checkpoint has a value of {rules.best!r}", do=do))
