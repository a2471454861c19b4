"""How an optimizer keeps a state of a flat tensor, and what of it a checkpoint has of each parameter: by name, for any world."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from dstune.engine.communication import collectives
from dstune.engine.partitions import Piece

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """A run of elements of one state of one parameter."""

    shape: Shape
    """The whole state's; the parameter's own, but for statistics."""
    offset: int
    """First element, in the flattened state."""
    tensor: torch.Tensor
    """One-dimensional, fp32."""


class State(Protocol):
    """One kind of state. `kept` is what the optimizer holds of a flat tensor: whatever `create` gave, and nobody else looks inside."""

    def create(self, flat: torch.Tensor, pieces: Sequence[Piece]) -> Any:
        """Zeros, for the `pieces` of `flat`."""
        ...

    def saved(self, kept: Any, piece: Piece) -> Part | None:
        """What this worker writes for the piece's parameter, a view where that is possible: all workers' parts tile the whole."""
        ...

    def loaded(self, kept: Any, piece: Piece) -> AbstractContextManager[Part | None]:
        """What this worker wants of the parameter, as it is: what is written into it inside is kept afterwards."""
        ...


class ByElement:
    """A number for each element of the flat tensor, at the same place."""

    def create(self, flat: torch.Tensor, pieces: Sequence[Piece]) -> torch.Tensor:
        return torch.zeros_like(flat, requires_grad=False)

    def saved(self, kept: torch.Tensor, piece: Piece) -> Part | None:
        return Part(piece.shape, piece.offset, kept.narrow(0, piece.start, piece.length)) if piece.length else None

    def loaded(self, kept: torch.Tensor, piece: Piece) -> AbstractContextManager[Part | None]:
        return nullcontext(self.saved(kept, piece))


@dataclass(frozen=True)
class Whole:
    """A statistic of each parameter that every worker keeps whole, and the same; each writes its even share of it."""

    shape_of: Callable[[Shape], Shape]
    """From a parameter's shape to the statistic's."""

    def create(self, flat: torch.Tensor, pieces: Sequence[Piece]) -> dict[str, torch.Tensor]:
        return {piece.name: torch.zeros(self.shape_of(piece.shape), device=flat.device) for piece in pieces}

    def saved(self, kept: Mapping[str, torch.Tensor], piece: Piece) -> Part | None:
        """10 numbers on 3 workers: 4, 4 and 2."""
        values = kept[piece.name]
        share = math.ceil(values.numel() / collectives().get_world_size())
        first = collectives().get_rank() * share
        mine = values.view(-1)[first : first + share]
        return Part(tuple(values.shape), first, mine) if mine.numel() else None

    @contextmanager
    def loaded(self, kept: Mapping[str, torch.Tensor], piece: Piece) -> Iterator[Part | None]:
        values = kept[piece.name]
        yield Part(tuple(values.shape), 0, values.view(-1))


BY_ELEMENT = ByElement()
