"""From which checkpoint a run goes on, or is exported: the newest whole one on the disk or in the store."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dstune.checkpoint import owner, resolve
from dstune.checkpoint.keeping import BestMode, best_of
from dstune.checkpoint.objects import Unavailable
from dstune.checkpoint.remote import Store
from dstune.checkpoint.resolve import Checkpoint
from dstune.checkpoint.verified import NO_RECORD, Verified, stamp_of
from dstune.errors import CheckpointError, Problem
from dstune.loggers import get_logger

log = get_logger(__name__)


@dataclass(frozen=True)
class Origin:
    """What was found."""

    checkpoint: Checkpoint | None
    """Whole, and on this disk; None where there is none."""
    fetched: bool
    """It was in the store alone, and was brought here."""
    passed_over: Sequence[str]
    """Why newer ones were not taken."""


def newest(
    checkpoints: Path,
    store: Store | None,
    into: Path | None = None,
    *,
    verified: Verified = NO_RECORD,
    blocks: bool = True,
) -> Origin:
    """The newest checkpoint that is whole in the directory `checkpoints` or in the store, and why newer ones were passed over.

    Of a step that is in both, the one on the disk is taken. What comes from the store is fetched into `into` (default:
    `checkpoints`). `blocks` false: of one on the disk, what workers check while they load it is left to them. What was read to its
    end is noted in `verified`. Raises objects.Unavailable where the store does not answer: an older one is not taken for that.
    """
    here = {one.step: one for one in resolve.committed(checkpoints)}
    there = set(store.committed()) if store else set[int]()
    passed_over: list[str] = []
    damaged: list[str] = []
    for step in sorted(here.keys() | there, reverse=True):
        if step in here:
            directory, stamp = here[step].directory, stamp_of(here[step].directory)
            if not (problems := resolve.verify(here[step], blocks=blocks)):
                verified.note({str(directory): stamp} if blocks else {}, damaged)
                return Origin(here[step], False, passed_over)
            damaged.append(str(directory))
            passed_over.append(f"{directory.name} passed over: {'; '.join(problems)}")
        if store and step in there:
            stamp = store.stamp(step)
            try:
                if said := owner.strange(checkpoints, store.manifest(step).fingerprints):
                    raise CheckpointError(Problem(store.address_of(step), said))
                fetched = store.fetch(step, into or checkpoints)
            except Unavailable:
                raise
            except CheckpointError as error:
                damaged.append(store.address_of(step))
                passed_over.append(f"{error} (in the store): passed over")
                continue
            verified.note({store.address_of(step): stamp}, damaged)
            return Origin(fetched, True, passed_over)
    verified.note({}, damaged)
    return Origin(None, False, passed_over)


def choose(
    checkpoints: Path, address: str | None, wanted: str, metric: str | None, mode: BestMode = "min", *, into: Path
) -> Checkpoint:
    """`resolve.choose`, in the store at `address` too: what is there alone is fetched into the directory `into`.

    Raises CheckpointError where there is none such, or it is damaged.
    """
    if address is None:
        return resolve.choose(checkpoints, wanted, metric, mode)
    store = Store(address)
    if wanted == "newest":
        return _newest(checkpoints, store, into)
    here = {one.step: one for one in resolve.committed(checkpoints)}
    steps = sorted(here.keys() | set(store.committed()))
    metric = metric or "loss"
    if wanted == "best":
        values = {step: resolve.metric_of(here[step], metric) if step in here else None for step in steps}
        values |= {step: store.manifest(step).metrics.get(metric) for step in store.committed() if values[step] is None}
        step = best_of(values, mode)
    else:
        step = next((step for step in steps if str(step) == wanted), None)
    if step is None:
        known = ", ".join(map(str, steps)) or "none"
        came = f"no checkpoint has a value of {metric!r}" if wanted == "best" else f"no committed step {wanted!r}"
        raise CheckpointError(Problem(f"{checkpoints}, {store.address}", came, f"one of: {known}"))
    return _whole(step, here.get(step), store, into)


def _whole(step: int, here: Checkpoint | None, store: Store, into: Path) -> Checkpoint:
    problems = resolve.verify(here) if here else []
    if here and not problems:
        return here
    if here:
        log.warning("%s: %s; looking into the store", here.directory, "; ".join(problems))
    return store.fetch(step, into)


def _newest(checkpoints: Path, store: Store, into: Path) -> Checkpoint:
    found = newest(checkpoints, store, into)
    if found.checkpoint is None:
        came = "; ".join(found.passed_over) or "nothing is committed"
        raise CheckpointError(Problem(f"{checkpoints}, {store.address}", came))
    for reason in found.passed_over:
        log.warning("%s; step %d is the newest whole one", reason, found.checkpoint.step)
    return found.checkpoint
