"""Which modules an adapter trains, what its parameters are called, where they begin, and how its base model is recognised."""

import copy
import shutil

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from dstune.config.adapter import AdapterSection
from dstune.config.schema import ModelSection, RunConfig
from dstune.errors import ConfigError
from dstune.model import adapters, isolation, unreached
from dstune.model.reference import base_reference, require_same
from tests.model.architectures import tiny


def chosen(model, **settings) -> adapters.Chosen:
    return adapters.choose(AdapterSection(**settings), model)


def test_auto_takes_every_linear_layer_but_the_head():
    targets = chosen(tiny("llama")).targets
    assert len(targets) == 2 * 7 and "lm_head" not in targets and "model.layers.1.mlp.up_proj" in targets
    assert {name.rpartition(".")[2] for name in chosen(tiny("gpt2")).targets} == {"c_attn", "c_proj", "c_fc"}
    assert len(chosen(tiny("falcon")).targets) == 2 * 4, "linear layers of a class of their own"


@pytest.mark.parametrize(
    ("name", "left_out"),
    [
        ("glm4_moe", {"gate_proj", "up_proj", "down_proj"}),  # of peft's names for experts, in dense and shared layers
        ("phimoe", {"router"}),  # gives its choice of experts too
        ("jamba", {"x_proj", "dt_proj", "out_proj"}),  # a state space reads them
        ("zamba", {"q_proj", "k_proj", "v_proj", "o_proj"}),  # one block in several places
    ],
)
def test_auto_leaves_out_what_no_adapter_could_train(name, left_out):
    model = tiny(name)
    linear = {key.rpartition(".")[2] for key, one in model.named_modules() if isinstance(one, torch.nn.Linear)}
    taken = {key.rpartition(".")[2] for key in chosen(model).targets}
    assert left_out <= linear and not left_out & taken
    adapters.attach(model, AdapterSection(), seed=1)
    ids = torch.arange(1, 9)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    for key, parameter in model.named_parameters():
        assert "lora_B" not in key or (parameter.grad is not None and parameter.grad.any()), key


@pytest.mark.parametrize(
    ("name", "left_out"),
    [
        ("deepseek_v32", {"wq_b", "wk", "weights_proj"}),  # choose what attention looks at
        ("led", {"query_global", "key_global", "value_global"}),  # of global tokens, which nobody names
        ("trocr", {"encoder_attn.q_proj", "encoder_attn.out_proj"}),  # of an encoder that is not there
        ("switch_transformers", set[str]()),  # an expert that a short text does not visit is trained
    ],
)
def test_auto_leaves_out_what_no_gradient_reaches(name, left_out):
    model = isolation.instance(isolation.smallest_that_builds(AutoConfig.for_model(name)), "eager")
    linear = [key for key, one in model.named_modules() if isinstance(one, torch.nn.Linear)]
    taken = set(chosen(model).targets)
    meant = {key for key in linear if any(key.endswith(f".{one}") for one in left_out)}
    assert bool(meant) == bool(left_out) and not meant & taken
    assert {key for key in linear if ".experts." in key} <= taken


def test_named_targets_that_no_gradient_reaches_are_told(caplog):
    model = isolation.instance(isolation.smallest_that_builds(AutoConfig.for_model("led")), "eager")
    assert len(chosen(model, targets=["query", "query_global"]).targets) == 4
    assert "layers.*.self_attn.longformer_self_attn.query_global" in caplog.text
    with torch.device("meta"):
        assert unreached.unreached(AutoConfig.for_model("led", d_model=128))


def test_what_peft_takes_for_experts_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"down_proj: of glm4_moe peft takes a layer of that name"):
        chosen(tiny("glm4_moe"), targets=["q_proj", "down_proj"])


def test_patterns_fit_whole_names_or_their_last_parts():
    model = tiny("llama")
    assert len(chosen(model, targets=["q_proj", "v_proj"]).targets) == 4
    assert chosen(model, targets=["layers.1.*.?_proj"]).targets == tuple(
        f"model.layers.1.self_attn.{one}_proj" for one in "qkvo"
    )
    found = chosen(model, targets=["model.layers.0.mlp.up_proj"], modules_to_save=["embed_tokens", "norm"])
    assert found == adapters.Chosen(("model.layers.0.mlp.up_proj",), ("model.embed_tokens", "model.norm"))
    assert "lm_head" not in chosen(model, targets="auto", modules_to_save=["lm_head"]).targets


def test_what_fits_nothing_is_named_with_its_neighbours():
    with pytest.raises(ConfigError) as caught:
        chosen(tiny("llama"), targets=["q_porj", "mlp.*", "rotary", "mlp"], modules_to_save=["lmhead"])
    came = [(problem.where, problem.came, problem.expected) for problem in caught.value.problems]
    assert came[0] == ("model.adapter.modules_to_save", "'lmhead' fits no module", "`lm_head`")
    assert came[1][1] == "'q_porj' fits no linear layer" and "`q_proj`" in came[1][2]
    assert came[2][1] == "'rotary' fits no linear layer" and "`down_proj`" in came[2][2]
    assert came[3][1:] == ("'mlp' fits no linear layer", "`mlp.*`")
    assert len(came) == 4


@pytest.mark.parametrize("settings", [{"targets": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}])
def test_a_tied_weight_is_refused(settings):
    with pytest.raises(ConfigError, match="shares its weight with"):
        chosen(tiny("llama-tied"), **settings)


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValidationError, match="4 bits"):
        AdapterSection.model_validate({"kind": "qlora"})
    with pytest.raises(ValidationError, match="names no layer"):
        AdapterSection.model_validate({"targets": []})
    model, data = {"path": "x", "adapter": {}}, {"sources": [{"path": "y"}]}
    with pytest.raises(ValidationError, match=r"either `train\.freeze` or `model\.adapter`"):
        RunConfig.model_validate({"name": "z", "model": model, "data": data, "train": {"freeze": ["*norm*"]}})


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("llama", {"modules_to_save": ["lm_head", "model.norm"]}),
        ("llama", {"kind": "dora", "targets": ["q_proj", "layers.0.mlp.up_proj"]}),
        ("gpt2", {"kind": "rslora", "rank": 3, "alpha": 7}),
        ("t5", {}),
        ("mixtral", {}),
    ],
)
def test_names_are_those_of_pefts_own_files_and_the_model_begins_as_it_was(architecture, settings):
    model, section = tiny(architecture).eval(), AdapterSection(**settings)
    config = adapters.peft_config(section, model, adapters.choose(section, model))
    theirs = get_peft_model(copy.deepcopy(model), config)
    inputs = {"input_ids": torch.arange(1, 9)[None]}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with torch.no_grad():
        before = model(**inputs).logits
        adapters.attach(model, section, seed=3)
        assert torch.equal(model(**inputs).logits, before)
    parameters = dict(model.named_parameters())
    own = {stored: tuple(parameters[name].shape) for name, stored in adapters.saved_names(model).items()}
    wanted = get_peft_model_state_dict(theirs, save_embedding_layers=False)
    assert own == {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    scales = [layer.scaling[adapters.ADAPTER] for _, layer in adapters.layers(model)]
    assert len(set(scales)) == 1
    assert scales[0] == pytest.approx(7 / 3**0.5 if settings.get("kind") == "rslora" else 2.0)


def test_an_adapter_begins_by_its_seed_alone():
    def start(seed: int, **settings) -> dict[str, torch.Tensor]:
        model = tiny("llama")
        adapters.attach(model, AdapterSection(**settings), seed)
        return {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}

    torch.manual_seed(1)
    one, other, fewer = start(3), start(4), start(3, targets=["q_proj"])
    torch.manual_seed(2)
    again = start(3)
    name = "model.layers.1.self_attn.q_proj.lora_A.default.weight"
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert not torch.equal(one[name], other[name]) and torch.equal(one[name], fewer[name])
    assert 0.9 / 32**0.5 < one[name].abs().max() <= 1 / 32**0.5
    assert not torch.equal(one[name], one[name.replace("layers.1", "layers.0")])


def test_a_base_model_is_recognised_by_its_files(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "base", max_shard_size="60KB")
    section = ModelSection(path=str(tmp_path / "base"))
    before = base_reference(section, tmp_path, 1)
    shutil.move(tmp_path / "base", tmp_path / "moved")
    moved = base_reference(ModelSection(path="moved"), tmp_path, 2)
    require_same(before, moved, "checkpoint")
    file = sorted((tmp_path / "moved").glob("*.safetensors"))[1]
    tensors = load_file(file)
    next(iter(tensors.values()))[0] += 1
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"was trained on .*base with hash .* the model is now moved"):
        require_same(before, base_reference(ModelSection(path="moved"), tmp_path, 1), "checkpoint")


def test_a_random_base_model_is_its_config_and_seed(tmp_path):
    def digest(seed: int, **overrides) -> str:
        return base_reference(ModelSection(path="builtin:tiny-llama", overrides=overrides), tmp_path, seed)["sha256"]

    assert digest(1) == digest(1) != digest(2)
    assert digest(1, rms_norm_eps=1e-3) != digest(1)
