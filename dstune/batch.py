"""Micro-batches of tensors from prepared rows: packed (many examples in one row) or padded; of causal models or of pairs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch.nn.functional import pad

from dstune.data import order
from dstune.planning.plan import Plan

IGNORED = -100
"""A target that is no target (`model.loss` agrees)."""

_EVEN = 64
"""Tokens that a packed row on a processor has a multiple of: its library compiles a product for each number of rows that it meets, and
keeps it. Rows are as good as full: this is half a percent more of them."""
Layout = Literal["packed", "padded", "packed-seq2seq", "seq2seq"]


class StoredExample(Protocol):
    """What is read of one stored example."""

    @property
    def input_ids(self) -> np.ndarray: ...
    @property
    def loss_mask(self) -> np.ndarray: ...


class Examples(Protocol):
    """What is read of a prepared directory (`data.shards.Prepared`)."""

    def row(self, index: int, /) -> np.ndarray: ...
    def example(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one worker."""

    inputs: dict[str, Any]
    """The keyword arguments of the model's forward pass."""
    targets: torch.Tensor
    """int64 [rows, length]: at each position the token to predict there (shifted within its example), or -100."""
    examples: np.ndarray
    """int32: the example numbers, padding rows left out."""
    lengths: tuple[int, ...]
    """Tokens of each example (source + target), in the order of `examples`."""
    supervised: int
    """Targets in this micro-batch."""

    @property
    def num_examples(self) -> int:
        return len(self.examples)

    @property
    def num_tokens(self) -> int:
        """Real tokens: no padding."""
        return sum(self.lengths)

    def to(self, device: torch.device) -> "Batch":
        """The same batch with its tensors on `device`."""
        moved = {
            key: _moved(value, device) if isinstance(value, torch.Tensor) else value
            for key, value in self.inputs.items()
        }
        return replace(self, inputs=moved, targets=_moved(self.targets, device))


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """NOTE: a copy of memory that is not pinned may wait for all that the GPU was asked before."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def collate(
    prepared: Examples,
    rows: Sequence[int | None],
    layout: Layout,
    pad_id: int,
) -> Batch:
    """The micro-batch of `rows` (numbers of `rows.arrow`; None: a padding row of weight zero, which has no targets).

    `packed`: one row [1, tokens], all examples end to end. `padded`: [examples, longest]. `seq2seq`: sources to the
    encoder, targets to the decoder, padded; `packed-seq2seq`: one row of sources, one of targets. What the decoder begins an
    example with is the model's to say (`model.loss` sets it).
    A batch of padding rows alone is still a valid forward pass.
    """
    numbers = [int(number) for row in rows if row is not None for number in prepared.row(row)]
    examples = [prepared.example(number) for number in numbers]
    if layout == "packed":
        inputs, targets = _packed(examples, pad_id)
    elif layout == "padded":
        inputs, targets = _padded(examples, _height(rows, examples), pad_id)
    elif layout == "packed-seq2seq":
        inputs, targets = _packed_pairs(examples, pad_id)
    else:
        inputs, targets = _seq2seq(examples, _height(rows, examples), pad_id)
    return Batch(
        inputs=inputs,
        targets=targets,
        examples=np.asarray(numbers, np.int32),
        lengths=tuple(len(example.input_ids) for example in examples),
        supervised=int((targets != IGNORED).sum()),
    )


@dataclass(frozen=True)
class Share:
    """What one of `world_size` workers does of a step: `members` workers in a row take the same rows, each a piece of every one, or
    (`whole`) each all of them, with a part of the model.
    """

    rank: int
    world_size: int
    members: int = 1
    whole: bool = False

    @classmethod
    def of(cls, plan: Plan, rank: int) -> "Share":
        """What the worker `rank` of `plan` does."""
        return cls(rank, plan.world_size, plan.group, whole=plan.tensor_parallel > 1)

    @property
    def place(self) -> int:
        """Which of the pieces is this worker's, from 0."""
        return 0 if self.whole else self.rank % self.members

    @property
    def counts(self) -> bool:
        """Whether the losses of this worker are to be counted: of those that have the same ones, the first's."""
        return not self.whole or self.rank % self.members == 0

    @property
    def counted(self) -> int:
        """Workers whose losses are: gradients are means over so many."""
        return self.world_size // self.members if self.whole else self.world_size

    def micro_batches(self, rows: Sequence[int] | order.IntArray, size: int) -> list[list[int | None]]:
        """`order.share` between the groups of workers."""
        return order.share(rows, self.rank // self.members, self.world_size // self.members, size)

    def piece(self, batch: Batch, pad_id: int) -> Batch:
        """This worker's piece of a packed row: of 9 tokens the members of two have 5 each, the last of them padding.

        `cu_seq_lens_*` stay the whole row's, with the padding as an example at the end; a target stays where it was, so that the last
        token of a piece predicts the first of the next. `examples` and `lengths` are the whole row's.
        """
        if self.members == 1 or self.whole:
            return batch
        length = -(-batch.targets.shape[1] // self.members)
        batch = _filled(batch, length * self.members, pad_id)
        mine = slice(self.place * length, (self.place + 1) * length)
        inputs = batch.inputs | {name: batch.inputs[name][:, mine] for name in ("input_ids", "position_ids")}
        targets = batch.targets[:, mine]
        return replace(batch, inputs=inputs, targets=targets, supervised=int((targets != IGNORED).sum()))


@dataclass(frozen=True)
class Collator:
    """Makes one worker's micro-batches on its device."""

    prepared: Examples
    layout: Layout
    pad_id: int
    share: Share
    device: torch.device

    def __call__(self, rows: Sequence[int | None]) -> Batch:
        """`collate` of `rows`, and of that this worker's piece."""
        batch = collate(self.prepared, rows, self.layout, self.pad_id)
        if self.layout == "packed" and self.device.type == "cpu":
            batch = _filled(batch, -(-batch.targets.shape[1] // _EVEN) * _EVEN, self.pad_id)
        return self.share.piece(batch, self.pad_id).to(self.device)


def _filled(batch: Batch, length: int, pad_id: int) -> Batch:
    """A packed row of `length` tokens: padding is examples at its end, without targets, and not counted. None is longer than the
    row's longest: a table of positions has room for those.
    """
    missing, longest = length - batch.targets.shape[1], batch.inputs["max_length_q"]
    if not missing:
        return batch
    starts = batch.inputs["cu_seq_lens_q"]
    ends = torch.arange(longest, missing + longest, longest, dtype=torch.int32).clamp(max=missing)
    inputs = dict(batch.inputs)
    inputs["cu_seq_lens_q"] = inputs["cu_seq_lens_k"] = torch.cat([starts, starts[-1:] + ends])
    inputs["input_ids"] = pad(inputs["input_ids"], (0, missing), value=pad_id)
    inputs["position_ids"] = torch.cat([inputs["position_ids"], torch.arange(missing)[None] % longest], 1)
    return replace(batch, inputs=inputs, targets=pad(batch.targets, (0, missing), value=IGNORED))


def _height(rows: Sequence[int | None], examples: Sequence[StoredExample]) -> int:
    """Rows of the tensor: one an example, and one a padding row, so that every worker's share is alike."""
    return len(examples) + sum(row is None for row in rows)


def _shifted(example: StoredExample) -> np.ndarray:
    """[length]: at position t the token t + 1 where that is supervised. The last position predicts nothing.

    For ids [7, 8, 9] with the mask [0, 0, 1] it is [-100, 9, -100]: an example never predicts the next one's first token.
    """
    targets = np.full(len(example.input_ids), IGNORED, np.int64)
    supervised = np.asarray(example.loss_mask[1:], bool)
    targets[:-1][supervised] = example.input_ids[1:][supervised]
    return targets


def _packed(examples: Sequence[StoredExample], pad_id: int) -> tuple[dict[str, Any], torch.Tensor]:
    """Positions restart at every example; `cu_seq_lens_*` says where examples begin: [0, 3, 5] for lengths 3 and 2."""
    ids = np.concatenate([example.input_ids for example in examples] or [np.array([pad_id])]).astype(np.int64)
    mask = np.concatenate([example.loss_mask for example in examples] or [np.array([False])])
    lengths = np.array([len(example.input_ids) for example in examples] or [1])
    ends = np.cumsum(lengths)
    supervised = mask[1:].copy()
    supervised[ends[:-1] - 1] = False  # an example never predicts the next one's first token
    targets = np.full(len(ids), IGNORED, np.int64)
    targets[:-1][supervised] = ids[1:][supervised]
    starts = torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32))
    longest = int(lengths.max())
    inputs: dict[str, Any] = {
        "input_ids": torch.from_numpy(ids)[None],
        "position_ids": torch.from_numpy(np.arange(len(ids)) - np.repeat(ends - lengths, lengths))[None],
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": longest,
        "max_length_k": longest,
    }
    return inputs, torch.from_numpy(targets)[None]


def _padded(examples: Sequence[StoredExample], height: int, pad_id: int) -> tuple[dict[str, Any], torch.Tensor]:
    ids, mask = _grid([np.asarray(example.input_ids) for example in examples], height, pad_id)
    targets, _ = _grid([_shifted(example) for example in examples], height, IGNORED)
    return {"input_ids": ids, "attention_mask": mask}, targets


class _Pair(NamedTuple):
    """An example of a sequence-to-sequence model, int64. For target [5, 6] the decoder reads [pad, 5] and predicts [5, 6]."""

    source: np.ndarray
    decoder_ids: np.ndarray
    """`pad_id` stands in the place of the start."""
    targets: np.ndarray


def _pair(example: StoredExample, pad_id: int) -> _Pair:
    """`input_ids` = source + target; the target begins where the mask does."""
    ids = np.asarray(example.input_ids, np.int64)
    mask = np.asarray(example.loss_mask, bool)
    border = int(mask.argmax()) if mask.any() else len(ids)
    target = ids[border:]
    if not len(target):
        return _Pair(ids, np.array([pad_id]), np.array([IGNORED]))
    return _Pair(ids[:border], np.concatenate([[pad_id], target[:-1]]), np.where(mask[border:], target, IGNORED))


def _packed_pairs(examples: Sequence[StoredExample], pad_id: int) -> tuple[dict[str, Any], torch.Tensor]:
    """Example n of the decoder's row (`q`) belongs to example n of the encoder's row (`k`)."""
    nothing = _Pair(np.array([pad_id]), np.array([pad_id]), np.array([IGNORED]))
    pairs = [_pair(example, pad_id) for example in examples] or [nothing]
    # A source without tokens would leave its target nothing to look at.
    sources = [pair.source if len(pair.source) else nothing.source for pair in pairs]
    decoder_ids = [pair.decoder_ids for pair in pairs]
    inputs: dict[str, Any] = {
        "input_ids": _row(sources),
        "decoder_input_ids": _row(decoder_ids),
        "cu_seq_lens_q": _starts(decoder_ids),
        "cu_seq_lens_k": _starts(sources),
        "max_length_q": max(map(len, decoder_ids)),
        "max_length_k": max(map(len, sources)),
    }
    return inputs, _row([pair.targets for pair in pairs])


def _seq2seq(examples: Sequence[StoredExample], height: int, pad_id: int) -> tuple[dict[str, Any], torch.Tensor]:
    pairs = [_pair(example, pad_id) for example in examples]
    source_ids, source_mask = _grid([pair.source for pair in pairs], height, pad_id)
    decoder_ids, decoder_mask = _grid([pair.decoder_ids for pair in pairs], height, pad_id)
    targets, _ = _grid([pair.targets for pair in pairs], height, IGNORED)
    inputs = {
        "input_ids": source_ids,
        "attention_mask": source_mask,
        "decoder_input_ids": decoder_ids,
        "decoder_attention_mask": decoder_mask,
    }
    return inputs, targets


def _starts(pieces: Sequence[np.ndarray]) -> torch.Tensor:
    """int32 [pieces + 1]: where each begins, and the end: [0, 3, 5] for lengths 3 and 2."""
    return torch.from_numpy(np.cumsum([0, *map(len, pieces)]).astype(np.int32))


def _row(pieces: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(pieces).astype(np.int64))[None]


def _grid(pieces: Sequence[np.ndarray], height: int, fill: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`pieces` on the left of [height, longest], the rest `fill`; and the mask of what is real.

    NOTE: every row has at least one unmasked position, or its softmax would be NaN.
    """
    width = max([1, *(len(piece) for piece in pieces)])
    grid = np.full((height, width), fill, np.int64)
    mask = np.zeros((height, width), np.int64)
    for index, piece in enumerate(pieces):
        grid[index, : len(piece)] = piece
        mask[index, : len(piece)] = 1
    mask[:, 0] = 1
    return torch.from_numpy(grid), torch.from_numpy(mask)
