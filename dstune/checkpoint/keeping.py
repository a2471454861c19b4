"""Which checkpoints stay, and why: decided from facts alone, for the workers' retention, `checkpoint prune` and `checkpoint list`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from dstune.config.schema import CheckpointSection

BestMode = Literal["min", "max"]


@dataclass(frozen=True)
class Rules:
    """What is to be kept."""

    keep: int = 3
    """So many of the newest; at least 1."""
    keep_every: int | None = None
    """Steps that this divides stay for ever."""
    best: str | None = None
    """The metric of which the best stays."""
    best_mode: BestMode = "min"

    @classmethod
    def of(cls, section: CheckpointSection) -> "Rules":
        return cls(section.keep, section.keep_every, section.best, section.best_mode)


@dataclass(frozen=True)
class Found:
    """What is known of a committed checkpoint."""

    step: int
    whole: bool | None
    """True: every byte of it was read and is right. False: something is wrong. None: nobody looked."""
    value: float | None = None
    """Of the metric `Rules.best`."""


@dataclass(frozen=True)
class Verdict:
    """Why a checkpoint stays; it may go where there is no reason."""

    step: int
    reasons: tuple[str, ...]


def decide(found: Sequence[Found], rules: Rules) -> list[Verdict]:
    """A verdict on each, oldest step first.

    Nothing goes but what is older than one that was read back and is whole: that one counts as the newest, and what is newer
    stays too. Damaged ones count neither among the newest nor as the best. For steps 1 to 5 of which 5 is damaged and 4 is
    whole, `keep: 2` keeps 3, 4 and 5.
    """
    found = sorted(found, key=lambda one: one.step)
    newest = max((one.step for one in found if one.whole), default=None)
    if newest is None:
        return [Verdict(one.step, ("nothing newer was read back whole",)) for one in found]
    settled = [one.step for one in found if one.step <= newest and one.whole is not False]
    last = settled[-rules.keep :]
    values = {one.step: one.value for one in found if one.step in settled}
    best = best_of(values, rules.best_mode) if rules.best else None
    return [Verdict(one.step, _reasons(one, newest, last, best, rules)) for one in found]


def _reasons(one: Found, newest: int, last: Sequence[int], best: int | None, rules: Rules) -> tuple[str, ...]:
    if one.step > newest:
        return (f"newer than the newest whole one, step {newest}",)
    reasons: list[str] = []
    if one.step in last:
        reasons.append(f"newest {rules.keep}" if rules.keep > 1 else "newest")
    if rules.keep_every and one.step % rules.keep_every == 0:
        reasons.append(f"every {rules.keep_every}")
    if one.step == best:
        reasons.append(f"best {rules.best}")
    return tuple(reasons)


def best_of(values: Mapping[int, float | None], mode: BestMode) -> int | None:
    """The step with the best value, the newer of two equal ones; None where none has a value."""
    sign = -1 if mode == "min" else 1
    known = [(sign * value, step) for step, value in values.items() if value is not None]
    return max(known)[1] if known else None


def presumed(found: Sequence[Found]) -> list[Found]:
    """The same facts as if the newest one that nobody knows to be damaged had been read back: what to expect of `decide`."""
    newest = max((one.step for one in found if one.whole is not False), default=None)
    return [replace(one, whole=True) if one.step == newest else one for one in found]


def surplus(verdicts: Sequence[Verdict]) -> list[int]:
    """The steps that nothing keeps."""
    return [verdict.step for verdict in verdicts if not verdict.reasons]
