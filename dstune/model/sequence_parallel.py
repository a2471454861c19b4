"""Sequence parallelism: the workers of a group each take a piece of every row, and trade pieces for heads around the attention.

All that a causal model does outside its attention it does token by token. Before the attention each member gives away all heads
but its share, and gets that share's queries, keys and values of all other pieces; after it the outputs go back (DeepSpeed Ulysses,
Jacobs et al. 2023; ALST, Bekman et al. 2025). Between the two every member attends over the whole row, by `per_example`, to which
the call brings where the whole row's examples begin. A member keeps 1/members of the row's activations.

DeepSpeed's own part for this (`UlyssesSPAttentionHF`) wants values as wide as keys (latent attention's are not), key heads of which
the group's size is a multiple or a divisor, and position ids in every layer's call, which it gathers each time; the exchange
itself is one call of torch's.
"""

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig

from dstune.config.schema import ModelSection
from dstune.errors import ConfigError, Problem, first_line
from dstune.model import attention, isolation
from dstune.model.config import numbers
from dstune.model.failures import FAILURES
from dstune.model.per_example import PER_EXAMPLE, no_mask_for_packed_rows, per_example_attention
from dstune.model.remembered import Remembered

EXCHANGED = f"{PER_EXAMPLE}-exchanged"
"""The name under which transformers knows the attention of a run whose workers share rows."""

_WHERE = "cluster.sequence_parallel"
_BETWEEN_ROWS = f"{PER_EXAMPLE}-between-rows"
_PROOF_MEMBERS = 4
_PROOF_LENGTHS = (13, 7, 12)
"""Every cut of the 32 tokens into four pieces goes through an example."""


class Exchange(Protocol):
    """How the members of a group trade. These three are the whole of its surface."""

    @property
    def members(self) -> int: ...

    def to_heads(self, *pieces: torch.Tensor) -> list[torch.Tensor]:
        """Of each tensor [1, heads, piece, size] this member's share of the heads for the whole row: [1, heads / members, row, size]."""
        ...

    def to_tokens(self, row: torch.Tensor) -> torch.Tensor:
        """The way back, in the layout of an attention's result: [1, row, heads / members, size] to [1, piece, heads, size]."""
        ...


class Workers:
    """The exchange over `group`, a process group of torch's in which every member runs the same model on its piece.

    `collectives`: torch.distributed, or what goes by its names.
    """

    def __init__(self, group: Any, collectives: Any = dist) -> None:
        self._group, self._collectives = group, collectives
        self.members = dist.get_world_size(group)

    def to_heads(self, *pieces: torch.Tensor) -> list[torch.Tensor]:
        shares = [piece[0].unflatten(0, (self.members, -1)).transpose(1, 2) for piece in pieces]
        rows = _Swap.apply(self._swapped, *shares)
        return [row.flatten(0, 1).transpose(0, 1)[None] for row in rows]

    def to_tokens(self, row: torch.Tensor) -> torch.Tensor:
        (shares,) = _Swap.apply(self._swapped, row[0].unflatten(0, (self.members, -1)))
        return shares.transpose(0, 1).flatten(1, 2)[None]

    def _swapped(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.contiguous()
        result = torch.empty_like(tensor)
        self._collectives.all_to_all_single(result, tensor, group=self._group)
        return result


class _Swap(torch.autograd.Function):
    """Part n of each tensor [members, …] goes to member n; what comes from member n is part n of the result. So do the gradients.

    NOTE: one node for all tensors, or the members could come to their backward exchanges in different orders, and hang.
    """

    @staticmethod
    def forward(
        ctx: Any, swapped: Callable[[torch.Tensor], torch.Tensor], *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.swapped = swapped
        return tuple(swapped(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        wanted = zip(ctx.needs_input_grad[1:], gradients, strict=True)
        return None, *(ctx.swapped(gradient) if needed else None for needed, gradient in wanted)


def register(exchange: Exchange, name: str = EXCHANGED) -> str:
    """Make attention over `exchange` known to transformers under `name`, which it returns: a model's `attn_implementation`."""
    AttentionInterface.register(name, _Exchanged(exchange).attend)
    AttentionMaskInterface.register(name, no_mask_for_packed_rows)
    return name


class _Exchanged:
    """Per-example attention between two exchanges."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    @torch.compiler.disable
    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """As `per_example_attention`, of a piece: `query` [1, heads, piece, size] gives [1, piece, heads, size].

        `cu_seq_lens_q` is the whole row's. Raises ConfigError where the heads do not divide, ValueError for what only the whole
        layer could do.
        NOTE: never compiled: an exchange stays where it stands among the collectives of ZeRO, on all members alike.
        """
        members = self._exchange.members
        require_heads(query.shape[1], members)
        if kwargs.get("cu_seq_lens_q") is None:
            raise ValueError("sequence parallelism takes packed rows alone")
        if kwargs.get("position_bias") is not None:
            raise ValueError("sequence parallelism has no biases by head")
        # Where members are more than key heads, or not a multiple, each head is given to several.
        copies = math.lcm(key.shape[1], members) // key.shape[1]
        if copies > 1:
            key, value = key.repeat_interleave(copies, 1), value.repeat_interleave(copies, 1)
        query, key, value = self._exchange.to_heads(query, key, value)
        result, _ = per_example_attention(module, query, key, value, attention_mask, **kwargs)
        return self._exchange.to_tokens(result), None


def require_heads(heads: int, members: int) -> None:
    """Raises ConfigError where `members` workers cannot share `heads` query heads evenly."""
    if heads % members:
        divisors = [str(number) for number in range(2, heads + 1) if heads % number == 0]
        came = f"{members} workers for the model's {heads} attention heads"
        raise ConfigError(Problem(_WHERE, came, f"one of 1, {', '.join(divisors)}"))


def prove(model: ModelSection, config: PretrainedConfig, members: int) -> None:
    """Show that `config`'s architecture can work on pieces of packed rows, or raise ConfigError with the reason.

    A tiny random fp32 model of the same class, as in `isolation`: a packed row cut into pieces gives what the whole row gives.
    """
    reason = _obstacle(config) or _no_attention(model, config)
    if reason is None:
        for heads in numbers(config.get_text_config(), "num_attention_heads"):
            require_heads(heads, members)
        reason = _disproof(config)
    if reason is not None:
        raise ConfigError(Problem(_WHERE, f"{config.model_type}: {reason}", "1"))


def _no_attention(model: ModelSection, config: PretrainedConfig) -> str | None:
    """Why the only attention that can be exchanged is not this model's; None where it is."""
    try:
        kernel = attention.choose(model, config, "packed")
        if kernel == PER_EXAMPLE:
            isolation.prove(config, PER_EXAMPLE)
    except ConfigError as error:
        return error.problems[0].came
    return None if kernel == PER_EXAMPLE else f"{kernel} attention cannot be exchanged, {PER_EXAMPLE} alone can"


def _obstacle(config: PretrainedConfig) -> str | None:
    """What the config alone says is in the way."""
    return "rows of sequence-to-sequence models are not cut" if config.is_encoder_decoder else None


class _Rows:
    """The exchange between the rows of one batch, each a member with a piece: no heads are shared out."""

    members = 1

    def to_heads(self, *pieces: torch.Tensor) -> list[torch.Tensor]:
        return [piece.transpose(0, 1).flatten(1, 2)[None] for piece in pieces]

    def to_tokens(self, row: torch.Tensor) -> torch.Tensor:
        return row[0].unflatten(0, (_PROOF_MEMBERS, -1))


@Remembered
def _disproof(config: PretrainedConfig) -> str | None:
    """Why rows of this architecture cannot be cut; None where it is shown that they can."""
    small = isolation.smallest_that_builds(config)
    if small is None:
        return "no small model of this class can be built, so nothing is shown"
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        size = small.get_text_config().vocab_size
        inputs = isolation.packed_inputs([{"input_ids": torch.randint(1, size, (1, n))} for n in _PROOF_LENGTHS])
        cut = dict(inputs)
        cut |= {name: inputs[name].view(_PROOF_MEMBERS, -1) for name in ("input_ids", "position_ids")}
        try:
            model = isolation.instance(small, PER_EXAMPLE)
            whole = model(**inputs, use_cache=False).logits
            model.set_attn_implementation(register(_Rows(), _BETWEEN_ROWS))
            pieces = model(**cut, use_cache=False).logits.reshape(whole.shape)
        except FAILURES as error:
            return f"its small model fails on pieces of a row ({first_line(error)})"
    difference = float((whole - pieces).abs().max() / whole.abs().max().clamp_min(1e-12))
    if difference <= isolation.TOLERANCE:
        return None
    return f"pieces of a row differ from the whole row by {difference:.1e}: tokens meet elsewhere than in attention that can be exchanged"
