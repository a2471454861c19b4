"""What a rung counts: tries, and those that failed with their seed and why."""

import contextlib
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


class Failed(Exception):
    """Something that dstune guarantees did not hold."""


def expect(holds: object, why: str) -> None:
    """Raise Failed, saying why, where `holds` is false."""
    if not holds:
        raise Failed(why)


@dataclass
class Tally:
    """The counts of one rung."""

    rung: int
    what: str
    tries: int = 0
    failures: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    """What else there is to say: by which means, how much work was lost, how long it took."""
    began: float = field(default_factory=time.monotonic)

    @contextlib.contextmanager
    def trial(self, seed: int, **case: Any) -> Iterator[None]:
        """Count one try; whatever it raises is its failure, and the next one follows."""
        self.tries += 1
        try:
            yield
        except Exception as error:  # noqa: BLE001 - it is reported, with where it came from
            self.failures.append({"seed": seed} | case | {"why": _why(error)})

    @contextlib.contextmanager
    def watched(self, part: str) -> Iterator[None]:
        """What a part raises outside its tries is a failure too: its experiment did not take place."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - it is reported
            self.tries += 1
            self.failures.append({"seed": None, "part": part, "why": _why(error)})

    def largest(self, name: str, value: float) -> None:
        """Keep the largest value of a fact."""
        self.facts[name] = max(round(value, 2), self.facts.get(name, 0))

    def count(self, name: str, number: int = 1) -> None:
        """Add to a fact."""
        self.facts[name] = self.facts.get(name, 0) + number

    def line(self) -> dict[str, Any]:
        """The rung's line of output."""
        return {
            "rung": self.rung,
            "what": self.what,
            "tries": self.tries,
            "passed": self.tries - len(self.failures),
            "failures": self.failures,
            "seconds": round(time.monotonic() - self.began, 1),
        } | self.facts


def _why(error: Exception) -> str:
    if isinstance(error, Failed):
        return str(error)
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({last.filename}:{last.lineno})"
