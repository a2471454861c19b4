"""What the parts of `tools/bench gpu` work on: models' shapes, made-up chats, and how much of it a run takes. No torch in here."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from dstune.data.pack import one_per_row, pack


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of one run of the benchmark."""

    tiny: bool = False
    """Everything so small that a CPU does it in seconds: that shows only that the script runs."""
    steps: int = 8
    """Counted steps of each side."""
    warmup: int = 2
    rounds: int = 2
    """How often sides that do not fit the device together take turns."""
    step_tokens: int = 32_768
    """At least so many a step: the micro-batches that make it up follow from their size."""
    offload_step_tokens: int = 65_536
    """The same where an update's time counts most."""
    max_length: int = 4096
    host_bytes: int | None = None
    """Of main memory; None: what the machine says that it has."""
    peer: str = "autocast"
    """Weights of the plain torch side: `autocast` (fp32 ones, computed in bf16) or `bf16` (and its states with them)."""

    def shape(self, name: str) -> "Shape":
        """The shape of that name, or in its place the tiny one."""
        return TINY if self.tiny else SHAPES[name]


TINY_SETTINGS = Settings(tiny=True, steps=1, warmup=1, rounds=1, step_tokens=128, offload_step_tokens=64, max_length=64)


class Shape(NamedTuple):
    """A Llama."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = False

    def config(self) -> dict[str, Any]:
        """The model's config.json."""
        return {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.hidden // self.heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500_000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": self.tied,
        }

    @property
    def parameters(self) -> int:
        """Elements of its matrices, which is nearly all of them."""
        attention = self.hidden**2 * 2 * (1 + self.kv_heads / self.heads)
        layer = attention + 3 * self.hidden * self.intermediate
        return int(self.layers * layer + (1 if self.tied else 2) * self.vocabulary * self.hidden)


SHAPES = {
    "1.2b": Shape(2048, 8192, 16, 32, 8, 128_256, tied=True),
    "3b": Shape(3072, 8192, 28, 24, 8, 128_256, tied=True),
    "7b": Shape(4096, 11_008, 32, 32, 32, 32_000),
    "8b": Shape(4096, 14_336, 32, 32, 8, 128_256),
    "deep": Shape(5120, 13_824, 44, 40, 40, 32_000),
}
"""The Llamas of these sizes (Touvron et al. 2023; Llama 3.1 and 3.2); `deep` is the 13 B one, whose layers the search counts."""
TINY = Shape(64, 128, 2, 4, 2, 256)

_MEDIAN, _SPREAD, _SHORTEST = 350, 0.9, 16
"""Of a chat's tokens: real chat sets have medians of 200 to 500 and a long tail."""
ANSWERED = 0.5
"""The share of a chat's tokens that are an answer's."""


class Example(NamedTuple):
    """What `dstune.batch` reads of a stored example."""

    input_ids: np.ndarray
    loss_mask: np.ndarray


class MadeUp:
    """Examples of drawn tokens, packed by dstune's own packing: `dstune.batch.Examples`. The same for the same arguments."""

    def __init__(self, lengths: Sequence[int], vocabulary: int, max_length: int | None, answered: float = 1.0) -> None:
        """`max_length`: of a row; None: each example is a row of its own. `answered`: the share of its tokens that is trained."""
        self.lengths = np.asarray(lengths)
        self._vocabulary, self._answered = vocabulary, answered
        self._packing = one_per_row(len(lengths)) if max_length is None else pack(self.lengths, max_length)

    @property
    def num_rows(self) -> int:
        return self._packing.num_rows

    def row(self, index: int, /) -> np.ndarray:
        """Numbers of its examples."""
        return self._packing.items[self._packing.offsets[index] : self._packing.offsets[index + 1]]

    def example(self, index: int, /) -> Example:
        length = int(self.lengths[index])
        ids = np.random.default_rng(index).integers(1, self._vocabulary, length, dtype=np.int32)
        mask = np.arange(length) >= max(1, round(length * (1 - self._answered)))
        return Example(ids, mask)

    def squares(self) -> int:
        """The sum of the squared lengths."""
        return int((self.lengths.astype(np.int64) ** 2).sum())


def chat_lengths(count: int, max_length: int, seed: int = 0) -> list[int]:
    """Of chats: log-normal, the longest of them `max_length`."""
    median = min(_MEDIAN, max_length // 4)
    drawn = np.random.default_rng(seed).lognormal(np.log(median), _SPREAD, count)
    return np.clip(drawn, min(_SHORTEST, max_length), max_length).astype(int).tolist()


def chats_of(tokens: int, max_length: int, seed: int = 0) -> list[int]:
    """Lengths of as many chats as have about so many tokens."""
    lengths = chat_lengths(tokens // min(_SHORTEST, max_length), max_length, seed)
    return [length for length, end in zip(lengths, np.cumsum(lengths), strict=True) if end <= tokens]
