"""Where a run's checkpoints are, as a person asks by hand: a directory, a store; both answer the same and prune by the same rules."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dstune.checkpoint import listing, retention
from dstune.checkpoint.audit import Finding
from dstune.checkpoint.hashing import OnBytes
from dstune.checkpoint.keeping import Rules
from dstune.checkpoint.leftovers import LeftOver, left_overs, tree_bytes
from dstune.checkpoint.remote import Store
from dstune.checkpoint.resolve import committed, metric_of
from dstune.checkpoint.retention import Plan
from dstune.checkpoint.verified import NO_RECORD, Verified
from dstune.paths import step_directory


class Place(Protocol):
    """A directory or a store: these members are all that is asked of it. A store's raise objects.Unavailable."""

    @property
    def event(self) -> str:
        """What events.jsonl calls a removal from it."""
        ...

    @property
    def name(self) -> str: ...

    def address_of(self, step: int) -> str: ...

    def steps(self) -> list[int]:
        """What is committed, oldest first."""
        ...

    def rows(
        self, read: bool, on_bytes: OnBytes | None = None, only: int | None = None, verified: Verified = NO_RECORD
    ) -> list[dict[str, Any]]:
        """The same as plain values (see `listing.local`)."""
        ...

    def values(self, metric: str) -> list[float | None]:
        """The metric of each committed checkpoint."""
        ...

    def left_overs(self) -> list[LeftOver]:
        """What is not committed."""
        ...

    def name_of(self, left_over: LeftOver) -> str:
        """What a person is told of it."""
        ...

    def plan(self, rules: Rules, on_bytes: OnBytes | None = None) -> Plan:
        """What the rules let go. Deletes nothing, but reads the newest ones back until one is whole."""
        ...

    def size(self, step: int) -> int:
        """Bytes."""
        ...

    def remove(self, steps: Sequence[int], rest: Sequence[LeftOver]) -> tuple[list[int], list[LeftOver], int]:
        """Delete these committed steps and left-overs; those that went (another process may have been first), and the bytes.

        Safe beside workers that save and prune. Cut short anywhere, what is left of a checkpoint is not taken for one.
        """
        ...


@dataclass(frozen=True)
class Directory:
    """On a disk."""

    checkpoints: Path
    event: str = "removed"

    @property
    def name(self) -> str:
        return str(self.checkpoints)

    def address_of(self, step: int) -> str:
        return str(step_directory(self.checkpoints, step))

    def steps(self) -> list[int]:
        return [one.step for one in committed(self.checkpoints)]

    def rows(
        self, read: bool, on_bytes: OnBytes | None = None, only: int | None = None, verified: Verified = NO_RECORD
    ) -> list[dict[str, Any]]:
        return listing.local(self.checkpoints, read, on_bytes, only, verified)

    def values(self, metric: str) -> list[float | None]:
        return [metric_of(one, metric) for one in committed(self.checkpoints)]

    def left_overs(self) -> list[LeftOver]:
        return left_overs(self.checkpoints)

    def name_of(self, left_over: LeftOver) -> str:
        return left_over.path.name

    def plan(self, rules: Rules, on_bytes: OnBytes | None = None) -> Plan:
        return retention.plan(self.checkpoints, rules, on_bytes)

    def size(self, step: int) -> int:
        return tree_bytes(step_directory(self.checkpoints, step))

    def remove(self, steps: Sequence[int], rest: Sequence[LeftOver]) -> tuple[list[int], list[LeftOver], int]:
        return retention.remove(self.checkpoints, steps, rest)


@dataclass(frozen=True)
class InStore:
    """Behind an address."""

    store: Store
    event: str = "removed_from_store"

    @property
    def name(self) -> str:
        return self.store.address

    def address_of(self, step: int) -> str:
        return self.store.address_of(step)

    def steps(self) -> list[int]:
        return self.store.committed()

    def rows(
        self, read: bool, on_bytes: OnBytes | None = None, only: int | None = None, verified: Verified = NO_RECORD
    ) -> list[dict[str, Any]]:
        return listing.stored(self.store, read, on_bytes, only, verified)

    def values(self, metric: str) -> list[float | None]:
        return [one.value for one in self.store.found(Rules(best=metric))]

    def left_overs(self) -> list[LeftOver]:
        found = sorted(self.store.unfinished().items())
        return [LeftOver(step_directory(Path(), step), "unfinished", step, size) for step, size in found]

    def name_of(self, left_over: LeftOver) -> str:
        return f"{self.store.address}/{left_over.path.name}"

    def plan(self, rules: Rules, on_bytes: OnBytes | None = None) -> Plan:
        found = self.store.found(rules)
        glances = {one.step: self.store.glance(one.step)[1] for one in found if one.whole is False}

        def read(step: int) -> Sequence[Finding]:
            return self.store.verify(step, on_bytes=on_bytes)

        return retention.planned(found, glances, read, self.left_overs(), rules)

    def size(self, step: int) -> int:
        return self.store.size(step)

    def remove(self, steps: Sequence[int], rest: Sequence[LeftOver]) -> tuple[list[int], list[LeftOver], int]:
        sizes = {step: self.size(step) for step in steps}
        gone = [step for step in steps if self.store.remove(step)]
        unfinished = self.store.unfinished()  # a save may have finished one meanwhile
        gone_rest = [one for one in rest if one.step in unfinished and self.store.remove(one.step)]
        return gone, gone_rest, sum(sizes[step] for step in gone) + sum(one.bytes for one in gone_rest)


def carry_out(place: Place, plan: Plan, left_overs_too: bool, dry_run: bool) -> dict[str, list[Any]]:
    """Do what was planned, or (`dry_run`) only say it: lists of plain values, each checkpoint with its place as `directory`."""
    rest = plan.left_overs if left_overs_too else []
    sizes = {step: place.size(step) for step in plan.steps}
    steps, gone, freed = plan.steps, rest, sum(sizes.values()) + sum(one.bytes for one in rest)
    if not dry_run and (steps or rest):
        steps, gone, freed = place.remove(steps, rest)
    looks = [(step, [str(finding) for finding in findings]) for step, findings in plan.looks]
    kept = [(one.step, list(one.reasons)) for one in plan.verdicts if one.reasons]
    return {
        "looked_at": [{"step": step, "directory": place.address_of(step), "problems": said} for step, said in looks],
        "kept": [{"step": step, "directory": place.address_of(step), "because": why} for step, why in kept],
        "deleted": [{"step": step, "directory": place.address_of(step), "bytes": sizes[step]} for step in steps],
        "left_overs": described(place, gone),
        "none_whole": [place.name] if plan.none_whole else [],
        "freed_bytes": [freed],
    }


def described(place: Place, found: Sequence[LeftOver]) -> list[dict[str, Any]]:
    """Left-overs as plain values."""
    return [{"name": place.name_of(one), "kind": one.kind, "bytes": one.bytes} for one in found]


def of(checkpoints: Path, address: str | None) -> list[Place]:
    """The places of one run. Raises ConfigError for an address that cannot be opened here."""
    return [Directory(checkpoints), *([InStore(Store(address))] if address else [])]
