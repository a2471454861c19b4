"""Rows of the embeddings for tokens that the model did not know (`model.new_tokens`): each begins as the mean of those before.

With a random row a new token's logit may top all others' from the first step on; the mean's is bounded by the log of the vocabulary's
size (J. Hewitt, "Initializing New Word Embeddings for Pretrained Language Models", 2021). transformers draws around the same mean
(`resize_token_embeddings`, `mean_resizing`); without the draw the rows are the same on every world.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from dstune.engine.parameters import LocalPiece, combined, full_shape, local_piece
from dstune.errors import ConfigError, Problem

_BLOCK_ELEMENTS = 1 << 20
_BITS = 62
"""Of an int64, what a sum may take."""


def tables(module: PreTrainedModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The tensors with a row for each token, each once: the input embedding's weight, the head's weight and bias."""
    parts: list[Any] = [module.get_input_embeddings(), module.get_output_embeddings()]
    wanted = {id(parameter) for part in parts if part is not None for parameter in part.parameters()}
    return ((name, parameter) for name, parameter in module.named_parameters() if id(parameter) in wanted)


def fill(module: PreTrainedModel, new: range) -> None:
    """Set the rows `new` of every table to the mean of the rows before them. A collective on ZeRO-3: each worker sums its own piece.

    Only before the engine is made, as `local_piece`.
    """
    with torch.no_grad():
        for _, table in tables(module):
            columns = math.prod(full_shape(table)[1:])
            with local_piece(table) as piece:
                mean = _mean(table, piece, new.start, columns)
                first, last = max(piece.start, new.start * columns), min(piece.stop, new.stop * columns)
                if last > first:
                    places = torch.arange(first, last, device=mean.device) % columns
                    piece.tensor[first - piece.start : last - piece.start] = mean[places].to(piece.tensor.dtype)


def require_trained(module: PreTrainedModel, new: range) -> None:
    """Raises ConfigError where `new` rows would stay what they began as: their tables are frozen, or an adapter leaves them out."""
    frozen = [name for name, table in tables(module) if not table.requires_grad]
    if new and frozen:
        raise ConfigError(
            Problem(
                "model.new_tokens",
                f"{' and '.join(frozen)} would not be trained, and the {len(new)} new tokens mean nothing yet",
                "embeddings and head among what is trained",
                "With an adapter: `modules_to_save: [embed_tokens, lm_head]` (as they are called here; tied ones want all weights to be "
                "trained). Else take them out of `train.freeze`.",
            )
        )


def _mean(table: torch.nn.Parameter, piece: LocalPiece, rows: int, columns: int) -> torch.Tensor:
    """The mean of the first `rows` rows, float64 [columns]: summed as integers, so that it is the same in whatever pieces."""
    known = piece.tensor[: max(0, min(piece.stop, rows * columns) - piece.start)]
    largest = combined(table, known.abs().max().double() if len(known) else known.new_zeros(()).double(), "max")
    if not bool(torch.isfinite(largest)):
        raise ConfigError(Problem("model.path", "its embeddings hold values that are not finite", "a whole model"))
    scale = 2.0 ** (_BITS - rows.bit_length() - math.frexp(float(largest))[1])
    return combined(table, _sum(known, piece.start, columns, scale), "sum").to(known.device).double() / scale / rows


def _sum(values: torch.Tensor, start: int, columns: int, scale: float) -> torch.Tensor:
    """Sum over rows of round(values * scale), int64 [columns]; `values` are those of a table from its element `start` on."""
    total = torch.zeros(columns, dtype=torch.int64, device=values.device)
    stop, step = start + len(values), max(1, _BLOCK_ELEMENTS // columns) * columns
    for begin in range(start - start % columns, stop, step):
        # What lies beside this worker's piece counts as zero: [0, 0, x, y, z, 0] for three of the elements of two rows.
        first, last = max(start, begin), min(stop, begin + step)
        block = values.new_zeros(-(-(last - begin) // columns) * columns, dtype=torch.float64)
        block[first - begin : last - begin] = values[first - start : last - start]
        total += (block * scale).round_().to(torch.int64).view(-1, columns).sum(0)
    return total
