"""Of a model that sees or hears too, the part that text passes: its language model and head. All else is left as it is."""

from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from dstune.model.config import is_multimodal
from dstune.model.names import all_tensors


def beside(module: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The parameters and persistent buffers that no text passes, by every name: a vision tower's, a projector's; of most models none."""
    if not is_multimodal(module.config):
        return {}
    passed = {id(tensor) for part in _parts(module) for tensor in (*part.parameters(), *part.buffers())}
    return {name: tensor for name, tensor in all_tensors(module).items() if id(tensor) not in passed}


def modules_beside(module: PreTrainedModel) -> set[str]:
    """The names of the modules that are no part of what text passes."""
    if not is_multimodal(module.config):
        return set()
    passed = {id(inner) for part in _parts(module) for inner in part.modules()}
    return {name for name, inner in module.named_modules() if id(inner) not in passed}


def _parts(module: PreTrainedModel) -> Iterator[torch.nn.Module]:
    parts: list[Any] = [module.get_decoder(), module.get_input_embeddings(), module.get_output_embeddings()]
    return (part for part in parts if part is not None)
