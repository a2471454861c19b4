"""What `dstune checkpoint` does, as typed functions: `dstune.api` hands them on.

`RUN` is a run file, a run's name or its directory. Functions raise `dstune.errors.DstuneError`s.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dstune.errors import Problem, UsageError

if TYPE_CHECKING:
    from dstune.checkpoint.keeping import Rules


def checkpoints(run: str | Path, *, verify: bool = False, progress: bool = False) -> dict[str, Any]:
    """What is committed, oldest first, with time, size, world, metrics and why it is kept; and what was left over.

    Where checkpoints go to a store, those that are there are listed too, with their address as `directory`.
    `loss` is the held-out rows' as of this checkpoint, `train_loss` that of the step's own batch. `verify` reads every byte,
    past the page cache.
    """
    from dstune.atomic import read_json_lines
    from dstune.checkpoint import listing
    from dstune.checkpoint.keeping import Rules
    from dstune.checkpoint.remote import Store
    from dstune.launch import rundir
    from dstune.launch.status import driver_lives
    from dstune.records.console import ReadingProgress

    paths = rundir.find(run)
    loaded = rundir.load(paths)
    where = rundir.checkpoints_of(loaded.config, loaded.base, paths)
    with ReadingProgress(shown=progress and verify) as show:
        rules = Rules.of(loaded.config.checkpoint)
        found = listing.described(where, rules, verify, show.more)
        if address := rundir.store_of(loaded.config):
            rows = listing.stored(Store(address), verify, show.more)
            listing.add_reasons(rows, rules)
            found["checkpoints"] = sorted(found["checkpoints"] + rows, key=lambda row: row["step"])
    trained = {record.get("step"): record.get("loss") for record in read_json_lines(paths.metrics)}
    for row in found["checkpoints"]:
        row |= {"loss": row["metrics"].get("loss"), "train_loss": trained.get(row["step"])}
    return found | {"driven": driver_lives(paths)}


def verify_checkpoints(run: str | Path, *, step: int | None = None, progress: bool = False) -> dict[str, Any]:
    """Read every byte of what is committed (or of one step), past the page cache, in the store too: what is wrong, and the speed.

    Raises CheckpointError where `step` is not committed.
    """
    from dstune.checkpoint import listing, resolve
    from dstune.checkpoint.audit import audit
    from dstune.checkpoint.leftovers import tree_bytes
    from dstune.checkpoint.remote import Store
    from dstune.launch import rundir
    from dstune.records.console import ReadingProgress

    where, address = rundir.find_checkpoints(run)
    found = [one for one in resolve.committed(where) if step in (None, one.step)]
    directories = [one.directory for one in found]
    with ReadingProgress(None if address else sum(map(tree_bytes, directories)), shown=progress) as show:
        audits = list(audit(directories, past_cache=True, on_bytes=show.more))
        rows = [listing.row(one, look, read=True) for one, look in zip(found, audits, strict=True)]
        if address:
            rows += listing.stored(Store(address), True, show.more, step)
    if step is not None and not rows:
        resolve.numbered(where, step)
    rows.sort(key=lambda row: row["step"])
    return {
        "directory": str(where),
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

    Also what interrupted saves left behind, where nobody runs. Beside a running training it is safe: what a resume may start
    from stays. Raises UsageError for rules that cannot be meant.
    """
    from dstune.checkpoint import retention
    from dstune.checkpoint.keeping import Rules
    from dstune.checkpoint.leftovers import tree_bytes
    from dstune.launch import rundir
    from dstune.launch.driver import deserted
    from dstune.paths import step_directory
    from dstune.records.console import ReadingProgress
    from dstune.records.sinks import EventLog

    paths = rundir.find(run)
    loaded = rundir.load(paths)
    where = rundir.checkpoints_of(loaded.config, loaded.base, paths)
    asked = {"keep": keep, "keep_every": keep_every, "best": best, "best_mode": best_mode}
    rules = replace(
        Rules.of(loaded.config.checkpoint), **{name: value for name, value in asked.items() if value is not None}
    )
    _require_sense(rules, where)
    with ReadingProgress(shown=progress) as show:
        planned = retention.plan(where, rules, show.more)
    sizes = {step: tree_bytes(step_directory(where, step)) for step in planned.steps}
    with deserted(paths) as nobody:
        rest = planned.left_overs if nobody else []
        steps, gone, freed = planned.steps, rest, sum(sizes.values()) + sum(one.bytes for one in rest)
        if not dry_run and (steps or rest):
            steps, gone, freed = retention.remove(where, steps, rest)
            EventLog(paths.events).event("removed", steps=steps, by="prune")
    return {
        "directory": str(where),
        "dry_run": dry_run,
        "newest_whole": planned.newest_whole,
        "none_whole": planned.none_whole,
        "looked_at": [
            {"step": step, "problems": [str(finding) for finding in look.findings]} for step, look in planned.looks
        ],
        "kept": [{"step": one.step, "because": list(one.reasons)} for one in planned.verdicts if one.reasons],
        "deleted": [{"step": step, "bytes": sizes[step]} for step in steps],
        "left_overs": [{"name": one.path.name, "kind": one.kind, "bytes": one.bytes} for one in gone],
        "freed_bytes": freed,
        "running": not nobody,
    }


def _require_sense(rules: "Rules", checkpoints: Path) -> None:
    from dstune.checkpoint import resolve

    if rules.keep < 1:
        raise UsageError(Problem("--keep", str(rules.keep), "at least 1: the newest whole checkpoint always stays"))
    if rules.keep_every is not None and rules.keep_every < 0:
        raise UsageError(Problem("--keep-every", str(rules.keep_every), "a number of steps, or 0 for none"))
    found = resolve.committed(checkpoints)
    if rules.best and found and all(resolve.metric_of(one, rules.best) is None for one in found):
        do = "`dstune checkpoint list --json` shows each checkpoint's metrics"
        raise UsageError(Problem("--best", f"no checkpoint has a value of {rules.best!r}", do=do))
