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


def test_holes_are_given_back_every_few_steps_where_they_grow() -> None:
    assert _trimmed_after([50, 100, 105, 109, 100, 101, 103, 101, 101, 103]) == [4, 10]
    assert _trimmed_after([100, 101, 101, 102, 102, 102, 102]) == []


def test_what_a_step_takes_that_began_without_holes_is_none() -> None:
    """Longer rows from step 5 on."""
    assert _trimmed_after([100, 100, 100, 103, 150, 151, 151, 152, 152]) == [4]


def test_this_process_is_measured_and_trimmed() -> None:
    kept = torch.ones(1 << 24)
    assert resident_bytes() > kept.nbytes
    heap = Heap()
    for _ in range(5):
        heap.after_step()
