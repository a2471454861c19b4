"""A model's last linear layer and the cross-entropy behind it in one function: the logits of all tokens never exist at once.

Tokens go through in chunks. A chunk's logits turn, where they lie, into the loss's derivative by them, and that goes at once into the
gradients of the hidden states and of the layer's weight: the forward pass makes the gradients, and the backward pass scales them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

_CHUNK_BYTES = 128 << 20
"""Of a chunk's logits."""
_EVEN = 64
"""Tokens that a processor's products are made of a multiple of: its library compiles one for each number of rows that it meets (5 ms,
and as many for each block of the weight as three percent of a small model's step)."""
_BLOCK_BYTES = 4 << 20
"""Of the weight's rows that one product takes: a processor packs them anew for each."""
_CACHED_ELEMENTS = 1 << 17
"""Logits whose fp32 copies stay in a core's cache from the first look at them to the last."""
_RESIDENT_ELEMENTS = 1 << 26
"""The same on an accelerator, where starting an operation costs more than reading memory."""
_HALF_FACTOR = 256.0
"""fp16 holds nothing below 6e-8, and most probabilities of a large vocabulary are little more: derivatives are kept so much larger."""


@dataclass(frozen=True)
class Logits:
    """What a model makes of its last layer's output z: cap * tanh(scale * z / cap), without a cap scale * z."""

    scale: float = 1.0
    cap: float | None = None

    def apply_(self, values: torch.Tensor) -> torch.Tensor | None:
        """Turn z [n, vocabulary] into logits in place; the derivative by z where it is not 1."""
        if self.scale != 1.0:
            values.mul_(self.scale)
        if self.cap is None:
            return None if self.scale == 1.0 else values.new_full((), self.scale)
        values.div_(self.cap).tanh_()
        # NOTE: a GPU makes `new_full` by itself; for `new_tensor` it would be waited for.
        slope = torch.addcmul(values.new_full((), 1.0), values, values, value=-1.0).mul_(self.scale)
        values.mul_(self.cap)
        return slope


LinearCrossEntropy = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor, Logits],
    torch.Tensor,
]
"""`function(hidden, weight, bias, targets, logits)`, as `summed_linear_cross_entropy`."""


def summed_linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor, logits: Logits
) -> torch.Tensor:
    """Sum over n of -log softmax(logits(weight @ hidden[n] + bias))[targets[n]]: fp32, exactly 0 for no tokens.

    `hidden` [n, width] and `weight` [vocabulary, width] of one dtype; `bias` [vocabulary] or None; `targets` [n]. The sums over tokens
    that make the weight's gradient are fp32. The result can be differentiated once.
    """
    return _SummedLinearCrossEntropy.apply(hidden, weight, bias, targets, logits, torch.is_grad_enabled())


class _SummedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        logits: Logits,
        learns: bool,
    ) -> torch.Tensor:
        wanted = [learns and needed for needed in ctx.needs_input_grad[:3]]
        work = _Work(hidden, weight, bias, targets, logits, wanted)
        loss = work.run()
        ctx.work = work if any(wanted) else None
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        work, ctx.work = ctx.work, None
        assert work is not None, "the gradients were made once, and are gone with the first backward pass"
        return *work.gradients(gradients[0]), None, None, None


class _Work:
    """One call: the loss, and the gradients as far as they are `wanted` (of the hidden states, the weight, the bias)."""

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        logits: Logits,
        wanted: list[bool],
    ) -> None:
        self.hidden, self.weight, self.bias, self.targets, self.logits = _evened(hidden), weight, bias, targets, logits
        self.wanted = wanted
        self.factor = _HALF_FACTOR if weight.dtype is torch.float16 else 1.0
        self.chunks = list(_chunks(len(self.hidden), weight, wanted[1]))
        self.of_hidden = torch.empty_like(self.hidden) if wanted[0] else None
        self.of_weight = self._weight_sum() if wanted[1] else None
        self.of_bias = weight.new_zeros(len(weight), dtype=torch.float32) if wanted[2] else None

    def _weight_sum(self) -> torch.Tensor | None:
        """fp32 where chunks add up to it; where there is one, its product is summed in fp32 and rounded once anyhow.

        None where it will be made in the memory of the logits.
        """
        if not self.chunks:
            return torch.zeros_like(self.weight)
        if len(self.chunks) > 1:
            return torch.empty_like(self.weight, dtype=torch.float32)
        return None if _is_overlaid(len(self.hidden), self.weight) else torch.empty_like(self.weight)

    def run(self) -> torch.Tensor:
        size = max((chunk.stop - chunk.start for chunk in self.chunks), default=0)
        room = self.weight.new_empty(size, len(self.weight))
        total = torch.zeros((), dtype=torch.float32, device=self.hidden.device)
        for chunk in self.chunks:
            hidden = self.hidden[chunk]
            values = room[: len(hidden)]
            for rows in _blocks(self.weight):
                torch.mm(hidden, self.weight[rows].t(), out=values[:, rows])
            targets = self.targets[chunk]
            total += self._differentiate_(values[: len(targets)], targets)
            values[len(targets) :] = 0
            if self.of_hidden is not None:
                torch.mm(values, self.weight, out=self.of_hidden[chunk])
            if self.of_weight is not None:
                self._add_to_weight(values, hidden, first=chunk.start == 0)
            elif self.wanted[1]:
                self.of_weight = self._overlay(values, hidden)
        return total

    def _differentiate_(self, values: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The summed loss of a chunk's `values` [n, vocabulary], which become its derivative by them, `factor` times."""
        elements = _RESIDENT_ELEMENTS if values.is_cuda else _CACHED_ELEMENTS * torch.get_num_threads()
        step = max(1, elements // values.shape[1])
        losses = torch.empty(len(targets), dtype=torch.float32, device=values.device)
        bias = None if self.bias is None else self.bias.float()
        for start in range(0, len(targets), step):
            rows = slice(start, start + step)
            part, chosen = values[rows].float(), targets[rows, None]
            if bias is not None:
                part += bias
            slope = self.logits.apply_(part)
            part -= part.amax(1, keepdim=True)
            wanted = part.gather(1, chosen)
            sums = part.exp_().sum(1, keepdim=True)
            losses[rows] = (sums.log() - wanted).squeeze(1)
            if not any(self.wanted):
                continue
            part.mul_(self.factor / sums).scatter_add_(1, chosen, part.new_full((1, 1), -self.factor).expand_as(chosen))
            if slope is not None:
                part *= slope
            if self.of_bias is not None:
                self.of_bias += part.sum(0)
            if part.data_ptr() != values[rows].data_ptr():
                values[rows] = part
        return losses.sum()

    def _add_to_weight(self, derivative: torch.Tensor, hidden: torch.Tensor, first: bool) -> None:
        """Add `derivative`^T @ `hidden` to the weight's gradient."""
        assert self.of_weight is not None
        for rows in _blocks(self.weight):
            part, into = derivative[:, rows].t(), self.of_weight[rows]
            if not into.is_cuda:  # a processor's product packs a transposed operand twice as slowly as this copies it
                part = part.contiguous()
            if into.dtype is derivative.dtype and first:
                torch.mm(part, hidden, out=into)
            elif into.dtype is derivative.dtype:
                into.addmm_(part, hidden)
            elif into.is_cuda and not first:
                # NOTE: two tensors of one place would be copied onto each other before: as many bytes again as the product moves.
                torch.addmm(into, part, hidden, out_dtype=torch.float32, out=into)
            elif into.is_cuda:
                torch.mm(part, hidden, out_dtype=torch.float32, out=into)
            elif first:
                into.copy_(torch.mm(part, hidden))
            else:
                into += torch.mm(part, hidden)

    def _overlay(self, derivative: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """The weight's gradient, in the memory of the `derivative` [at least 2 * width, vocabulary] that it is made of.

        Each block of columns makes way for its part of the gradient, transposed, in the uppermost rows; the next ones take it upright.
        """
        width = hidden.shape[1]
        across, upright = derivative[:width], derivative[width : 2 * width].view(-1, width)
        transposed = hidden.t().contiguous()
        for rows in _blocks(self.weight):
            across[:, rows] = torch.mm(transposed, derivative[:, rows])
        return upright.copy_(across.t())

    def gradients(self, upstream: torch.Tensor) -> list[torch.Tensor | None]:
        """Of the hidden states, the weight and the bias, for the loss's own gradient `upstream`."""
        scale = upstream / self.factor
        bias = self.bias
        return [
            None if self.of_hidden is None else _times(self.of_hidden[: len(self.targets)], scale),
            None if self.of_weight is None else _scaled(self.of_weight, scale, self.weight.dtype),
            None if self.of_bias is None or bias is None else (self.of_bias * scale).to(bias.dtype),
        ]


def _chunks(count: int, weight: torch.Tensor, summed: bool) -> Iterator[slice]:
    """Equal parts of `count` tokens, or one where that takes no more memory; `summed`: they add up to the weight's gradient."""
    size = _short(weight)
    number = 1 if count <= size or (summed and _held(count, weight) <= _held_by_several(weight)) else -(-count // size)
    size = _up(-(-count // number), weight)
    yield from (slice(start, min(start + size, count)) for start in range(0, count, max(1, size)))


def _short(weight: torch.Tensor) -> int:
    """Tokens of one of several chunks, at most."""
    return max(1, _CHUNK_BYTES // (weight.shape[0] * weight.itemsize))


def _held_by_several(weight: torch.Tensor) -> int:
    """What a short chunk takes together with the fp32 sum of `weight`'s gradients; counted in tokens' logits."""
    return _short(weight) + weight.shape[1] * torch.float32.itemsize // weight.itemsize


def _held(count: int, weight: torch.Tensor) -> int:
    """What a single chunk of `count` tokens takes together with `weight`'s gradient."""
    return count if _is_overlaid(count, weight) else count + weight.shape[1]


def _is_overlaid(count: int, weight: torch.Tensor) -> bool:
    """Whether such a chunk holds `weight`'s gradient twice, and would be too large beside it. On an accelerator that is one product."""
    width = weight.shape[1]
    return not weight.is_cuda and count >= 2 * width and count + width > _held_by_several(weight)


def _evened(hidden: torch.Tensor) -> torch.Tensor:
    """`hidden` with rows of zeros behind it, where a product wants some."""
    missing = _up(len(hidden), hidden) - len(hidden)
    return torch.cat([hidden, hidden.new_zeros(missing, hidden.shape[1])]) if missing else hidden


def _up(count: int, like: torch.Tensor) -> int:
    """The next number of tokens that a product is made of. On an accelerator this one."""
    return count if like.is_cuda else -(-count // _EVEN) * _EVEN


def _blocks(weight: torch.Tensor) -> Iterator[slice]:
    """Rows of `weight` that one product takes. On an accelerator all of them."""
    size = len(weight) if weight.is_cuda else max(1, _BLOCK_BYTES // (weight.shape[1] * weight.itemsize))
    yield from (slice(start, start + size) for start in range(0, len(weight), size))


def _times(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`values` in place, rounded once. NOTE: CUDA rounds a factor without dimensions to the other one's dtype first."""
    return torch.mul(values, scale.reshape(1), out=values) if values.is_cuda else values.mul_(scale)


def _scaled(values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`values` * `scale`, rounded to `dtype` once, in the memory that `values` has: its front where `dtype` is shorter.

    NOTE: number i of n bytes goes to i * n, and is read from i * 4 or behind: nothing is overwritten that is still to be read.
    """
    if values.dtype is dtype:
        return _times(values, scale)
    source = values.flatten()
    result = source.view(dtype)[: source.numel()]
    for start in range(0, len(source), _RESIDENT_ELEMENTS >> 4):
        part = slice(start, start + (_RESIDENT_ELEMENTS >> 4))
        result[part] = source[part] * scale
    return result.view(values.shape)
