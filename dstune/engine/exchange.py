"""Gathering and reducing between CPUs as every worker with every other, in place of gloo's own algorithms.

ZeRO gathers weights and scatters means of gradients. torch 2.13 does the second over gloo as an all-reduce of everything, of which each
worker keeps its part, and the first by way of copies. Here each worker sends the others just what is theirs, out of the tensor where
it stands: (W - 1) / W of the bytes each way, the least there is. Gradients in 16 bits travel so, and are summed in fp32.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

_MESSAGE_BYTES = 4 << 20
_SMALL_BYTES = 1 << 16
"""Of a piece that is not worth a message of its own."""
_IN_CACHE = 1 << 17
"""Elements that a core adds up at a time."""
_TAGS = 1 << 30


class DirectBackend:
    """A backend of DeepSpeed's over gloo with another way to gather, and one to reduce that it lacks; everything else is its own."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._calls: dict[Any, Iterator[int]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def all_gather_into_tensor(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any = None, async_op: bool = False
    ) -> "_Exchange | None":
        """`output_tensor` [W n] becomes the `input_tensor` [n] of all workers end to end. It may contain this worker's own."""
        whole, own = output_tensor.view(-1), input_tensor.view(-1)
        parts, rank, tag = whole.chunk(dist.get_world_size(group)), dist.get_rank(group), self._tag(group)
        if parts[rank].data_ptr() != own.data_ptr():
            parts[rank].copy_(own)
        others = _others(rank, len(parts))
        works = [dist.irecv(parts[peer], group=group, group_src=peer, tag=tag) for peer in others]
        works += [dist.isend(parts[rank], group=group, group_dst=peer, tag=tag) for peer in others]
        exchange = _Exchange(works)
        return exchange if async_op else exchange.wait()

    def mean_of_pieces(self, tensors: Sequence[torch.Tensor], into: Sequence[torch.Tensor], group: Any = None) -> None:
        """`into[i]` (flat, fp32) becomes the mean over all workers of this worker's piece of `tensors[i]`.

        A tensor of n elements has W pieces of ceil(n / W) in the order of the ranks, the last ones shorter or empty, as ZeRO-3 cuts
        it. Tensors are sent in their own dtype; this worker's piece comes first in the sum, then the others' in the order of their ranks.
        """
        rank, world_size = dist.get_rank(group), dist.get_world_size(group)
        others, tag = _others(rank, world_size), self._tag(group)
        pieces = [_cut(tensor, world_size) for tensor in tensors]
        own = [cut[rank] for cut in pieces]
        lots = _lots([len(cut[0]) * cut[0].element_size() for cut in pieces])
        arriving = [_Arriving(own, lots, peer, group, tag) for peer in others]
        sent = [
            dist.isend(message, group=group, group_dst=peer, tag=tag)
            for lot in lots
            for peer in others
            for message in _messages(_together([pieces[number][peer] for number in lot]))
        ]
        for turn, lot in enumerate(lots):
            theirs = [one.of(turn) for one in arriving]
            for place, number in enumerate(lot):
                _mean(into[number], own[number], [each[place] for each in theirs])
        _Exchange(sent).wait()

    def _tag(self, group: Any) -> int:
        """Another one for every call, and the same on all workers, which make the calls of a group in one order."""
        return next(self._calls.setdefault(group, itertools.count())) % _TAGS


class _Exchange:
    """Messages under way."""

    def __init__(self, works: Sequence[Any]) -> None:
        self._works = works

    def wait(self) -> None:
        for work in self._works:
            work.wait()

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._works)


class _Arriving:
    """What one worker sends of its pieces for this one: `own` says their sizes, `lots` which of them come together."""

    def __init__(
        self, own: Sequence[torch.Tensor], lots: Sequence[Sequence[int]], peer: int, group: Any, tag: int
    ) -> None:
        self._lengths = [[len(own[number]) for number in lot] for lot in lots]
        # One call for all of it, before anything is sent: what arrives goes straight where it belongs.
        room = torch.empty(sum(map(sum, self._lengths)), dtype=own[0].dtype)
        self._rooms = room.split([sum(lengths) for lengths in self._lengths])
        self._works = [
            [dist.irecv(message, group=group, group_src=peer, tag=tag) for message in _messages(room)]
            for room in self._rooms
        ]

    def of(self, turn: int) -> Sequence[torch.Tensor]:
        """The pieces of that lot, once they are here."""
        _Exchange(self._works[turn]).wait()
        return self._rooms[turn].split(self._lengths[turn])


def _mean(total: torch.Tensor, own: torch.Tensor, theirs: Sequence[torch.Tensor]) -> None:
    """In runs of elements that stay in a core's cache from the first term to the division."""
    for start in range(0, len(total), _IN_CACHE):
        run = slice(start, start + _IN_CACHE)
        part = total[run].copy_(own[run])
        for their in theirs:
            part += their[run]
        part /= len(theirs) + 1


def _cut(tensor: torch.Tensor, world_size: int) -> Sequence[torch.Tensor]:
    flat, size = tensor.reshape(-1), -(-tensor.numel() // world_size)
    return [flat[rank * size : (rank + 1) * size] for rank in range(world_size)]


def _lots(sizes: Sequence[int]) -> list[list[int]]:
    """The numbers of the tensors that travel together, given the bytes of a piece of each: the small ones do."""
    small = [number for number, size in enumerate(sizes) if size < _SMALL_BYTES]
    large = [[number] for number, size in enumerate(sizes) if size >= _SMALL_BYTES]
    return [small, *large] if small else large


def _together(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))


def _messages(lot: torch.Tensor) -> Sequence[torch.Tensor]:
    """A lot arrives bit by bit, and what is there of it is counted in meanwhile."""
    return [part for part in lot.split(_MESSAGE_BYTES // lot.element_size()) if len(part)]


def _others(rank: int, world_size: int) -> list[int]:
    return [peer for peer in range(world_size) if peer != rank]
