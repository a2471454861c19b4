"""Padded rows: shown to give what each example gives alone, for real architectures, and refused where they do not."""

import logging

import pytest
import torch
from transformers import AutoConfig

from dstune.batch import collate
from dstune.errors import ConfigError
from dstune.model import isolation, padding
from tests.model.architectures import tiny_config
from tests.model.test_isolation import OneEach, assert_same_inputs
from tests.test_batch import Prepared

RIGHT = [
    *("t5", "umt5", "bart", "marian", "pegasus", "m2m_100", "led", "longt5", "blenderbot", "switch_transformers"),
    *("llama", "mixtral", "falcon", "bloom", "mamba", "jamba", "qwen3_next", "gpt_oss"),
]


@pytest.fixture(autouse=True)
def anew():
    padding._found.cache_clear()
    yield
    padding._found.cache_clear()


@pytest.mark.parametrize("name", RIGHT)
def test_padding_is_shown_to_change_nothing(name, caplog):
    with caplog.at_level(logging.WARNING):
        padding.prove(AutoConfig.for_model(name), "eager")
    assert "not known" not in caplog.text


@pytest.mark.parametrize("name", ["prophetnet", "cpmant"])
def test_a_model_that_sees_its_padding_is_refused_with_a_way_out(name):
    with pytest.raises(ConfigError, match=r"it sees its padding") as caught:
        padding.prove(AutoConfig.for_model(name), "eager")
    assert "train.micro_batch_size: 1" in str(caught.value) and name in str(caught.value)


def test_a_mask_that_does_not_arrive_is_found_out(monkeypatch):
    """The experiment has power on both sides of a pair, and a causal model needs no mask on its right."""
    monkeypatch.setattr(padding, "taken", lambda model, inputs: {k: v for k, v in inputs.items() if "ids" in k})
    with pytest.raises(ConfigError, match=r"example 1 of 3.*it sees its padding"):
        padding.prove(tiny_config("bart"), "sdpa")
    padding.prove(tiny_config("llama"), "sdpa")


def test_rows_that_change_each_other_are_told_from_padding(monkeypatch):
    """As experts do that take so many tokens of a micro-batch, and no more."""
    original = isolation.instance

    def mixing(config, attention):
        model = original(config, attention)
        model.get_input_embeddings().register_forward_hook(lambda part, args, out: out - out.mean(0, keepdim=True) / 2)
        return model

    monkeypatch.setattr(isolation, "instance", mixing)
    with pytest.raises(ConfigError, match="rows change each other"):
        padding.prove(tiny_config("llama"), "sdpa")


def test_what_cannot_be_tried_is_said_and_let_pass(caplog):
    with caplog.at_level(logging.WARNING):
        padding.prove(AutoConfig.for_model("reformer"), "eager")
    assert "not known: reformer with eager attention: no small model" in caplog.text


@pytest.mark.parametrize("layout", ["padded", "seq2seq"])
def test_the_inputs_of_the_proof_are_those_of_training(layout):
    names = ("input_ids", "decoder_input_ids")
    alone = [collate(OneEach(), [number], layout, pad_id=0).inputs for number in Prepared().row(0)]
    examples = [{name: one[name] for name in names if name in one} for one in alone]
    nothing = {name: torch.zeros(1, 0, dtype=torch.long) for name in examples[0]}
    assert_same_inputs(
        padding.padded_inputs([*examples, nothing]), collate(Prepared(), [0, None], layout, pad_id=0).inputs
    )


def test_a_model_that_sees_its_padding_is_asked_example_by_example():
    """In an evaluation nobody has to set anything."""
    small = isolation.smallest_that_builds(AutoConfig.for_model("prophetnet"))
    assert padding.safely_together(isolation.instance(small, "eager"), 8) == 1
    assert padding.safely_together(isolation.instance(tiny_config("t5"), "sdpa"), 8) == 8
