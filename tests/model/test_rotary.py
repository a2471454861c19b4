"""Rotary frequencies that follow a length follow that of each example, however it is laid out; models without them are left alone."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig

from dstune.batch import IGNORED, Batch, Share
from dstune.model import isolation, rotary
from tests.model.architectures import keep_apart, tiny_config, tiny_of

LENGTHS = (30, 9, 16, 21)
"""Long, short, the longest that is short, long again but less."""
MOVING: dict[str, dict[str, Any]] = {
    "phi3": {
        "rope_type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [1.5, 2.0, 4.0, 8.0],
        "original_max_position_embeddings": 16,
    },
    "llama": {"rope_type": "dynamic", "factor": 4.0},
}


def moving(name: str) -> Any:
    config = tiny_config(name)
    config.rope_parameters = {"rope_theta": 1e4, **MOVING[name]}
    if name == "llama":
        config.max_position_embeddings = 16
    return tiny_of(config).eval()


def examples() -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randint(1, 1000, (1, length)) for length in LENGTHS]


@pytest.mark.parametrize("name", list(MOVING))
def test_an_example_turns_as_if_it_were_alone_packed_or_padded(name: str) -> None:
    """And twice alike, whatever came before: a resume begins in the middle."""
    # Models of their own, as what transformers keeps from one call would go into the next.
    alone = [moving(name)(input_ids=one, use_cache=False).logits for one in examples()]
    module = keep_apart(moving(name))
    rotary.follow_examples(module)
    packed = isolation.packed_inputs([{"input_ids": one} for one in examples()])
    for _ in range(2):
        assert torch.allclose(module(**packed, use_cache=False).logits, torch.cat(alone, 1), atol=1e-5)
    padded = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.long)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    padded[mask] = torch.cat(examples(), 1)[0]
    found = module(input_ids=padded, attention_mask=mask.long(), use_cache=False).logits[mask]
    assert torch.allclose(found, torch.cat(alone, 1)[0], atol=1e-5)
    (longest, *_) = examples()
    assert torch.equal(module(input_ids=longest).logits, moving(name)(input_ids=longest).logits)


@pytest.mark.parametrize("name", list(MOVING))
def test_a_piece_of_a_row_turns_as_in_the_whole_row(name: str) -> None:
    module = moving(name)
    rotary.follow_examples(module)
    inputs = isolation.packed_inputs([{"input_ids": one} for one in examples()])
    targets = torch.full_like(inputs["input_ids"], IGNORED)
    batch = Batch(inputs, targets, torch.arange(4).numpy(), LENGTHS, 0)
    seen: list[torch.Tensor] = []
    module.model.rotary_emb.register_forward_hook(lambda part, args, found: seen.append(torch.cat(found, -1)))
    module.set_attn_implementation("eager")
    module(**inputs, use_cache=False)
    for rank in range(3):
        rotary.take_piece(module, rank)
        module(**Share(rank, 3, 3).piece(batch, pad_id=0).inputs, use_cache=False)
    whole, *pieces = seen
    assert torch.equal(torch.cat(pieces, 1)[:, : sum(LENGTHS)], whole)


def test_models_whose_frequencies_stay_are_left_alone() -> None:
    module = tiny_of(tiny_config("llama"))
    rotary.follow_examples(module)
    assert not module._forward_pre_hooks and "forward" not in module.model.rotary_emb.__dict__


def test_a_small_model_shows_it_for_heads_of_any_size() -> None:
    """As Phi-3.5's, whose list of factors is as long as its large heads want; and with a part of each head turning, as Phi-4-mini's."""
    factors = {"rope_type": "longrope", "rope_theta": 1e4}
    for share in (1.0, 0.75):
        count = int(48 * share)
        lists = {"short_factor": [1.0] * count, "long_factor": [2.0] * count, "partial_rotary_factor": share}
        config = AutoConfig.for_model(
            "phi3", num_attention_heads=32, hidden_size=3072, original_max_position_embeddings=4096,
            max_position_embeddings=131072, rope_parameters=factors | lists,
        )  # fmt: skip
        isolation.prove(config, "per-example")
