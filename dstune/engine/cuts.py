"""Where a member's part of a cut matrix stands in the whole one, run by run: checkpoints hold whole parameters, whoever had which part.

A matrix cut along its rows is simple: a member's elements are a run of the whole one's. Cut along its columns, each of its rows is in
pieces, one with every member. To save it the members exchange what they hold, so that each writes whole rows; only rows of which
a member has but a beginning or an end, where ZeRO's own cut went through, are written piece by piece. To load it a member reads whole
rows and keeps its columns.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from dstune.engine.communication import collectives
from dstune.engine.states import Part

_READ_ELEMENTS = 16 << 20
"""Of whole rows at once, or one row."""


@dataclass(frozen=True)
class Cut:
    """How the members hold a parameter."""

    shape: tuple[int, ...]
    """The whole one's."""
    axis: int | None
    """Along which each has an even part, in the order of their ranks; None: each has all of it."""


class Uncut:
    """Where every worker holds whole parameters."""

    def saved(self, name: str, part: Part) -> Iterator[Part]:
        """What this worker writes of `part`, in elements of the whole parameter: all workers' runs tile it."""
        yield part

    def loaded(self, name: str, part: Part) -> Iterator[Part]:
        """What this worker wants, in elements of the whole parameter. What is in each when the next is asked for is kept in `part`."""
        yield part


class Group(Uncut):
    """Where the members of a process group hold parameters as `cuts` say.

    NOTE: all members come to the same parts in the same order, to the last one: those of what is cut along columns are collective.
    """

    def __init__(self, cuts: Mapping[str, Cut], group: Any, device: torch.device) -> None:
        """`device`: where this worker computes, and its collectives are."""
        self._cuts, self._group, self._device = cuts, group, device
        self._members, self._rank = dist.get_world_size(group), dist.get_rank(group)

    def saved(self, name: str, part: Part) -> Iterator[Part]:
        cut = self._cuts[name]
        if cut.axis is None:
            share = -(-part.tensor.numel() // self._members)
            mine = part.tensor[self._rank * share : (self._rank + 1) * share]
            if mine.numel():
                yield Part(cut.shape, part.offset + self._rank * share, mine)
        elif cut.axis == 0:
            yield self._run(cut, part)
        else:
            yield from self._rows(cut, part)

    def loaded(self, name: str, part: Part) -> Iterator[Part]:
        cut = self._cuts[name]
        if cut.axis is None:
            yield part
        elif cut.axis == 0:
            yield self._run(cut, part)
        else:
            yield from self._columns(cut, part)

    def _run(self, cut: Cut, part: Part) -> Part:
        before = self._rank * (math.prod(cut.shape) // self._members)
        return Part(cut.shape, before + part.offset, part.tensor)

    def _rows(self, cut: Cut, part: Part) -> Iterator[Part]:
        """Of [4, 6] on two members, elements 1 to 9 of a part [4, 3]: the end of row 0, one of rows 1 and 2, the beginning of row 3.

        Rows that are whole are shared out; where all is within one row, there are none, and it ends before it begins.
        """
        whole, own = cut.shape[1], cut.shape[1] // self._members
        stop = part.offset + part.tensor.numel()
        first, last = -(-part.offset // own), stop // own
        head = min(stop, first * own) - part.offset
        if head:
            yield self._piece(cut, part.offset, part.tensor[:head])
        if first < last:
            rows = part.tensor[head : head + (last - first) * own].view(-1, own)
            begin, mine = self._exchanged(rows)
            if mine.numel():
                yield Part(cut.shape, (first + begin) * whole, mine.reshape(-1))
        if first <= last and last * own < stop:
            yield self._piece(cut, last * own, part.tensor[last * own - part.offset :])

    def _piece(self, cut: Cut, offset: int, tensor: torch.Tensor) -> Part:
        """Elements of one row of this member's part."""
        whole, own = cut.shape[1], cut.shape[1] // self._members
        row, column = divmod(offset, own)
        return Part(cut.shape, row * whole + self._rank * own + column, tensor)

    def _exchanged(self, rows: torch.Tensor) -> tuple[int, torch.Tensor]:
        """Of all members' `rows` [n, own] those which this one writes, from which on: [about n / members, whole]."""
        count, own = rows.shape
        share = -(-count // self._members)
        ends = [min(count, share * number) for number in range(self._members + 1)]
        sent = [(ends[number + 1] - ends[number]) * own for number in range(self._members)]
        mine = sent[self._rank]
        given = rows.detach().reshape(-1).to(self._device)
        taken = torch.empty(mine * self._members, dtype=given.dtype, device=self._device)
        collectives().all_to_all_single(
            taken, given, output_split_sizes=[mine] * self._members, input_split_sizes=sent, group=self._group
        )
        by_member = taken.view(self._members, mine // own, own)
        return ends[self._rank], by_member.transpose(0, 1).flatten(1)

    def _columns(self, cut: Cut, part: Part) -> Iterator[Part]:
        whole, own = cut.shape[1], cut.shape[1] // self._members
        mine = slice(self._rank * own, (self._rank + 1) * own)
        stop, step = part.offset + part.tensor.numel(), max(1, _READ_ELEMENTS // whole)
        for first in range(part.offset // own, -(-stop // own), step):
            last = min(first + step, -(-stop // own))
            begin, end = max(part.offset, first * own), min(stop, last * own)
            wanted = part.tensor[begin - part.offset : end - part.offset]
            held = slice(begin - first * own, end - first * own)
            # What is not written stays as it was.
            columns = torch.zeros((last - first) * own, dtype=wanted.dtype)
            columns[held] = wanted.detach().cpu()
            rows = torch.zeros(last - first, whole, dtype=wanted.dtype)
            rows[:, mine] = columns.view(-1, own)
            yield Part(cut.shape, first * whole, rows.view(-1))
            wanted.copy_(rows[:, mine].reshape(-1)[held])
