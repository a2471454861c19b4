"""A process that grows by holes gives them back; one that needs more is let be."""

from collections.abc import Iterator, Sequence

import torch

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


def test_this_process_is_measured_and_trimmed() -> None:
    kept = torch.ones(1 << 24)
    assert resident_bytes() > kept.nbytes
    heap = Heap()
    for _ in range(4):
        heap.after_step()
