"""The repeated layers of a model: what is recomputed, compiled and counted one by one."""

from typing import Any

from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from dstune.engine import leaves
from dstune.engine.parameters import full_shape
from dstune.model.config import is_multimodal


def repeated_layers(module: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """The repeated layers, each of which may be recomputed; none inside another. Of a model that sees, those of its text side."""
    found: list[GradientCheckpointingLayer] = []
    inside: set[int] = set()
    body: Any = module.get_decoder() if is_multimodal(module.config) else module
    for layer in body.modules():
        if isinstance(layer, GradientCheckpointingLayer) and id(layer) not in inside:
            found.append(layer)
            inside.update(id(part) for part in layer.modules())
    return found


def keep_every_layer(module: PreTrainedModel) -> float:
    """Have a pass leave no layer out at random, and say how often one would have been: the largest rate of its parts.

    ZeRO-3 gathers a layer's weights on all workers together: one that leaves it out would let the others wait for ever. And a step's
    loss would depend on which worker drew what.
    """
    dropping = [part for part in module.modules() if getattr(part, "layerdrop", 0)]
    rate = max((float(part.layerdrop) for part in dropping), default=0.0)  # type: ignore[arg-type]
    for part in dropping:
        part.layerdrop = 0.0  # type: ignore[assignment]
    return rate


def beyond_matrices(module: PreTrainedModel) -> str | None:
    """What the repeated layers do that is neither attention nor a matrix for every token alike; None: nothing.

    Experts, as modules or fused in one weight, and the convolutions of recurrent layers, by their weights of three dimensions.
    """
    layers = repeated_layers(module)
    if not layers:
        return f"{type(module).__name__} has no repeated layers that transformers knows"
    deep = any(len(full_shape(weight)) > 2 for layer in layers for weight in layer.parameters())
    if deep or any(leaves.routed_modules(layer) for layer in layers):
        return f"the layers of {module.config.model_type} have experts, or a recurrent state"
    return None
