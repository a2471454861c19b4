"""What does not go with a model is found from its config alone, all of it at once, before anything is prepared."""

from pathlib import Path
from typing import Any

import pytest

from dstune.config.schema import RunConfig
from dstune.errors import ConfigError
from dstune.model.requirements import require
from dstune.planning.hardware import DEVICES
from tests.model.architectures import tiny_config


def asking(
    folder: Path, name: str, layout: Any, train: dict[str, Any] | None = None, max_length: int = 64, **model: Any
) -> None:
    tiny_config(name).save_pretrained(folder)
    data = {"sources": [{"path": "x"}], "max_length": max_length}
    written = {"name": "t", "model": {"path": str(folder), **model}, "data": data, "train": train or {}}
    require(RunConfig.model_validate(written), folder, layout, DEVICES["h200"])


def test_what_an_architecture_lacks_is_said_all_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        asking(tmp_path, "mixtral", "packed", {"lr_scales": {"*.up_proj.*": 2.0}}, compile="layers", fp8=True)
    places = [problem.where for problem in caught.value.problems]
    assert places == ["model.compile", "model.fp8", "train.lr_scales"]


@pytest.mark.parametrize(
    ("name", "layout", "model", "said"),
    [
        ("mamba", "packed", {}, r"data\.packing: .*carries over"),
        ("mamba", "padded", {"mlp_tile": "auto"}, r"model\.mlp_tile: no feed-forward layer"),
        ("gemma2", "padded", {"attention": "per-example"}, r"model\.attention: .*no attention but eager"),
        ("t5", "packed-seq2seq", {"attention": "eager"}, r"model\.attention: eager attention for packed pairs"),
        ("m2m_100", "seq2seq", {}, None),
        ("bert", "padded", {}, r"model\.path: bert(?s:.*)is to predict(?s:.*)is_decoder: true"),
        ("bert", "packed", {}, r"model\.path: bert.*is to predict"),
        ("bert", "padded", {"overrides": {"is_decoder": True}}, None),
        ("xlm", "padded", {}, r"model\.path: xlm.*is to predict"),
        ("gpt2", "packed", {"attention": "sdpa"}, None),
        ("gemma2", "padded", {"attention": "eager", "activation_checkpointing": True, "mlp_tile": 5}, None),
        ("mamba", None, {}, None),
    ],
)
def test_options_are_looked_at_beside_rows_and_model(
    tmp_path: Path, name: str, layout: Any, model: dict[str, Any], said: str | None
) -> None:
    if said is None:
        asking(tmp_path, name, layout, **model)
        return
    with pytest.raises(ConfigError, match=said):
        asking(tmp_path, name, layout, **model)


def test_what_padding_changes_is_trained_without_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.micro_batch_size: prophetnet .*sees its padding"):
        asking(tmp_path, "prophetnet", "seq2seq")
    asking(tmp_path, "prophetnet", "seq2seq", {"micro_batch_size": 1})


@pytest.mark.parametrize("name", ["gpt2", "bart"])
def test_no_example_may_be_longer_than_a_table_of_positions(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.max_length: 65 tokens, .*a table of 64 positions"):
        asking(tmp_path, name, None, max_length=65)
    asking(tmp_path, name, None)
    asking(tmp_path / "computed", "llama", None, max_length=4096)
