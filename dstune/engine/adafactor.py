"""Adafactor where every worker holds slices: sums over rows and columns are added up over the workers, and kept whole on each."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from dstune.engine.communication import collectives
from dstune.engine.partitions import Piece
from dstune.engine.sliced import Groups, Sliced, at_once

_DECAY = -0.8
"""The statistics' decay at step t is 1 - t^-0.8."""
_CLIP = 1.0
"""Root mean square that an update of one parameter has at most, before the learning rate."""
_LEAST_SCALE = 1e-3
"""Of a parameter's own root mean square, to which its updates are relative."""
_BLOCK = 4096


class Adafactor(Sliced):
    """Shazeer & Stern 2018, "Adafactor: adaptive learning rates with sublinear memory cost", algorithm 4, without momentum.

    Of a matrix's second moment the means over its rows and over its columns are kept (of [..., A, B], of each of the matrices),
    of a vector's all. An update is relative to its parameter: theta -= lr max(1e-3, RMS(theta)) u / max(1, RMS(u)). As
    `torch.optim.Adafactor`, with decoupled decay by `lr`, but for two things. The learning rate is the schedule's as it is, where
    torch takes min(lr, 1/sqrt(step)), which would bend every schedule from step 1/lr^2 on and make the logged rate untrue. And `eps`
    (1e-30, the paper's) is the least mean square of a gradient's row, column or element; torch's own is far above the gradients of
    large models. A step is a collective call: two sums over the workers for each flat tensor.
    """

    def __init__(self, params: Groups, lr: float, eps: float, scale_parameter: bool = True) -> None:
        """`scale_parameter` False: updates are not relative to the parameter, lr alone is their size."""
        super().__init__(params, {"lr": lr, "eps": eps})
        self._is_relative = scale_parameter

    def update(self, flat: torch.Tensor, group: dict[str, Any]) -> None:
        state, pieces = self.state[flat], self.pieces[flat]
        state["step"] += 1
        rate = state["step"].item() ** _DECAY
        if group["kind"] == "vector":
            state["variance"].lerp_(flat.grad.square(), rate)
            flat.grad.mul_(state["variance"].clamp(min=group["eps"]).rsqrt_())
        else:
            self._follow(flat.grad, state, pieces, rate)
            _normalise(flat.grad, state, pieces, group["eps"])
        # The gradient is the update now.
        sums = self._summed(torch.stack([_squares_of(flat.detach(), pieces), _squares_of(flat.grad, pieces)]))
        flat.mul_(1 - group["lr"] * group["weight_decay"])
        for piece, of_weights, of_update in zip(pieces, *sums.tolist(), strict=True):
            count = math.prod(piece.shape)
            scale = max(_LEAST_SCALE, math.sqrt(of_weights / count)) if self._is_relative else 1.0
            size = scale / max(1.0, math.sqrt(of_update / count) / _CLIP)
            mine = flat.grad.narrow(0, piece.start, piece.length)
            flat.narrow(0, piece.start, piece.length).add_(mine, alpha=-group["lr"] * size)

    def _follow(self, gradient: torch.Tensor, state: Any, pieces: list[Piece], rate: float) -> None:
        """Let the means over rows and columns follow those of the gradient's squares."""
        kept = [(state["row_var"][piece.name], state["col_var"][piece.name]) for piece in pieces]
        sizes = [one.numel() for both in kept for one in both]
        sums = torch.zeros(sum(sizes), device=gradient.device)
        parts = sums.split(sizes)
        for piece, rows, columns in zip(pieces, parts[::2], parts[1::2], strict=True):
            _add_squares(gradient, piece, rows, columns)
        sums.copy_(self._summed(sums))
        for piece, (row_var, col_var), rows, columns in zip(pieces, kept, parts[::2], parts[1::2], strict=True):
            height, width = piece.shape[-2:]
            row_var.lerp_(rows.view_as(row_var) / width, rate)
            col_var.lerp_(columns.view_as(col_var) / height, rate)

    def _summed(self, sums: torch.Tensor) -> torch.Tensor:
        """Over all workers, the same on each."""
        total = sums.to(self.device)
        collectives().all_reduce(total)
        return total.to(sums.device)


def row_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of the means over the rows of [..., A, B]: [..., A]."""
    return shape[:-1]


def column_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of the means over its columns: [..., B]."""
    return (*shape[:-2], shape[-1])


class Box(NamedTuple):
    """A part of a piece that is rectangular: of a run of whole matrices, of whole rows of one, or within one row."""

    start: int
    """First element, in the piece."""
    matrices: slice
    rows: slice
    columns: slice

    def of(self, elements: torch.Tensor) -> torch.Tensor:
        """The box of a piece's elements: a view [matrices, rows, columns]."""
        sizes = [part.stop - part.start for part in (self.matrices, self.rows, self.columns)]
        return elements.narrow(0, self.start, math.prod(sizes)).view(sizes)


def boxes(piece: Piece, most: int) -> Iterator[Box]:
    """What a piece of [..., A, B] consists of, in order; none has more than `most` elements, unless one row has.

    Elements 4 to 17 of a [2, 3, 3]: 4 and 5, the end of a row; 6 to 8, the last row of a matrix; 9 to 14, two rows of the next one; 15
    and 16, the beginning of a row. Elements 0 to 18: two whole matrices.
    """
    height, width = piece.shape[-2:]
    size = height * width
    at, end = piece.offset, piece.offset + piece.length
    while at < end:
        matrix, inside = divmod(at, size)
        row, column = divmod(inside, width)
        left = end - at
        matrices, rows, columns = slice(matrix, matrix + 1), slice(row, row + 1), slice(0, width)
        if column or left < width:
            columns = slice(column, min(width, column + left))
        elif row or min(left, most) < size:
            rows = slice(row, min(height, row + max(1, min(left, most) // width)))
        else:
            matrices, rows = slice(matrix, matrix + min(left, most) // size), slice(0, height)
        yield Box(at - piece.offset, matrices, rows, columns)
        at += math.prod(part.stop - part.start for part in (matrices, rows, columns))


def _add_squares(gradient: torch.Tensor, piece: Piece, rows: torch.Tensor, columns: torch.Tensor) -> None:
    """Add this worker's elements' squares to the flattened sums of their rows and columns."""
    elements = gradient.narrow(0, piece.start, piece.length)
    height, width = piece.shape[-2:]
    by_row, by_column = rows.view(-1, height), columns.view(-1, width)
    for box in boxes(piece, at_once(gradient.device)):
        squares = box.of(elements).square()
        by_row[box.matrices, box.rows] += squares.sum(dim=2)
        by_column[box.matrices, box.columns] += squares.sum(dim=1)


def _normalise(gradient: torch.Tensor, state: Any, pieces: list[Piece], eps: float) -> None:
    """Divide by the root of the estimated second moment: row times column over the mean of the rows."""
    for piece in pieces:
        height, width = piece.shape[-2:]
        rows = state["row_var"][piece.name].view(-1, height).clamp(min=eps)
        by_row = rows.div_(rows.mean(dim=1, keepdim=True)).rsqrt_()
        by_column = state["col_var"][piece.name].view(-1, width).clamp(min=eps).rsqrt_()
        elements = gradient.narrow(0, piece.start, piece.length)
        for box in boxes(piece, at_once(gradient.device)):
            values = box.of(elements)
            values.mul_(by_row[box.matrices, box.rows, None]).mul_(by_column[box.matrices, None, box.columns])


def _squares_of(flat: torch.Tensor, pieces: list[Piece]) -> torch.Tensor:
    """The sum of squares of each parameter's elements on this worker."""
    return torch.stack([_sum_of_squares(flat.narrow(0, piece.start, piece.length)) for piece in pieces])


def _sum_of_squares(elements: torch.Tensor) -> torch.Tensor:
    """Block by block: one fp32 sum over hundreds of millions of squares would lose what is small."""
    whole = elements.numel() // _BLOCK * _BLOCK
    blocks = torch.linalg.vector_norm(elements[:whole].view(-1, _BLOCK), dim=1).square_().sum()
    return blocks + torch.linalg.vector_norm(elements[whole:]).square_()
