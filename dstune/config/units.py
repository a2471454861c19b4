"""Durations and sizes as a run file and the command line write them."""

import re
from typing import Any

_SECONDS = {"s": 1, "sec": 1, "min": 60, "m": 60, "h": 3600, "d": 86400}
_BYTES = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)?")
_ONE_SLASH = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:(?!//)/?|file://(?!/)")
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]+)")

MOST_WORKERS = 10**6
"""Machines, or workers: more are a slip of the keys, and what is reckoned of them leaves the numbers of a computer."""
_MOST_BYTES = 10**18
_MOST_SECONDS = 10 * 365 * 86400


def duration_seconds(text: str) -> float:
    """`30min`, `45s`, `2h`, `1.5h`, `1d` in seconds. Raises ValueError for anything else."""
    match = _DURATION.fullmatch(text.strip().lower())
    if not match or match.group(2) not in _SECONDS:
        raise ValueError(f"{text!r} is no duration; write 45s, 30min, 2h or 1d")
    seconds = float(match.group(1)) * _SECONDS[match.group(2)]
    if not 0 < seconds <= _MOST_SECONDS:
        raise ValueError("a duration must be above zero, and of ten years at most")
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


def place(written: str) -> str:
    """A directory or an address. Raises ValueError for what looks like one of these and would be taken for another."""
    if not written.strip() or written != written.strip() or not written.isprintable():
        raise ValueError(f"{written!r} is no directory and no address")
    if _ONE_SLASH.match(written):
        raise ValueError(f"{written!r} is no address; write s3://bucket/runs, file:///directory")
    if "$" in written:
        raise ValueError(f"{written!r}: variables are not put in; write the path, or ~ for your home")
    return written


def size_bytes(value: str | int) -> int:
    """`5GB`, `500MB`, `2GiB`, or a number of bytes. Raises ValueError for anything else, for less than a byte, for more than 10^18."""
    match = _SIZE.fullmatch(str(value).strip())
    unit = (match.group(2) or "b").lower() if match else ""
    if not match or unit not in _BYTES:
        raise ValueError(f"{shortened(value)} is no size; write 5GB, 500MB, 2GiB or a number of bytes")
    count = float(match.group(1)) * _BYTES[unit]
    if not 1 <= count <= _MOST_BYTES:
        raise ValueError(
            f"{shortened(value)} is no size of anything: from 1 byte to {_MOST_BYTES // _BYTES['tb']:,} TB"
        )
    return int(count)


def shortened(value: object) -> str:
    """A value as a message shows it."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
