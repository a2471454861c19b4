"""A model that learns to write must not see what it is to predict: shown for the architecture at hand, on a tiny random model of its class.

BERT and its kin open as causal models too, and see all of a row unless their config says otherwise: the loss falls to nothing, and
nothing is learnt.
"""

import torch
from transformers import PretrainedConfig, PreTrainedModel

from dstune.errors import ConfigError, Problem
from dstune.model import isolation
from dstune.model.failures import FAILURES
from dstune.model.remembered import Remembered

_LENGTH, _KEPT = 12, 8
"""Tokens of a row, and how many of them stay as they are."""


def require(config: PretrainedConfig, attention: str) -> None:
    """Raises ConfigError where a position's logits change with the tokens behind it. What cannot be tried here is let pass."""
    if not _looks_ahead(config, attention):
        return
    settable = not config.is_encoder_decoder and getattr(config, "is_decoder", None) is False
    raise ConfigError(
        Problem(
            "model.path",
            f"{config.model_type}, as its config stands, sees the tokens that it is to predict",
            "a model of which each token sees those before it alone",
            "Set `model.overrides: {is_decoder: true}`." if settable else "Take another one.",
        )
    )


@Remembered
def _looks_ahead(config: PretrainedConfig, attention: str) -> bool:
    small = isolation.smallest_that_builds(config)
    if small is None:
        return False
    last = "decoder_input_ids" if small.is_encoder_decoder else "input_ids"
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        size = small.get_text_config(decoder=True).vocab_size
        row, other = torch.randint(1, size, (2, 1, _LENGTH))
        inputs = {"input_ids": row, last: row}
        # As long as the other: frequencies that follow a row's length stay what they are.
        changed = inputs | {last: torch.cat([row[:, :_KEPT], other[:, _KEPT:]], 1)}
        try:
            model = isolation.instance(small, attention)
            before, after = (_logits(model, one)[:, :_KEPT] for one in (inputs, changed))
        except FAILURES:
            return False
    scale = before.abs().max().clamp_min(1e-12)
    return bool((before - after).abs().max() / scale > isolation.TOLERANCE)


def _logits(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    torch.manual_seed(0)  # of hashes that are drawn anew for each call
    return model(**inputs, use_cache=False).logits
