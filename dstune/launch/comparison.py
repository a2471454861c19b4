"""What was predicted of an attempt beside what its workers measured."""

import json
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from dstune.loggers import get_logger
from dstune.paths import RunPaths
from dstune.planning.plan import Plan

log = get_logger(__name__)

_TAIL_BYTES = 1 << 20
"""Of metrics.jsonl that are looked at: some thousands of steps, the newest."""
_UNITS = {"peak_memory_bytes": "GiB of peak memory", "step_seconds": "s a step", "tokens_per_second": "tokens/s"}


def compared(paths: RunPaths, attempt: int) -> dict[str, Any] | None:
    """`predicted` and `measured` of an attempt: the largest peak of its workers, medians of its newest steps, its first left out.

    None before an attempt was planned or has a step behind it, or where nothing was predicted.
    """
    plan = _plan(paths, attempt)
    if plan is None or plan.predicted is None:
        return None
    steps = [one for one in _newest(paths) if one["attempt"] == attempt]
    if not steps:
        return None
    usual = [one for one in steps if one["step"] != plan.start_step + 1] or steps
    measured = {
        "peak_memory_bytes": max(one["peak_memory_bytes"] for one in steps),
        "step_seconds": round(statistics.median(one["step_seconds"] for one in usual), 4),
        "tokens_per_second": round(statistics.median(one["tokens_per_second"] for one in usual), 1),
    }
    return {"predicted": dict(plan.predicted), "measured": measured}


def _plan(paths: RunPaths, attempt: int) -> Plan | None:
    try:
        return Plan.read(paths.plan(attempt))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError) as error:
        log.warning("%s is damaged: %s", paths.plan(attempt), error)
        return None


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """What `compared` found, for a person."""
    for key, unit in _UNITS.items():
        predicted, measured = (found[side][key] for side in ("predicted", "measured"))
        off = f" ({measured / predicted - 1:+.0%})" if predicted else ""
        yield f"{_shown(key, measured)} {unit}, predicted {_shown(key, predicted)}{off}"


def _shown(key: str, value: float) -> str:
    return f"{value / (1 << 30):.2f}" if key.endswith("_bytes") else f"{value:,.4g}"


def _newest(paths: RunPaths) -> list[dict[str, Any]]:
    if not paths.metrics.is_file():
        return []
    with paths.metrics.open("rb") as file:
        size = file.seek(0, 2)
        start = file.seek(max(0, size - _TAIL_BYTES))
        whole = file.read().split(b"\n")[1 if start else 0 : -1]
    return [json.loads(line) for line in whole]
