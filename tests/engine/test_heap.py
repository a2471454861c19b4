"""A process that grows by holes gives them back; one that needs more is let be."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence

import pytest

from dstune.engine.heap import Heap, resident_bytes


def _trimmed_after(resident: Sequence[int]) -> list[int]:
    """The steps, from 1 on, behind which a process of these sizes is trimmed."""
    found: list[int] = []
    sizes: Iterator[int] = iter(resident)
    heap = Heap(lambda: next(sizes), lambda: found.append(step))
    for step in range(1, len(resident) + 1):  # noqa: B007 - `trim` reads it
        heap.after_step()
    return found


def test_holes_are_given_back_where_a_tenth_has_come_together() -> None:
    assert _trimmed_after([50, 100, 105, 109, 111, 100, 112, 101]) == [5, 7]
    assert _trimmed_after([50, 100, 109, 109, 109]) == []


def test_what_a_process_needs_is_no_hole() -> None:
    """Longer rows from step 3 on: after a trim it is as large again, and that is what it takes."""
    assert _trimmed_after([50, 100, 150, 151, 152, 160, 170]) == [3, 7]


def test_what_stands_free_between_what_is_used_goes_back_to_the_system() -> None:
    """Blocks below the size that glibc maps by itself; the last one keeps it from cutting the heap's end off."""
    blocks = [bytearray(b"1" * 100_000) for _ in range(2000)]
    del blocks[:-1]
    before = resident_bytes()
    sizes = iter([1, 1, 2])
    heap = Heap(lambda: next(sizes))
    for _ in range(3):
        heap.after_step()
    assert before - resident_bytes() > 100_000_000


_LARGE_ONES = """
import mmap, resource, sys
from dstune.engine import heap
if sys.argv[1] == "kept":
    heap.keep_what_is_freed()
faults = []
for _ in range(5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    room = bytearray(100_000_000)
    room[:: mmap.PAGESIZE] = bytes(len(room[:: mmap.PAGESIZE]))
    del room
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(faults[-1])
"""


@pytest.mark.parametrize(("case", "settings", "touched"), [
    ("plain", {}, True), ("kept", {}, False), ("kept", {"MALLOC_MMAP_THRESHOLD_": "1000000"}, True)
])  # fmt: skip
def test_what_a_step_frees_the_next_one_finds_touched(case: str, settings: dict[str, str], touched: bool) -> None:
    """A large tensor's pages are touched anew each time, but where the heap keeps them and nobody asked for something else."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    work = [sys.executable, "-c", _LARGE_ONES, case]
    done = subprocess.run(work, env=clean | settings, capture_output=True, text=True, check=True)
    assert (int(done.stdout) > 1000) is touched
