"""Which parameters patterns mean, and by which factors they learn."""

import pytest

from dstune.errors import ConfigError
from dstune.model import names, patterns
from tests.engine import tiny


def _scales(scales: dict[str, float], tied: bool = False, frozen: str = "") -> dict[str, float]:
    module = tiny.build(tied)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not frozen or not name.startswith(frozen))
    return patterns.lr_scales(module, scales, names.saved_names(module))  # type: ignore[arg-type]


def test_a_parameter_takes_the_product_of_its_patterns() -> None:
    found = _scales({"model.layers.0.*": 0.1, "*.mlp.up_proj.weight": 3.0, "lm_head.*": 2.0})
    assert found["model.layers.0.mlp.up_proj.weight"] == pytest.approx(0.3)
    assert found["model.layers.1.mlp.up_proj.weight"] == 3.0
    assert found["model.layers.0.input_layernorm.weight"] == 0.1
    assert found["lm_head.weight"] == 2.0 and "model.norm.weight" not in found
    turned = _scales({"lm_head.*": 2.0, "*.mlp.up_proj.weight": 3.0, "model.layers.0.*": 0.1})
    assert turned == found  # to the last digit
    assert _scales({}) == {}


def test_a_tied_parameter_is_one() -> None:
    assert _scales({"lm_head.weight": 2.0, "*": 0.5}, tied=True)["model.embed_tokens.weight"] == 1.0


def test_patterns_that_mean_nothing_are_named_with_what_is_near() -> None:
    with pytest.raises(ConfigError, match=r"(?s)'lm_haed\.\*' matches no parameter.*lm_head\.weight"):
        _scales({"lm_haed.*": 2.0, "*": 1.0})
    with pytest.raises(ConfigError, match=r"'model\.embed_tokens\.\*' matches frozen parameters alone"):
        _scales({"model.embed_tokens.*": 2.0}, frozen="model.embed_tokens")
