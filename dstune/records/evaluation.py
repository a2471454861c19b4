"""What an evaluation found: the figures with their intervals, task by task, as `results.json` holds them."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Estimate:
    """One figure and how sure it is."""

    value: float
    low: float
    """Lower end of the 95% interval over examples."""
    high: float
    interval: str
    """`wilson` (shares of right answers) or `bootstrap` (percentiles of 1,000 resamples)."""
    n: int
    """Examples that it is made of."""


@dataclass(frozen=True)
class TaskResult:
    """One task's figures."""

    name: str
    examples: int
    metrics: dict[str, Estimate]
    details: dict[str, dict[str, Any]]
    """By metric: sacreBLEU's signature, figures of each label, …"""
    counts: dict[str, int]
    """`refused` and `overlong` (left out), `truncated` (answers cut at `max_new_tokens`), `unextracted`, `new_tokens`, …"""
    settings: dict[str, Any]
    """The task as the tasks file has it, defaults filled in."""
    seconds: float


@dataclass(frozen=True)
class Evaluation:
    """All tasks of one model."""

    model: str
    tasks_file: str
    device: str
    dtype: str
    template: dict[str, Any]
    """Fingerprints of tokenizer and chat template."""
    versions: dict[str, str]
    tasks: list[TaskResult]
    outputs: str | None = None
    """The file with every prompt, reference and answer."""
    format: int = field(default=1)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)
