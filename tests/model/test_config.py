"""Which architecture a run tunes, and what is said where there is none."""

import json
from pathlib import Path

import pytest

from dstune.config.schema import ModelSection
from dstune.data.tokenizer_files import BUILTIN_DIRECTORY
from dstune.errors import ConfigError
from dstune.model.config import load_config, model_directory, task_of
from tests.model.architectures import tiny_config


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    tiny_config("llama").save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.mark.parametrize("name", ["builtin:tiny-llama", "builtin:tiny-t5"])
def test_builtin_models_have_room_for_every_token_of_the_builtin_tokenizer(name):
    config = load_config(ModelSection(path=name), Path())
    tokens = json.loads((BUILTIN_DIRECTORY / "tokenizer.json").read_text())
    highest = max([*tokens["model"]["vocab"].values(), *(token["id"] for token in tokens["added_tokens"])])
    assert highest < config.vocab_size
    special = {token["content"]: token["id"] for token in tokens["added_tokens"]}
    assert (config.pad_token_id, config.eos_token_id) == (special["<|endoftext|>"], special["<|im_end|>"])


def test_relative_paths_are_relative_to_the_run_file(llama):
    assert load_config(ModelSection(path="llama"), llama.parent).hidden_size == 32


def test_tasks_are_found_and_contradictions_named():
    t5 = load_config(ModelSection(path="builtin:tiny-t5"), Path())
    assert task_of(ModelSection(path="x"), t5) == "seq2seq-lm"
    with pytest.raises(ConfigError, match="seq2seq-lm"):
        task_of(ModelSection(path="x", task="causal-lm"), t5)


def test_overrides_reach_what_follows_from_them(llama):
    (llama / "config.json").write_text(
        json.dumps(
            {key: value for key, value in json.loads((llama / "config.json").read_text()).items() if key != "head_dim"}
        )
    )
    config = load_config(ModelSection(path=str(llama), overrides={"hidden_size": 64, "attention_dropout": 0.1}), Path())
    assert (config.hidden_size, config.head_dim, config.attention_dropout) == (64, 16, 0.1)
    nested = ModelSection(path=str(llama), overrides={"rope_parameters": {"rope_theta": 5.0}})
    assert load_config(nested, Path()).rope_parameters == {"rope_theta": 5.0, "rope_type": "default"}


def test_all_unknown_overrides_are_named_with_their_nearest_key(llama):
    with pytest.raises(ConfigError) as caught:
        load_config(ModelSection(path=str(llama), overrides={"hiden_size": 64, "atention_dropout": 0}), Path())
    assert "`hidden_size`" in str(caught.value) and "`attention_dropout`" in str(caught.value)
    with pytest.raises(ConfigError, match="refuses them"):
        load_config(ModelSection(path=str(llama), overrides={"hidden_size": "large"}), Path())


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("builtin:tiny-lama", "builtin:tiny-llama"),
        ("builtin:../../data", "builtin:tiny-llama"),
        ("./nowhere", "does not exist"),
        ("/nowhere/at/all", "does not exist"),
        ("empty", "config.json"),
        ("file.txt", "is a file"),
        ("broken", "cannot read it"),
        ("unknown", "cannot read it"),
        ("code", "trust_remote_code"),
    ],
)
def test_every_missing_model_says_what_to_do(tmp_path, path, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("")
    for name, text in {
        "broken": "{",
        "unknown": '{"model_type": "no_such_thing"}',
        "code": '{"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}',
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    (tmp_path / "code" / "own.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ConfigError) as caught:
        load_config(ModelSection(path=path), tmp_path)
    assert words in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_a_hub_id_without_a_network_names_both_places(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError) as caught:
        model_directory(ModelSection(path="nobody/no-such-model"), tmp_path)
    assert "nobody/no-such-model" in str(caught.value) and "name the directory" in str(caught.value)
