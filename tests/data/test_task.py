import json

import pytest

from dstune.config.schema import ModelSection
from dstune.data.task import is_seq2seq, packs
from dstune.errors import ConfigError


def _model(folder, config):
    folder.mkdir()
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return ModelSection(path=folder.name)


def test_found_from_the_config(tmp_path):
    assert not is_seq2seq(_model(tmp_path / "a", {"model_type": "llama"}), tmp_path)
    assert is_seq2seq(_model(tmp_path / "b", {"model_type": "t5"}), tmp_path)
    assert is_seq2seq(_model(tmp_path / "c", {"model_type": "own", "is_encoder_decoder": True}), tmp_path)
    assert not is_seq2seq(_model(tmp_path / "d", {"model_type": "bart", "is_encoder_decoder": False}), tmp_path)


def test_builtin_models(tmp_path):
    assert is_seq2seq(ModelSection(path="builtin:tiny-t5"), tmp_path)
    assert not is_seq2seq(ModelSection(path="builtin:tiny-llama"), tmp_path)
    with pytest.raises(ConfigError, match="builtin:tiny-llama or builtin:tiny-t5"):
        is_seq2seq(ModelSection(path="builtin:huge"), tmp_path)


def test_the_run_file_decides(tmp_path):
    assert is_seq2seq(ModelSection(path="nowhere", task="seq2seq-lm"), tmp_path)


def test_auto_packs_causal_models_and_the_pairs_that_are_known_to_stay_apart(tmp_path):
    t5 = _model(tmp_path / "a", {"model_type": "t5"})
    assert packs(t5, tmp_path)
    assert not packs(t5.model_copy(update={"attention": "sdpa"}), tmp_path), "sdpa has no mask for pairs"
    assert not packs(_model(tmp_path / "b", {"model_type": "led"}), tmp_path)
    assert packs(_model(tmp_path / "c", {"model_type": "llama"}), tmp_path)
    assert not packs(_model(tmp_path / "d", {"model_type": "qwen3_next"}), tmp_path), "its state runs on"


@pytest.mark.parametrize("text", ["{", "[]", '"t5"'])
def test_a_broken_config_is_named(tmp_path, text):
    with pytest.raises(ConfigError, match=r"config\.json"):
        is_seq2seq(_model(tmp_path / "a", text), tmp_path)


def test_a_missing_model_is_named(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for path, words in [
        ("./nowhere", "does not exist"),
        (str(tmp_path / "nowhere"), "does not exist"),
        ("file", "is a file"),
        ("empty", r"empty/config\.json: No such file"),
    ]:
        with pytest.raises(ConfigError, match=words):
            is_seq2seq(ModelSection(path=path), tmp_path)


def test_a_hub_id_without_a_network(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(ConfigError, match=r"(?s)no directory here.*the hub gave.*name the directory"):
        is_seq2seq(ModelSection(path="someone/something"), tmp_path)
