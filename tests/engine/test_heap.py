"""A process that takes more than was planned gives its holes back; one that needs more is let be."""

import contextlib
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence

import pytest

from dstune.engine.heap import Heap, at_start, kept_heap, resident_bytes


def _trimmed_at(planned: int, resident: Sequence[int]) -> list[int]:
    """The looks, from 1 on, at which a process of these sizes is trimmed; the size behind a trim is the next one."""
    found: list[int] = []
    sizes: Iterator[int] = iter(resident)
    heap = Heap(planned, lambda: next(sizes), lambda: found.append(look))
    with contextlib.suppress(StopIteration):
        for look in itertools.count(1):  # noqa: B007 - `trim` reads it
            heap.look()
    return found


def test_holes_are_given_back_where_more_was_taken_than_planned() -> None:
    """By more than a twentieth: no plan is that exact, and what goes back is touched anew."""
    assert _trimmed_at(100, [50, 105, 106, 70, 100, 107, 80, 100]) == [3, 5]
    assert _trimmed_at(100, [50, 100, 105]) == []


def test_what_a_process_needs_is_no_hole() -> None:
    """The third look finds more than was planned; after its trim the process is as large again, and that is what it takes."""
    assert _trimmed_at(100, [50, 100, 150, 150, 151, 157, 158, 150]) == [3, 6]


def test_nothing_is_kept_where_nobody_planned() -> None:
    assert kept_heap("cpu", None) is None and kept_heap("cuda", 1 << 30) is None


def test_what_stands_free_between_what_is_used_goes_back_to_the_system() -> None:
    """Blocks below the size that glibc maps by itself; the last one keeps it from cutting the heap's end off."""
    blocks = [bytearray(b"1" * 100_000) for _ in range(2000)]
    del blocks[:-1]
    before = resident_bytes()
    Heap(1).look()
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


_STARTED = """
import os, sys
from pathlib import Path
from dstune.engine import heap
heap.start_again()
# glibc cuts its variable in pieces as it reads it.
began_with = Path("/proc/self/environ").read_text().replace(":", chr(0)).split(chr(0))
print(os.getpid(), sys.argv[1:], sorted(each for each in began_with if each.startswith(("GLIBC_", "MALLOC_", "glibc."))))
"""


@pytest.mark.parametrize(("before", "began_with"), [
    ({}, ["GLIBC_TUNABLES=glibc.malloc.tcache_count=0"]),
    ({"OMP_NUM_THREADS": "4,1"}, ["GLIBC_TUNABLES=glibc.malloc.tcache_count=0"]),
    ({"GLIBC_TUNABLES": "glibc.rtld.nns=3"}, ["GLIBC_TUNABLES=glibc.malloc.tcache_count=0", "glibc.rtld.nns=3"]),
    ({"OMP_NUM_THREADS": "1"}, ["GLIBC_TUNABLES=glibc.malloc.tcache_count=0", "MALLOC_ARENA_MAX=1"]),
])  # fmt: skip
def test_a_worker_starts_again_with_what_glibc_reads_at_the_start_alone(
    before: dict[str, str], began_with: list[str]
) -> None:
    """Once, as the same process, with its own words, and with what it had of such settings."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("GLIBC_", "MALLOC_", "OMP_"))}
    program = [sys.executable, "-c", _STARTED, "a word"]
    with subprocess.Popen(program, env=clean | before, stdout=subprocess.PIPE, text=True) as started:
        out, _ = started.communicate(timeout=60)
    assert out == f"{started.pid} ['a word'] {began_with}\n"


def test_threads_share_a_heap_where_a_worker_has_one_processor() -> None:
    assert "MALLOC_ARENA_MAX" in at_start(1.0) and "MALLOC_ARENA_MAX" not in at_start(2.0)
