"""Gathering and reducing between CPUs as every worker with every other, in place of gloo's own algorithms.

ZeRO gathers weights and scatters sums of gradients. torch 2.13 does the second over gloo as an all-reduce of everything, of which each
worker keeps its part, and the first by way of copies. Here each worker sends the others just what is theirs, out of the tensor where
it stands: (W - 1) / W of the bytes each way, the least there is.
"""

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

_PIECE_BYTES = 2 << 20
"""What is received at once to be added: it stays in a core's cache."""
_AHEAD = 8
"""Pieces that may arrive while one is added, at most."""
_TAGS = 1 << 30


class DirectBackend:
    """A backend of DeepSpeed's over gloo with two of its collectives replaced; everything else is its own."""

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

    def reduce_scatter_tensor(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        op: Any = dist.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        """`output_tensor` [n] becomes the sum of all workers' parts for this one of `input_tensor` [W n]. It may be that part.

        Its own comes first, then the others' in the order of their ranks.
        """
        if async_op or getattr(op, "name", "") != "SUM":  # DeepSpeed's own kind, or torch's
            return self._backend.reduce_scatter_tensor(output_tensor, input_tensor, op, group=group, async_op=async_op)
        parts = input_tensor.view(-1).chunk(dist.get_world_size(group))
        rank, tag = dist.get_rank(group), self._tag(group)
        others = _others(rank, len(parts))
        # Receivers ask for the first piece of each worker, then for the second ones: so are they sent.
        sends = [
            dist.isend(piece, group=group, group_dst=peer, tag=tag)
            for turn in zip(*(_pieces(parts[peer]) for peer in others), strict=True)
            for peer, piece in zip(others, turn, strict=True)
        ]
        total = output_tensor.view(-1)
        if total.data_ptr() != parts[rank].data_ptr():
            total.copy_(parts[rank])
        _add_received(_pieces(total), others, group, tag)
        _Exchange(sends).wait()
        return None

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


def _add_received(total: Sequence[torch.Tensor], others: Sequence[int], group: Any, tag: int) -> None:
    """Add to each piece what the others send for it; some arrive while one is added."""
    due = iter([(piece, peer) for piece in total for peer in others])
    spare = [torch.empty_like(total[0]) for _ in range(min(_AHEAD, 2 * len(others)))]
    arriving: deque[tuple[Any, torch.Tensor, torch.Tensor]] = deque()
    while True:
        while spare and (following := next(due, None)):
            (piece, peer), room = following, spare.pop()
            arriving.append((dist.irecv(room[: len(piece)], group=group, group_src=peer, tag=tag), piece, room))
        if not arriving:
            return
        work, piece, room = arriving.popleft()
        work.wait()
        piece += room[: len(piece)]
        spare.append(room)


def _others(rank: int, world_size: int) -> list[int]:
    return [peer for peer in range(world_size) if peer != rank]


def _pieces(part: torch.Tensor) -> Sequence[torch.Tensor]:
    return part.split(max(1, _PIECE_BYTES // part.element_size()))
