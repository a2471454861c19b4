"""Noise on embeddings: as long as each example's own length says, the same for a seed, none in evaluation or on padding."""

from typing import Any

import pytest
import torch

from dstune.batch import collate
from dstune.model.neftune import add_noise, lengths_of_tokens
from tests.model.architectures import keep_apart, tiny
from tests.test_batch import Prepared

ALPHA = 5.0


def _noise(module: Any, inputs: dict[str, Any], seed: int = 0) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What is added to the first embeddings, [rows, tokens, width], and all embeddings of the pass, as they come out."""
    module.train()
    stack = module.get_encoder() if module.config.is_encoder_decoder else module
    seen: list[torch.Tensor] = []
    tables = {id(one): one for one in (stack.get_input_embeddings(), module.get_input_embeddings())}
    handles = [
        table.register_forward_hook(lambda table, args, output: seen.append(output.detach()))
        for table in tables.values()
    ]
    torch.manual_seed(seed)
    module(**inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    module.eval()
    return seen[0] - stack.get_input_embeddings()(inputs["input_ids"]).detach(), seen


def test_each_packed_example_has_its_own_reach() -> None:
    module = keep_apart(tiny("llama"))
    add_noise(module, ALPHA)
    starts = torch.tensor([0, 100, 116], dtype=torch.int32)
    inputs: dict[str, Any] = {
        "input_ids": torch.randint(3, 50, (1, 116)),
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
    }
    inputs |= {
        "position_ids": torch.cat([torch.arange(100), torch.arange(16)])[None],
        "max_length_q": 100,
        "max_length_k": 100,
    }
    noise, _ = _noise(module, inputs)
    width = module.config.hidden_size
    for first, last in ((0, 100), (100, 116)):
        reach = ALPHA / ((last - first) * width) ** 0.5
        part = noise[0, first:last]
        assert 0.9 * reach < part.abs().max() <= reach * 1.001
        assert part.abs().mean() == pytest.approx(reach / 2, rel=0.1) and abs(part.mean()) < reach / 10
    assert torch.equal(noise, _noise(module, inputs)[0])
    assert not torch.equal(noise, _noise(module, inputs, seed=1)[0])


def test_padding_and_evaluation_get_none() -> None:
    module = tiny("llama")
    batch = collate(Prepared(), [0, 1, None], "padded", pad_id=0)
    before = module.eval()(**batch.inputs, use_cache=False).logits
    add_noise(module, ALPHA)
    assert torch.equal(module(**batch.inputs, use_cache=False).logits, before)
    noise, _ = _noise(module, batch.inputs)
    mask = batch.inputs["attention_mask"].bool()
    assert (noise[~mask] == 0).all() and (noise[mask] != 0).any(-1).all()


def test_only_what_the_encoder_reads_gets_noise() -> None:
    module = keep_apart(tiny("t5"))
    add_noise(module, ALPHA)
    inputs = collate(Prepared(), [0, 1], "packed-seq2seq", pad_id=0).inputs
    noise, seen = _noise(module, inputs)
    assert (noise != 0).all(-1).all()
    decoder = module.get_decoder().get_input_embeddings()
    ids = inputs["decoder_input_ids"]
    assert all(torch.equal(one, decoder(ids)) for one in seen if one.shape[:2] == ids.shape and one is not seen[0])


def test_the_lengths_of_tokens() -> None:
    packed = {"cu_seq_lens_k": torch.tensor([0, 3, 5], dtype=torch.int32)}
    assert lengths_of_tokens(packed).tolist() == [[3.0, 3.0, 3.0, 2.0, 2.0]]
    padded = {"attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}
    assert lengths_of_tokens(padded).tolist() == [[2.0, 2.0, float("inf")], [3.0, 3.0, 3.0]]
