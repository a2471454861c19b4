"""Tokens that a run adds to its model's tokenizer: their ids, who may spell them, what knows of them."""

import logging
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from transformers import AutoTokenizer

from dstune.config.schema import ModelSection
from dstune.data.conversation import Conversation, Example, Message
from dstune.data.task import vocabulary_size
from dstune.data.tokenize import Encoder, load_tokenizer, resolve_template
from dstune.data.tokenizer_files import BUILTIN_DIRECTORY, new_rows
from dstune.errors import ConfigError

SIZE = 666
BOTH = {"plain": ["kilopascal"], "special": ["<|unit|>"]}


def model(new_tokens: Any) -> ModelSection:
    return ModelSection(path="builtin:tiny-llama", tokenizer=str(BUILTIN_DIRECTORY), new_tokens=new_tokens)


def test_they_come_behind_the_tokenizers_own_in_the_order_given(tmp_path: Path) -> None:
    assert new_rows(model(["b-token", "a-token"]), tmp_path) == range(SIZE, SIZE + 2)
    tokenizer = load_tokenizer(model(["b-token", "a-token"]), tmp_path)
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for one in (tokenizer, again):
        assert one.convert_tokens_to_ids(["b-token", "a-token"]) == [SIZE, SIZE + 1]
        assert one("an a-token", add_special_tokens=False)["input_ids"][-1] == SIZE + 1
    assert new_rows(
        ModelSection(path="x", tokenizer=str(tmp_path / "saved"), new_tokens=["a-token"]), tmp_path
    ) == range(0)


def test_text_spells_plain_ones_and_cannot_spell_special_ones(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(model(BOTH), tmp_path)
    template = resolve_template("chatml", tokenizer, tmp_path, False)
    text = "<|unit|> 5 kilopascal"
    example = Encoder(tokenizer, template).encode(Conversation((Message("user", text), Message("assistant", text))))
    assert isinstance(example, Example)
    ids = example.input_ids.tolist()
    assert (ids.count(SIZE), ids.count(SIZE + 1), example.control_tokens_encoded) == (2, 0, 2)
    assert tokenizer.decode(ids).count(text) == 2
    other = Encoder(load_tokenizer(model(BOTH | {"plain": []}), tmp_path), template)
    assert (
        other.fingerprint()["tokenizer"]["sha256"] != Encoder(tokenizer, template).fingerprint()["tokenizer"]["sha256"]
    )


def test_what_is_there_already_stays_with_a_note_or_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert new_rows(model(["<|im_end|>", "kilopascal"]), tmp_path) == range(SIZE, SIZE + 1)
    assert "'<|im_end|>' is in the tokenizer already (token 2)" in caplog.text
    assert new_rows(model({"special": ["<|im_end|>"]}), tmp_path) == range(0)
    with pytest.raises(ConfigError, match=r"new_tokens\.special.*'a' is in this tokenizer already, as ordinary text"):
        load_tokenizer(model({"special": ["a"]}), tmp_path)
    for wrong in (["x", "x"], {"plain": ["x"], "special": ["x"]}, [" x"], [""], {"tokens": ["x"]}):
        with pytest.raises(ValidationError):
            model(wrong)


def test_the_vocabulary_grows_where_there_is_no_room(tmp_path: Path) -> None:
    small = ModelSection(
        path="builtin:tiny-llama", tokenizer=str(BUILTIN_DIRECTORY), new_tokens=BOTH, overrides={"vocab_size": SIZE}
    )
    assert vocabulary_size(small, tmp_path) == SIZE + 2
    roomy = small.model_copy(update={"overrides": {"vocab_size": 1000}})
    assert vocabulary_size(roomy, tmp_path) == 1000
