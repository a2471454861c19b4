"""Models that look positions up in a table, and have none for a token behind its end."""

import torch
from transformers import PreTrainedModel

from dstune.errors import ConfigError, Problem

_NAMES = ("wpe", "position")
"""In the name of such a table, in every architecture that has one."""


def table(module: PreTrainedModel) -> int | None:
    """For how many tokens `module` has positions; None where it computes them, or tells tokens apart by their distance."""
    stated = getattr(module.config.get_text_config(), "max_position_embeddings", None)
    for name, part in module.named_modules():
        own = name.rpartition(".")[2]
        if isinstance(part, torch.nn.Embedding) and any(word in own for word in _NAMES) and stated:
            # Some keep rows for padding in front of the first position.
            return stated if stated <= part.num_embeddings <= stated + 2 else None
    return None


def require(module: PreTrainedModel, max_length: int) -> None:
    """Raises ConfigError where an example of `max_length` tokens would be longer than the table."""
    known = table(module)
    if known is not None and max_length > known:
        came = f"{max_length:,} tokens, and the model has a table of {known:,} positions"
        raise ConfigError(Problem("data.max_length", came, f"at most {known}"))
