"""Micro-batches: what the model reads and what it should predict, position by position."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from dstune.batch import IGNORED, Collator, Layout, Share, collate


@dataclass
class Stored:
    input_ids: np.ndarray
    loss_mask: np.ndarray


class Prepared:
    """Three examples in two rows, in memory."""

    def __init__(self) -> None:
        pairs = [([10, 11, 12], [0, 0, 1]), ([20, 21], [0, 1]), ([30, 31, 32, 33], [0, 1, 0, 1])]
        self.examples = [Stored(np.array(ids, np.int32), np.array(mask, bool)) for ids, mask in pairs]
        self.rows = [np.array([2, 0], np.int32), np.array([1], np.int32)]

    def row(self, index: int) -> np.ndarray:
        return self.rows[index]

    def example(self, index: int) -> Stored:
        return self.examples[index]


def test_packed_rows_restart_positions_and_never_predict_across_examples():
    batch = collate(Prepared(), [0, 1], "packed", pad_id=0)
    assert batch.inputs["input_ids"].tolist() == [[30, 31, 32, 33, 10, 11, 12, 20, 21]]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1]]
    assert batch.targets.tolist() == [[31, IGNORED, 33, IGNORED, IGNORED, 12, IGNORED, 21, IGNORED]]
    assert batch.inputs["cu_seq_lens_q"].tolist() == [0, 4, 7, 9]
    assert batch.inputs["cu_seq_lens_q"].dtype == torch.int32
    assert batch.inputs["max_length_q"] == 4
    assert batch.examples.tolist() == [2, 0, 1]
    assert (batch.num_examples, batch.num_tokens, batch.supervised, batch.lengths) == (3, 9, 4, (4, 3, 2))


def test_a_processor_gets_packed_rows_of_even_length_and_others_the_row_as_it_is():
    """The padding is examples that a table of four positions has room for."""
    plain = collate(Prepared(), [0, 1], "packed", pad_id=0)
    even = collator("cpu", "packed")([0, 1])
    assert even.inputs["input_ids"].tolist() == [plain.inputs["input_ids"][0].tolist() + [7] * 55]
    assert even.inputs["cu_seq_lens_q"].tolist() == [0, 4, 7, *range(9, 64, 4), 64]
    assert torch.equal(even.inputs["cu_seq_lens_k"], even.inputs["cu_seq_lens_q"])
    assert even.inputs["cu_seq_lens_q"].dtype == torch.int32
    assert even.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1, *([0, 1, 2, 3] * 14)[:55]]]
    assert (even.inputs["max_length_q"], even.inputs["max_length_k"]) == (4, 4)
    assert even.targets.tolist() == [plain.targets[0].tolist() + [IGNORED] * 55]
    assert (even.num_examples, even.num_tokens, even.supervised, even.lengths) == (3, 9, 4, (4, 3, 2))
    assert collator("cpu", "padded")([0, 1]).targets.shape == (3, 4)
    assert collator("meta", "packed")([0, 1]).targets.shape == (1, 9)


def collator(device: str, layout: Layout) -> Collator:
    return Collator(Prepared(), layout, 7, Share(0, 1), torch.device(device))


def test_padded_rows_have_one_example_each_and_a_mask():
    batch = collate(Prepared(), [0, 1], "padded", pad_id=9)
    assert batch.inputs["input_ids"].tolist() == [[30, 31, 32, 33], [10, 11, 12, 9], [20, 21, 9, 9]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]]
    assert batch.targets.tolist() == [
        [31, IGNORED, 33, IGNORED],
        [IGNORED, 12, IGNORED, IGNORED],
        [21, IGNORED, IGNORED, IGNORED],
    ]


def test_source_and_target_go_to_encoder_and_decoder():
    batch = collate(Prepared(), [1], "seq2seq", pad_id=7)
    assert batch.inputs["input_ids"].tolist() == [[20]]
    assert batch.inputs["decoder_input_ids"].tolist() == [[7]]
    assert batch.targets.tolist() == [[21]]
    pair = collate(Prepared(), [0], "seq2seq", pad_id=7)
    # The first example's mask has a gap: 32 is read by the decoder and not predicted.
    assert pair.inputs["input_ids"].tolist() == [[30, 7], [10, 11]]
    assert pair.inputs["attention_mask"].tolist() == [[1, 0], [1, 1]]
    assert pair.inputs["decoder_input_ids"].tolist() == [[7, 31, 32], [7, 7, 7]]
    assert pair.inputs["decoder_attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert pair.targets.tolist() == [[31, IGNORED, 33], [12, IGNORED, IGNORED]]
    assert pair.supervised == 3


def test_packed_pairs_are_two_rows_that_begin_each_example_anew():
    batch = collate(Prepared(), [0, 1], "packed-seq2seq", pad_id=7)
    assert batch.inputs["input_ids"].tolist() == [[30, 10, 11, 20]]
    assert batch.inputs["cu_seq_lens_k"].tolist() == [0, 1, 3, 4]
    assert batch.inputs["decoder_input_ids"].tolist() == [[7, 31, 32, 7, 7]]
    assert batch.inputs["cu_seq_lens_q"].tolist() == [0, 3, 4, 5]
    assert batch.targets.tolist() == [[31, IGNORED, 33, 12, 21]]
    assert (batch.inputs["max_length_k"], batch.inputs["max_length_q"]) == (2, 3)
    assert batch.examples.tolist() == [2, 0, 1]
    assert (batch.num_examples, batch.num_tokens, batch.supervised, batch.lengths) == (3, 9, 4, (4, 3, 2))


@pytest.mark.parametrize("layout", ["packed", "padded", "packed-seq2seq", "seq2seq"])
def test_padding_rows_have_no_targets(layout):
    alone = collate(Prepared(), [None, None], layout, pad_id=3)
    assert alone.supervised == 0
    assert alone.num_tokens == 0 and alone.num_examples == 0
    assert alone.inputs["input_ids"].numel() >= 1
    assert (alone.targets == IGNORED).all()
    mixed = collate(Prepared(), [1, None], layout, pad_id=3)
    assert mixed.supervised == collate(Prepared(), [1], layout, pad_id=3).supervised == 1
    if not layout.startswith("packed"):
        assert mixed.inputs["input_ids"].shape[0] == 2
        assert mixed.inputs["attention_mask"][1].sum() == 1


def test_to_moves_every_tensor():
    batch = collate(Prepared(), [0], "packed", pad_id=0).to(torch.device("meta"))
    assert all(value.device.type == "meta" for value in batch.inputs.values() if isinstance(value, torch.Tensor))
    assert batch.targets.device.type == "meta"
