"""Packed examples never see each other: shown for real architectures, and refused where something carries over."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from dstune.batch import collate
from dstune.config.schema import ModelSection
from dstune.data.task import PACKED_SEQ2SEQ_TYPES, UNPACKED_CAUSAL_TYPES
from dstune.errors import ConfigError
from dstune.model import isolation, per_example, restarts
from dstune.model.attention import choose
from dstune.model.isolation import packed_inputs, prove, shrunk
from tests.model.architectures import keep_apart, tiny, tiny_config
from tests.test_batch import Prepared

PAIRS = list(PACKED_SEQ2SEQ_TYPES)
ISOLATED = ["llama", "qwen2", "qwen3", "mistral", "gpt2", "gemma3_text", "mixtral", "qwen3_moe"]


@pytest.mark.parametrize("name", ISOLATED)
def test_packing_is_shown_to_be_right(name):
    config = tiny_config(name)
    for attention in ("per-example", "sdpa", "eager"):
        prove(config, attention)
    assert choose(ModelSection(path="x"), config, "packed") == "per-example"


@pytest.mark.parametrize("name", ISOLATED)
def test_a_packed_row_of_the_model_itself_equals_its_examples_alone(name):
    """Not by `prove`'s own machinery: a real batch, another seed, the model as it will be trained."""
    module = tiny(name, seed=5).eval()
    prepared = Prepared()
    batch = collate(prepared, [0, 1], "packed", pad_id=0)
    numbers = batch.examples
    alone = [module(input_ids=torch.tensor(prepared.example(n).input_ids)[None].long()).logits for n in numbers]
    module.set_attn_implementation(choose(ModelSection(path="x"), module.config, "packed"))
    packed = module(**batch.inputs, use_cache=False).logits
    assert torch.allclose(packed, torch.cat(alone, 1), atol=1e-5)


@pytest.mark.parametrize("name", ["gptj", "codegen"])
def test_what_settles_its_attention_as_it_is_built_is_shown_so(name):
    """CodeGen built with an attention that it does not know takes its plain one, and no mask: examples would see each other."""
    with pytest.raises(ConfigError, match=r"not this model.s attention|fails on packed rows"):
        prove(AutoConfig.for_model(name), "per-example")
    assert choose(ModelSection(path="x"), AutoConfig.for_model(name), "packed") == "eager"


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_are_shown_to_stay_apart_where_auto_packs_them(name):
    """At the architecture's own defaults, shrunk."""
    assert choose(ModelSection(path="x"), AutoConfig.for_model(name), "packed-seq2seq") == "per-example"


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_packed_row_of_pairs_equals_its_examples_alone(name):
    module = tiny(name, seed=5).eval()
    batch = collate(Prepared(), [0], "packed-seq2seq", pad_id=0)
    expected = torch.cat([module(**example).logits for example in alone("seq2seq")], 1)
    packed = keep_apart(module)(**batch.inputs, use_cache=False).logits
    assert torch.allclose(packed, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("m2m_100", "carries over"), ("led", "not this model's attention"), ("switch_transformers", "attention_mask")],
)
def test_pairs_that_cannot_be_kept_apart_are_refused(name, reason):
    with pytest.raises(ConfigError, match=reason) as caught:
        choose(ModelSection(path="x"), AutoConfig.for_model(name), "packed-seq2seq")
    assert "data.packing: false" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "leak"),
    [(name, leak) for name in ("umt5", "bart") for leak in ("encoder", "decoder", "across")] + [("bart", "positions")],
)
def test_every_way_that_pairs_could_see_each_other_is_found_out(name, leak, monkeypatch):
    original = per_example._sides

    def leaking(module, decoder, encoder):
        causal, asking, asked = original(module, decoder, encoder)
        here = "decoder" if causal else "encoder" if asking is encoder else "across"
        if here == leak:
            asking, asked = (per_example._Side(side.starts[[0, -1]], None) for side in (asking, asked))
        return causal, asking, asked

    monkeypatch.setattr(per_example, "_sides", leaking)
    if leak == "positions":
        monkeypatch.setattr(restarts, "_places", lambda starts: torch.arange(int(starts[-1])))
    isolation._disproof.cache_clear()
    with pytest.raises(ConfigError, match=r"example \d of 3"):
        prove(tiny_config(name), "per-example")
    isolation._disproof.cache_clear()


@pytest.mark.parametrize(
    "name", ["mamba", "jamba", "recurrent_gemma", "bloom", "falcon", "lfm3", "gpt_oss", "openai-gpt", "xglm"]
)
def test_what_carries_state_over_or_has_no_positions_to_restart_is_refused(name):
    assert name in UNPACKED_CAUSAL_TYPES
    config = AutoConfig.for_model(name)
    with pytest.raises(ConfigError) as caught:
        choose(ModelSection(path="x"), config, "packed")
    assert "carries over" in str(caught.value)
    assert "data.packing: false" in str(caught.value)
    assert config.model_type in str(caught.value)


def test_short_convolutions_between_attention_layers_are_seen_or_kept_apart():
    """LFM 2's convolutions look back two tokens; its default config has none of them."""
    config = AutoConfig.for_model("lfm2", num_hidden_layers=4, layer_types=["conv", "full_attention", "conv", "conv"])
    with pytest.raises(ConfigError, match="carries over"):
        choose(ModelSection(path="x"), config, "packed")


def test_soft_caps_go_to_the_attention_that_has_them():
    config = tiny_config("gemma2")
    with pytest.raises(ConfigError, match="softcap"):
        prove(config, "per-example")
    assert choose(ModelSection(path="x"), config, "packed") == "eager"


def test_windows_that_a_kernel_does_not_know_are_found_out(monkeypatch):
    """The experiment has power: a kernel without windows differs from plain attention even on a first example."""
    config = tiny_config("mistral")
    monkeypatch.setattr(per_example, "_band", lambda length, window, device: torch.ones(length, length).tril().bool())
    isolation._disproof.cache_clear()
    with pytest.raises(ConfigError, match="example 1 of 3"):
        prove(config, "per-example")
    isolation._disproof.cache_clear()


def test_a_kernel_that_ignores_where_examples_begin_is_found_out(monkeypatch):
    original = per_example.per_example_attention

    def leaking(*args, cu_seq_lens_q=None, **kwargs):
        whole = torch.tensor([0, int(cu_seq_lens_q[-1])]) if cu_seq_lens_q is not None else None
        return original(*args, cu_seq_lens_q=whole, **kwargs)

    monkeypatch.setattr(per_example, "per_example_attention", leaking)
    isolation._disproof.cache_clear()
    with pytest.raises(ConfigError, match="example 2 of 3"):
        prove(tiny_config("llama"), "per-example")
    isolation._disproof.cache_clear()


def test_the_written_attention_is_taken_and_other_layouts_need_no_proof():
    config = AutoConfig.for_model("mamba")
    assert choose(ModelSection(path="x", attention="eager"), config, "packed") == "eager"
    assert choose(ModelSection(path="x"), config, "padded") == "eager"
    assert choose(ModelSection(path="x"), tiny_config("llama"), "padded") == "sdpa"
    assert choose(ModelSection(path="x"), tiny_config("t5"), "seq2seq") in ("sdpa", "eager")


def test_an_attention_that_cannot_keep_pairs_apart_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"model\.attention"):
        choose(ModelSection(path="x", attention="sdpa"), tiny_config("t5"), "packed-seq2seq")


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_an_eager_attention_that_is_not_the_models_is_refused(layout):
    """transformers adds Falcon's ALiBi twice there."""
    config = AutoConfig.for_model("falcon", alibi=True)
    with pytest.raises(ConfigError, match=r"model\.attention: eager, which differs .* for falcon.*; expected auto"):
        choose(ModelSection(path="x", attention="eager"), config, layout)
    assert choose(ModelSection(path="x"), config, "padded") == "sdpa"
    with pytest.raises(ConfigError):
        choose(ModelSection(path="x"), config, "packed")
    assert choose(ModelSection(path="x", attention="eager"), AutoConfig.for_model("falcon"), "padded") == "eager"


@pytest.mark.parametrize("name", ["gemma3n_text", "mamba2", "longcat_flash", "t5gemma2"])
def test_a_config_is_made_small_however_its_sizes_depend_on_each_other(name):
    """Layers that read the keys of others, heads times size as wide as the state, names of their own, a config in a config."""
    small = isolation.smallest_that_builds(AutoConfig.for_model(name))
    assert small is not None
    with torch.device("meta"):
        assert sum(one.numel() for one in isolation.instance(small, "eager").parameters()) < 4_000_000


def test_every_kind_of_layer_stays_when_a_config_is_made_small():
    config = AutoConfig.for_model("gemma3_text")
    assert set(shrunk(config, True).layer_types) == {"sliding_attention", "full_attention"}
    assert shrunk(config, True).num_hidden_layers == 6
    moe = AutoConfig.for_model("deepseek_v3")
    assert shrunk(moe, True).num_hidden_layers == moe.first_k_dense_replace + 1


def test_the_inputs_of_the_proof_are_those_of_training():
    batch = collate(Prepared(), [0], "packed", pad_id=0)
    examples = [{"input_ids": torch.tensor(Prepared().example(n).input_ids)[None].long()} for n in batch.examples]
    assert_same_inputs(packed_inputs(examples), batch.inputs)
    pairs = collate(Prepared(), [0], "packed-seq2seq", pad_id=0)
    assert_same_inputs(packed_inputs(alone("seq2seq")), pairs.inputs)


def assert_same_inputs(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert torch.equal(torch.as_tensor(ours[key]), torch.as_tensor(value)), key


def alone(layout):
    """The forward arguments of each example of row 0, without masks: nothing is padded."""
    names = ("input_ids", "decoder_input_ids")
    batches = [collate(OneEach(), [number], layout, pad_id=0) for number in Prepared().row(0)]
    return [{name: batch.inputs[name] for name in names if name in batch.inputs} for batch in batches]


class OneEach(Prepared):
    """Row n holds example n alone."""

    def row(self, index):
        return np.array([index])
