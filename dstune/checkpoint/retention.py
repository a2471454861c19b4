"""Letting old checkpoints go: nothing goes before a newer one was read back and found whole."""

import os
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dstune.atomic import fsync_directory, remove_directory
from dstune.checkpoint import owner
from dstune.checkpoint.audit import Finding, audit, file_findings, glance
from dstune.checkpoint.hashing import OnBytes
from dstune.checkpoint.keeping import Found, Rules, Verdict, decide, presumed, surplus
from dstune.checkpoint.layout import load_manifest
from dstune.checkpoint.leftovers import LeftOver, left_overs, tree_bytes
from dstune.checkpoint.resolve import committed, metric_of
from dstune.errors import CheckpointError
from dstune.loggers import get_logger
from dstune.paths import step_directory
from dstune.protocols import Control

_log = get_logger(__name__)


def prune(checkpoints: Path, rules: Rules, control: Control) -> list[int]:
    """Delete the committed steps that no rule keeps; returns them. A collective call.

    The workers first read the newest one back, each a part of its files, past the page cache; where it is damaged, the
    newest whole one counts as the newest, and nothing newer than that is touched.
    """
    facts = {one.step: one for one in _unread(checkpoints, rules)} if control.rank == 0 else {}
    if not control.broadcast(_surplus_expected(facts, rules)):
        return []
    newest = _newest_read_back(checkpoints, control)
    deleted: list[int] = []
    if control.rank == 0 and newest is not None:
        read = [replace(one, whole=step == newest) if step >= newest else one for step, one in facts.items()]
        deleted = [step for step in surplus(decide(read, rules)) if _removed(step_directory(checkpoints, step))]
        for left_over in left_overs(checkpoints):
            if left_over.kind == "damaged" and _may_go(left_over, newest):
                _removed(left_over.path)
    return control.broadcast(deleted)


@dataclass(frozen=True)
class Plan:
    """What a pruning by hand comes to."""

    verdicts: list[Verdict]
    """Of every committed step, oldest first."""
    newest_whole: int | None
    """The step that was read back; None where none is whole, or where there was nothing to read it for."""
    looks: list[tuple[int, Sequence[Finding]]]
    """What was read back, and what is damaged at a glance: what is wrong with it, by its step, newest first."""
    left_overs: list[LeftOver]
    """What of these may go once nobody runs."""

    none_whole: bool
    """Every committed one is damaged: nothing goes."""

    @property
    def steps(self) -> list[int]:
        """Committed ones that go, oldest first."""
        return surplus(self.verdicts)


def plan(checkpoints: Path, rules: Rules, on_bytes: OnBytes | None = None) -> Plan:
    """What the rules let go. Deletes nothing, but reads the newest ones back (past the page cache) until one is whole."""
    found = _unread(checkpoints, rules)
    looks = {one.step: glance(step_directory(checkpoints, one.step)).findings for one in found}

    def read(step: int) -> Sequence[Finding]:
        (look,) = audit([step_directory(checkpoints, step)], past_cache=True, on_bytes=on_bytes)
        return look.findings

    return planned(found, looks, read, left_overs(checkpoints), rules)


def planned(
    found: Sequence[Found],
    glances: Mapping[int, Sequence[Finding]],
    read: Callable[[int], Sequence[Finding]],
    rest: Sequence[LeftOver],
    rules: Rules,
) -> Plan:
    """The plan of one place: what was `found` there, what shows of each step at a glance, and how to read a step to its end."""
    looks = {step: findings for step, findings in glances.items() if findings}
    facts = {one.step: Found(one.step, False) if one.step in looks else one for one in found}
    needed = _surplus_expected(facts, rules) or any(one.kind == "damaged" for one in rest)
    newest: int | None = None
    while needed and newest is None:
        candidates = [step for step, one in facts.items() if one.whole is None]
        if not candidates:
            break
        step = max(candidates)
        looks[step] = read(step)
        newest = None if looks[step] else step
        facts[step] = replace(facts[step], whole=newest is not None)
    verdicts = decide(presumed(list(facts.values())), rules)
    may_go = [one for one in rest if _may_go(one, newest)]
    none_whole = bool(facts) and all(one.whole is False for one in facts.values())
    return Plan(verdicts, newest, sorted(looks.items(), reverse=True), may_go, none_whole)


def remove(checkpoints: Path, steps: Sequence[int], rest: Sequence[LeftOver]) -> tuple[list[int], list[LeftOver], int]:
    """Delete these committed steps and left-overs; the steps, the left-overs and the bytes that went.

    Safe beside workers that save and prune: each directory leaves its place by one rename, into a folder that they never look
    into, and what they deleted meanwhile is left out of the answer.
    """
    doomed = checkpoints / f".prune-{os.getpid()}-{secrets.token_hex(4)}"
    doomed.mkdir()
    try:
        gone_steps = [step for step in steps if _moved(step_directory(checkpoints, step), doomed)]
        gone_rest = [one for one in rest if _moved(one.path, doomed)]
        fsync_directory(checkpoints)
        freed = tree_bytes(doomed)
    finally:
        shutil.rmtree(doomed)
    return gone_steps, gone_rest, freed


def _moved(path: Path, folder: Path) -> bool:
    try:
        path.rename(folder / path.name)
    except FileNotFoundError:
        return False
    return True


def _may_go(one: LeftOver, newest_whole: int | None) -> bool:
    if one.kind == "damaged":
        return newest_whole is not None and one.step is not None and one.step <= newest_whole
    return one.kind in ("unfinished", "deleting")


def _surplus_expected(facts: Mapping[int, Found], rules: Rules) -> bool:
    """Whether anything would go if the newest one that may be whole is."""
    return bool(surplus(decide(presumed(list(facts.values())), rules)))


def _unread(checkpoints: Path, rules: Rules) -> list[Found]:
    return [Found(one.step, None, metric_of(one, rules.best) if rules.best else None) for one in committed(checkpoints)]


def _newest_read_back(checkpoints: Path, control: Control) -> int | None:
    """The newest step of which every byte came back right; the workers share the reading."""
    for step in control.broadcast([checkpoint.step for checkpoint in reversed(committed(checkpoints))]):
        problems = [found for share in control.gather(_share_problems(checkpoints, step, control)) for found in share]
        if not problems:
            return step
        if control.rank == 0:
            _log.warning("step %d is damaged and does not count: %s", step, "; ".join(problems))
    return None


def _share_problems(checkpoints: Path, step: int, control: Control) -> list[str]:
    directory = step_directory(checkpoints, step)
    try:
        manifest = load_manifest(directory)
    except CheckpointError as error:
        return [str(error)]
    share = sorted(manifest.files)[control.rank :: control.world_size]
    problems = [str(found) for found in file_findings(directory, manifest, share, past_cache=True)]
    said = owner.strange(checkpoints, manifest.fingerprints)
    said = said or (f"is of step {manifest.step}" if manifest.step != step else "")
    return problems + ([f"manifest.json: {said}"] if said else [])


def _removed(directory: Path) -> bool:
    """Whether it was deleted. A directory that cannot be deleted is no reason to end a training."""
    try:
        remove_directory(directory)
    except FileNotFoundError:  # `dstune checkpoint prune` came first
        return False
    except OSError as error:
        _log.warning("%s cannot be deleted: %s", directory, error.strerror or error)
        return False
    return True
