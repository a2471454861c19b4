"""Positions that restart at each example of a packed row, and models that are left alone where nothing is packed."""

import pytest
import torch

from dstune.batch import collate
from dstune.model.restarts import restart_positions
from tests.model.architectures import keep_apart, tiny
from tests.test_batch import Prepared


@pytest.mark.parametrize("name", ["t5", "bart", "llama"])
def test_nothing_changes_without_a_packed_row(name):
    module = tiny(name).eval()
    layout = "seq2seq" if module.config.is_encoder_decoder else "padded"
    inputs = collate(Prepared(), [0, 1], layout, pad_id=0).inputs
    before = module(**inputs).logits
    restart_positions(module)
    assert torch.equal(module(**inputs).logits, before)


def test_a_bias_is_made_for_the_longest_example_only():
    """The whole row's would hold its length squared for every head; the first layer makes it, the others share it."""
    module = keep_apart(tiny("t5")).eval()
    batch = collate(Prepared(), [0, 1], "packed-seq2seq", pad_id=0)
    made: list[tuple[int, ...]] = []
    for block in (module.encoder.block[0], module.decoder.block[0]):
        bias = block.layer[0].SelfAttention.relative_attention_bias
        bias.register_forward_hook(lambda table, inputs, output: made.append(tuple(output.shape)))
    module(**batch.inputs, use_cache=False)
    assert made == [(2, 2, 4), (3, 3, 4)]


def test_a_row_may_be_longer_than_the_table_of_positions():
    module = keep_apart(tiny("bart")).eval()
    row = torch.randint(3, 1000, (1, 90))
    starts = torch.tensor([0, 40, 90], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 50, "max_length_k": 50}
    packed = module(input_ids=row, decoder_input_ids=row, **lengths, use_cache=False).logits
    module = tiny("bart").eval()
    alone = [module(input_ids=one, decoder_input_ids=one).logits for one in (row[:, :40], row[:, 40:])]
    assert torch.allclose(packed, torch.cat(alone, 1), atol=1e-5)
