"""What planning knows of a model: how many numbers of which kind, counted without any weights (`model.footprint`)."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of one model that a run tunes. Bytes are those of the run's dtype, as one forward pass would hold them."""

    kind: str
    """transformers' model type."""
    sizes: Mapping[int, int]
    """Elements of a parameter -> how many parameters are that large; tied ones count once."""
    trained: int
    """Elements that are updated: all of them, or an adapter's, or what is not frozen."""
    active: int
    """Elements that take part in a matrix product for each token: no input embedding, of experts those that a token visits."""
    layers: int
    attention_width: int
    """Heads times their size: what one token's scores cost per token that it sees, over 4 FLOPs, in each layer."""
    vocabulary: int
    largest_layer: int
    """Elements of the largest of the repeated layers."""
    layer_activations: int
    """Bytes a token and layer, kept from the forward for the backward pass."""
    layer_input: int
    """Bytes a token and layer that remain where activations are recomputed."""
    other_activations: int
    """Bytes a token outside the layers, logits left out."""
    counted: bool
    """Whether the activations were counted on the model itself, or only estimated from its sizes (mixtures of experts)."""

    @property
    def parameters(self) -> int:
        """Elements in all."""
        return sum(size * count for size, count in self.sizes.items())

    def no_larger_than(self, threshold: int) -> int:
        """Elements in parameters of at most `threshold` elements: what ZeRO-3 leaves whole on every worker."""
        return sum(size * count for size, count in self.sizes.items() if size <= threshold)
