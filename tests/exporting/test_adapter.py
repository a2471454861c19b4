"""An adapter trained by the real engine, exported both ways, opened by peft, by transformers and by dstune: the same logits."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dstune.checkpoint.commit import save
from dstune.config.schema import RunConfig
from dstune.engine.world import World
from dstune.engine.zero import ZeroEngine
from dstune.errors import CheckpointError, ConfigError, RunFailed, UsageError
from dstune.exporting import state_dict
from dstune.exporting.huggingface import export
from dstune.exporting.initial import commit_initial
from dstune.model.build import build, checkpoint_names
from dstune.model.open import open_model
from dstune.model.reference import base_reference
from dstune.model.weights import WeightFiles
from dstune.paths import step_directory
from tests.evaluation.models import TOKENIZER
from tests.model.architectures import tiny
from tests.spawn import run_workers

pytestmark = pytest.mark.dist

CASES = {
    "lora": ("llama", 3, {"modules_to_save": ["lm_head", "layers.1.input_layernorm"]}),
    "dora": ("llama", 3, {"kind": "dora", "rank": 4, "dropout": 0.1}),
    "gpt2": ("gpt2", 1, {"kind": "rslora", "rank": 4, "alpha": 8}),
    "gpt2-dora": ("gpt2", 2, {"kind": "dora", "targets": ["c_attn", "c_fc"]}),
    "mixtral": ("mixtral", 2, {"dropout": 0.1}),
    "gemma3": ("gemma3", 3, {"rank": 4}),
    "new-tokens": ("llama-small", 3, {"modules_to_save": ["embed_tokens", "lm_head"]}),
}
"""The architecture, the ZeRO stage of its training, the adapter. Gemma 3 sees too; the small Llama has no room for new tokens."""
NEW_TOKENS = {"llama-small": ["kilopascal", "hectopascal"]}
IDS = torch.arange(1, 25).view(2, 12)


def config_of(path: Path, adapter: dict) -> RunConfig:
    model = {"path": str(path), "dtype": "fp32", "tokenizer": str(TOKENIZER), "adapter": adapter}
    model["new_tokens"] = NEW_TOKENS.get(path.name, [])
    sources = [{"path": "builtin:instructions"}]
    return RunConfig.model_validate(
        {"name": "probe", "model": model, "data": {"sources": sources, "template": "chatml"}}
    )


def train_and_commit(folder: Path) -> dict[str, torch.Tensor]:
    """Three updates and a commit of every case; the trained engine's logits."""
    world = World.from_environment()
    world.init()
    control = world.control()
    found: dict[str, torch.Tensor] = {}
    for case, (architecture, stage, adapter) in CASES.items():
        config = config_of(folder / architecture, adapter)
        ds_config = {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}
        module = build(config.model, Path(), "sdpa", 1, ds_config)
        engine = ZeroEngine(
            module, lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, ds_config=ds_config, world=world,
            names=checkpoint_names(module, config.model),
        )  # fmt: skip
        for _ in range(3):
            logits = engine.module(input_ids=IDS, use_cache=False).logits
            engine.backward(-logits.float().log_softmax(-1)[..., 3].mean(), last=True)
            engine.step(0.03)
        fingerprints = {"base": base_reference(config.model, Path(), config.train.seed)}
        save(folder / case, 3, engine.slices(), {"losses": [1.5], "step": 3}, control, fingerprints)
        module.eval()
        with torch.no_grad():
            found[case] = engine.module(input_ids=IDS, use_cache=False).logits
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Gives a case's run, its checkpoint and the logits it was left with; two workers make all of them at once."""
    folder = tmp_path_factory.mktemp("adapters")
    for architecture in {architecture for architecture, _, _ in CASES.values()}:
        tiny(architecture).save_pretrained(folder / architecture)
    logits = run_workers(train_and_commit, 2, folder)[0]

    def find(case: str) -> tuple[RunConfig, Path, torch.Tensor]:
        architecture, _, adapter = CASES[case]
        return config_of(folder / architecture, adapter), step_directory(folder / case, 3), logits[case]

    return find


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("case", list(CASES))
def test_peft_transformers_and_dstune_give_the_logits_of_the_engine(trained, tmp_path, case):
    config, checkpoint, expected = trained(case)
    before = logits_of(tiny(CASES[case][0]))
    assert not torch.allclose(before, expected[..., : before.shape[-1]], atol=0.05)
    export(checkpoint, tmp_path / "adapter", config, Path(), dtype="fp32")
    theirs = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits_of(theirs), expected, atol=2e-5, rtol=2e-5)
    opened = open_model(str(tmp_path / "adapter"), dtype="fp32", device="cpu")
    assert type(opened.module).__name__ == type(tiny(CASES[case][0])).__name__
    torch.testing.assert_close(logits_of(opened.module), expected, atol=2e-5, rtol=2e-5)
    export(checkpoint, tmp_path / "whole", config, Path(), dtype="fp32", merged=True, max_file_bytes=60_000)
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    torch.testing.assert_close(logits_of(model), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", ["dora", "gpt2-dora"])
def test_a_merged_adapter_is_made_a_few_rows_at_a_time(trained, tmp_path, monkeypatch, case):
    config, checkpoint, _ = trained(case)
    export(checkpoint, tmp_path / "whole", config, Path(), dtype="fp32", merged=True)
    asked: list[int] = []
    read_range = WeightFiles.read_range

    def counting(self, name, start, stop):
        asked.append(stop - start)
        return read_range(self, name, start, stop)

    monkeypatch.setattr(WeightFiles, "read_range", counting)
    monkeypatch.setattr("dstune.exporting.tensors._PIECE_ELEMENTS", 1000)
    monkeypatch.setattr("dstune.exporting.merged._BLOCK_ELEMENTS", 300)
    export(checkpoint, tmp_path / "pieces", config, Path(), dtype="fp32", merged=True)
    assert max(asked) == 1000
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "pieces"))
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-6, rtol=1e-5)


def test_plain_fp32_weights_have_the_adapter_in_them(trained, tmp_path):
    config, checkpoint, expected = trained("mixtral")
    state_dict.export(checkpoint, tmp_path / "out", config, Path(), threads=2)
    model = tiny("mixtral", seed=5)
    model.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    torch.testing.assert_close(logits_of(model), expected, atol=1e-4, rtol=1e-4)


def test_an_adapters_directory_is_complete(trained, tmp_path):
    config, checkpoint, _ = trained("lora")
    export(checkpoint, tmp_path / "out", config, Path(), dtype="bf16")
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"} <= files
    assert not any(file.startswith(("model", "config.json")) for file in files)
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
        assert len(file.keys()) == 2 * 14 + 2
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert written["target_modules"] == sorted(written["target_modules"])
    assert len({file.stat().st_mode for file in (tmp_path / "out").iterdir()}) == 1
    assert written["modules_to_save"] == ["model.layers.1.input_layernorm", "lm_head"]
    assert written["base_model_name_or_path"] == config.model.path and written["r"] == 16
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: peft" in card and "AutoPeftModelForCausalLM" in card and "lora, rank 16, alpha 32" in card
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template is not None


def test_another_base_model_is_refused_wherever_the_adapter_goes(trained, tmp_path):
    config, checkpoint, _ = trained("mixtral")
    shutil.copytree(config.model.path, tmp_path / "base")
    config = config_of(tmp_path / "base", CASES["mixtral"][2])
    export(checkpoint, tmp_path / "out", config, Path())
    tiny("mixtral", seed=5).save_pretrained(tmp_path / "base")
    for merged in (False, True):
        with pytest.raises(ConfigError, match="the same base model, unchanged"):
            export(checkpoint, tmp_path / "again", config, Path(), merged=merged)
    with pytest.raises(RunFailed, match="the same base model, unchanged"):
        open_model(str(tmp_path / "out"), device="cpu")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["base", "out"]


def test_a_checkpoint_of_another_adapter_is_named(trained, tmp_path):
    config, _, _ = trained("lora")
    _, checkpoint, _ = trained("dora")
    for merged in (False, True):
        with pytest.raises(CheckpointError, match=r"as the adapter has|a checkpoint of this run"):
            export(checkpoint, tmp_path / "out", config, Path(), merged=merged)


def test_an_adapter_with_holes_is_not_opened(trained, tmp_path):
    config, checkpoint, _ = trained("lora")
    export(checkpoint, tmp_path / "out", config, Path())
    file = tmp_path / "out" / "adapter_model.safetensors"
    tensors = load_file(file)
    lost = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.lora_B.weight"))
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, file, {"format": "pt"})
    with pytest.raises(RunFailed, match=r"does not hold model\.layers\.1\.mlp\.up_proj\.lora_B"):
        open_model(str(tmp_path / "out"), device="cpu")
    save_file(tensors | {lost: torch.empty(0)}, file, {"format": "pt"})
    with pytest.raises(RunFailed, match="does not fit"):
        open_model(str(tmp_path / "out"), device="cpu")


def test_an_adapter_of_random_weights_is_exported_merged_alone(tmp_path):
    config = config_of(tmp_path, {"rank": 2})
    config = config.model_copy(update={"model": config.model.model_copy(update={"path": "builtin:tiny-llama"})})
    checkpoint = commit_initial(tmp_path / "checkpoints", config, Path())
    with pytest.raises(UsageError, match="--merged"):
        export(checkpoint, tmp_path / "out", config, Path(), dtype="fp32")
    export(checkpoint, tmp_path / "out", config, Path(), dtype="fp32", merged=True)
    plain = config.model_copy(update={"model": config.model.model_copy(update={"adapter": None})})
    export(commit_initial(tmp_path / "plain", plain, Path()), tmp_path / "other", plain, Path(), dtype="fp32")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "other"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
