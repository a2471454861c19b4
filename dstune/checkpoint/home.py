"""Where a run's checkpoints are kept, as its workers find it before the first step: a shared directory, a store, or both."""

from dataclasses import dataclass
from pathlib import Path

from dstune.checkpoint import commit, retention, staged
from dstune.checkpoint.agreement import agreed
from dstune.checkpoint.commit import CommitRecord, Intent, WriteShard
from dstune.checkpoint.disks import leaders, require_shared
from dstune.checkpoint.keeping import Rules
from dstune.checkpoint.remote import Published, Store
from dstune.checkpoint.resolve import Checkpoint, verify
from dstune.errors import CheckpointError
from dstune.loggers import get_logger
from dstune.paths import step_directory, step_of
from dstune.protocols import Control

_log = get_logger(__name__)


class NotPublished(CheckpointError):
    """A checkpoint is committed on the disk, and did not come into the store."""


@dataclass(frozen=True)
class Home:
    """One worker's view of it. Its methods are collective calls; an error on one worker is raised on all (CheckpointError)."""

    checkpoints: Path
    """A directory on a disk of this worker's node."""
    store: Store | None = None
    """Where checkpoints are uploaded to."""
    leader: int = 0
    """The lowest rank that sees the same directory."""
    shared: bool = True
    """All workers see the same directory. Where they do not, the store alone holds what is committed."""

    @classmethod
    def find(cls, checkpoints: Path, address: str | None, control: Control, owner: str | None = None) -> "Home":
        """Look at the disks, and write to the store from every worker; `owner`: as whom checkpoints are put there.

        Raises ConfigError where there is no store and the workers do not share the directory, CheckpointError where the store
        cannot be written to.
        """
        store = _reached(address, owner, control) if address else None
        found = leaders(checkpoints, control)
        shared = not any(found)
        if store is None:
            require_shared(checkpoints, found, control)
        elif not shared and control.rank == 0:
            _log.info(
                "%s is a disk of each node's own: checkpoints are committed in %s alone", checkpoints, store.address
            )
        return cls(checkpoints, store, found[control.rank], shared)

    def bring(self, directory: Path, control: Control) -> Path:
        """Where this worker finds the checkpoint that stands in `directory` for the driver: fetched where its node has none."""
        if self.store is None or self.shared:
            return directory
        store, step = self.store, step_of(directory)
        assert step is not None
        here = step_directory(self.checkpoints, step)

        def upload() -> None:
            # The nodes shared a disk when it was saved (there was but one, say), and its upload failed then.
            if step not in store.committed():
                store.upload(here)

        def fetch() -> None:
            if control.rank == self.leader and verify(Checkpoint(step, here)):
                store.fetch(step, self.checkpoints)

        agreed(control, "upload", upload, only_first=True)
        agreed(control, "fetch", fetch)
        return here

    def commit(self, intent: Intent, write: WriteShard, control: Control) -> CommitRecord:
        """Commit: on the shared disk (`publish` then uploads it), or, where there is none, in the store. As `commit.commit`."""
        if self.shared or self.store is None:
            return commit.commit(self.checkpoints, intent, write, control)
        return staged.commit(self.checkpoints, self.store, self.leader, intent, write, control)

    def publish(self, step: int, control: Control) -> Published | None:
        """Upload a checkpoint that is committed on the shared disk; None where there is no store, or nothing was left to send.

        Raises NotPublished.
        """
        if self.store is None or not self.shared:
            return None
        try:
            published = self.store.publish(step_directory(self.checkpoints, step), control)
        except CheckpointError as error:
            raise NotPublished(error.problems) from None
        return published if published.bytes else None

    def prune(self, rules: Rules, control: Control) -> list[int]:
        """Delete the steps on the shared disk that no rule keeps; returns them."""
        return retention.prune(self.checkpoints, rules, control) if self.shared else []

    def prune_store(self, rules: Rules, control: Control) -> list[int]:
        """The same in the store."""
        return self.store.prune(rules, control) if self.store else []


def _reached(address: str, owner: str | None, control: Control) -> Store:
    reached: list[Store] = []

    def reach() -> None:
        store = Store(address, owner=owner)
        store.probe()
        reached.append(store)

    agreed(control, "reach the store", reach)
    return reached[0]
