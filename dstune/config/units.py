"""Durations as a run file writes them."""

import re
from typing import Any

_SECONDS = {"s": 1, "sec": 1, "min": 60, "m": 60, "h": 3600, "d": 86400}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]+)")


def duration_seconds(text: str) -> float:
    """`30min`, `45s`, `2h`, `1.5h`, `1d` in seconds. Raises ValueError for anything else."""
    match = _DURATION.fullmatch(text.strip().lower())
    if not match or match.group(2) not in _SECONDS:
        raise ValueError(f"{text!r} is no duration; write 45s, 30min, 2h or 1d")
    seconds = float(match.group(1)) * _SECONDS[match.group(2)]
    if seconds <= 0:
        raise ValueError("a duration must be above zero")
    return seconds


def parse_every(value: Any) -> int | str:
    """A number of steps (at least 1), or a duration, kept as written once it was found right."""
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 1:
            raise ValueError("steps must be at least 1")
        return value
    if isinstance(value, str):
        duration_seconds(value)
        return value
    raise ValueError("a number of steps, or a duration such as 30min")
