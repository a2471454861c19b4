"""What planning knows of a model: how many numbers of which kind, counted without any weights (`model.footprint`)."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

_WHOLE_INPUTS = 6
"""Tensors as wide as a layer's input that it keeps whole, where its matrices are cut: before and behind its norms, and behind its sums."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of one model that a run tunes. Bytes are those of the run's dtype, as one forward pass would hold them."""

    kind: str
    """transformers' model type."""
    sizes: Mapping[int, int]
    """Elements of a parameter -> how many parameters are that large; tied ones count once."""
    trained: int
    """Elements that are updated: all of them, or an adapter's, or what is not frozen."""
    tables: int = 0
    """Those of them in embeddings, of tokens and of positions."""
    hidden: int = 0
    """Those of them in matrices that are neither embeddings nor the head: what Muon treats."""
    active: int
    """Elements that take part in a matrix product for each token: no input embedding, of experts those that a token visits."""
    frozen_active: int = 0
    """Those of them that are not updated: a product less in the backward pass."""
    layers: int
    experts: int = 0
    """Of all layers together."""
    attention_width: int
    """Heads times their size: what one token's scores cost per token that it sees, over 4 FLOPs, in each layer."""
    vocabulary: int
    largest_layer: int
    """Elements of the largest of the repeated layers."""
    layer_activations: int
    """Bytes a token and layer, kept from the forward for the backward pass; without what a tile computes again."""
    layer_input: int
    """Bytes a token and layer that remain where activations are recomputed."""
    other_activations: int
    """Bytes a token outside the layers, logits left out."""
    compiled_activations: int = 0
    """`layer_activations` where torch compiles the layers."""
    attention_activations: int = 0
    """Bytes of `layer_activations` that are queries, keys, values and the result of attention."""
    attention_result: int = 0
    """Bytes of the result among them."""
    fp32_tokens: int = 0
    """Tokens of an example up to which a CPU attends in fp32 (`model.per_example`)."""
    tile_tokens: int = 0
    """Tokens that pass a feed-forward layer at once (`model.mlp_tile`); 0: all of them."""
    tile_activations: int = 0
    """Bytes a token that exist for one tile alone."""
    tiled: int = 0
    """Elements of the layers that go tile by tile, and are computed once more therefore."""
    recomputable: bool = True
    """Whether activation checkpointing works for this architecture."""
    head_trained: bool = True
    """Whether the layer that makes the logits is updated."""
    head_tied: bool = False
    """Whether that layer is the input embedding too."""
    members: int = 1
    """Workers that hold it between them: the sizes are those of one's part (`part`)."""
    counted: bool
    """Whether the activations were counted on the model itself, or only estimated from its sizes (mixtures of experts)."""

    @property
    def parameters(self) -> int:
        """Elements in all."""
        return sum(size * count for size, count in self.sizes.items())

    @property
    def largest(self) -> int:
        """Elements of the largest parameter."""
        return max(size for size, count in self.sizes.items() if count)

    def no_larger_than(self, threshold: int) -> int:
        """Elements in parameters of at most `threshold` elements: what ZeRO-3 leaves whole on every worker."""
        return sum(size * count for size, count in self.sizes.items() if size <= threshold)

    def part(self, members: int, element_bytes: int) -> "ModelShape":
        """What each of `members` workers holds of it that cut its layers (not its embeddings, nor its head), roughly: of what a layer
        keeps for the backward pass its input and what the norms make of it are whole.
        """
        if members == 1:
            return self
        table = self.vocabulary * self.layer_input // element_bytes
        sizes: dict[int, int] = {}
        for size, count in self.sizes.items():
            own = size if size == table else -(-size // members)
            sizes[own] = sizes.get(own, 0) + count
        smaller = replace(self, sizes=sizes)
        whole = _WHOLE_INPUTS * self.layer_input
        return replace(
            smaller,
            members=members,
            trained=self.trained * smaller.parameters // max(1, self.parameters),
            hidden=self.hidden // members,
            active=table + max(0, self.active - table) // members,
            frozen_active=self.frozen_active // members,
            attention_width=self.attention_width // members,
            largest_layer=self.largest_layer // members,
            layer_activations=_cut(self.layer_activations, whole, members),
            compiled_activations=_cut(self.compiled_activations, whole, members),
            attention_activations=self.attention_activations // members,
            attention_result=self.attention_result // members,
            tile_activations=self.tile_activations // members,
            tiled=self.tiled // members,
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON-like, where keys are no numbers; `from_dict` gives an equal one back."""
        return asdict(self) | {"sizes": sorted(map(list, self.sizes.items()))}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "ModelShape":
        values: dict[str, Any] = {**value, "sizes": dict(value["sizes"])}
        return cls(**values)


def _cut(kept: int, whole: int, members: int) -> int:
    """Of `kept` bytes, `whole` of which nobody shares."""
    return min(kept, whole) + max(0, kept - whole) // members
