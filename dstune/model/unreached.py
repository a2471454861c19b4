"""Layers that no gradient reaches: found for the architecture at hand, on a tiny random model of its class.

Indexers that only choose what attention looks at (DeepSeek-V3.2's), projections of global tokens that nobody names (LED's), poolers
beside the language model: an adapter on them would stay as it began, take memory and pass for trained.
"""

import re

import torch
from transformers import PretrainedConfig

from dstune.model import isolation
from dstune.model.failures import FAILURES
from dstune.model.remembered import Remembered

_LENGTH = 256
"""Tokens: enough for each expert to be visited, and for layers that work on blocks of 128."""


def unreached(config: PretrainedConfig) -> frozenset[str]:
    """The names of modules whose own parameters get no gradient from a text, as `pattern` writes them; of what cannot be tried none."""
    return _unreached(config)


def pattern(name: str) -> str:
    """`layers.*.mlp` for `layers.3.mlp`: what is one and the same in all layers, and in all experts."""
    return re.sub(r"\d+", "*", name)


@Remembered
def _unreached(config: PretrainedConfig) -> frozenset[str]:
    small = isolation.smallest_that_builds(config)
    if small is None:
        return frozenset()
    # Whoever asks may be building a model without storage.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.enable_grad():
        torch.manual_seed(0)
        ids = torch.randint(1, small.get_text_config().vocab_size, (1, _LENGTH))
        inputs = {"input_ids": ids, "decoder_input_ids": ids} if small.is_encoder_decoder else {"input_ids": ids}
        try:
            model = isolation.instance(small, "eager")
            model(**inputs, use_cache=False).logits.logsumexp(-1).sum().backward()
        except FAILURES:
            return frozenset()
    reached: dict[bool, set[str]] = {True: set(), False: set()}
    for name, parameter in model.named_parameters():
        reached[parameter.grad is not None].add(pattern(name.rpartition(".")[0]))
    return frozenset(reached[False] - reached[True])
