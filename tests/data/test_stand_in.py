"""A tokenizer's own template without marks: recognised by what it writes, marked by the built-in one, exported as it was."""

import re
from datetime import datetime
from pathlib import Path

import pytest

from dstune.config.schema import DataSection, ModelSection, Source
from dstune.data import notes
from dstune.data.conversation import Conversation, Message, Refused
from dstune.data.encoder import make_encoder
from dstune.data.stand_in import stand_in
from dstune.data.templates import Template, builtin_template, resolve_template
from dstune.data.tokenize import Encoder
from tests.data.made_tokenizers import byte_level
from tests.data.test_targets import THINKING, trained
from tests.data.test_templates import CALL, MARKERS, TOOL

NOW = datetime(2024, 7, 26)


def made_for(name: str):
    return byte_level(special=("<s>", "</s>", *MARKERS[name]), bos_token="<s>", eos_token="</s>")


def without_marks(name: str) -> str:
    """As the family ships it: the same text, nothing said of who writes what."""
    return re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", builtin_template(name, made_for(name)).source)


@pytest.mark.parametrize("name", ["qwen3", "gemma", "phi"])
def test_a_family_s_own_template_is_marked_by_the_built_in_one(name: str):
    tokenizer, own = made_for(name), Template("tokenizer", without_marks(name))
    found = stand_in(own, tokenizer, NOW)
    assert (found.name, found.own) == (f"tokenizer, marked by {name}", own.source)
    made = Encoder(tokenizer, found, now=NOW)
    assert made.summary()["mask"] == "generation" and "export keeps" in notes.of_encoding(made)[0]
    talk = Conversation(
        (Message("user", "Q"), Message("assistant", "A"), Message("user", "R"), Message("assistant", "B"))
    )
    theirs = tokenizer.apply_chat_template(talk.to_dicts(), chat_template=own.source)["input_ids"]
    assert made.encode(talk).input_ids.tolist() == theirs


def test_qwen3_s_three_ways_to_write_an_answer_are_marked():
    tokenizer = made_for("qwen3")
    made = Encoder(tokenizer, stand_in(Template("tokenizer", without_marks("qwen3")), tokenizer, NOW), now=NOW)
    called = Message("assistant", "", tool_calls=(CALL,), reasoning="look")
    talk = Conversation(
        (*THINKING[:1], Message("assistant", "A"), THINKING[2], called, Message("tool", "3"), THINKING[3]), (TOOL,)
    )
    first, second, third = trained(made, made.encode(talk))
    assert first == "A<|im_end|>" and third == "<think>\nbecause\n</think>\n\nB<|im_end|>"
    assert second.startswith("<think>\nlook\n</think>\n\n<tool_call>\n") and second.endswith("</tool_call><|im_end|>")
    with pytest.raises(Refused, match=r"reasoning_left_out.*turns: expand"):
        made.encode(Conversation(THINKING))


def test_what_writes_otherwise_is_left_alone():
    tokenizer = made_for("qwen3")
    for source in (
        without_marks("qwen3").replace("# Tools", "# Functions"),
        without_marks("qwen3").replace("(loop.last or thoughts)", "thoughts"),
        builtin_template("qwen3", tokenizer).source,
    ):
        own = Template("tokenizer", source)
        assert stand_in(own, tokenizer, NOW) is own
    assert stand_in(own, byte_level(special=("<e>",), eos_token="<e>"), NOW) is own


def test_a_conversation_that_the_two_write_differently_is_refused():
    tokenizer = made_for("qwen3")
    role = "{{- '<|im_start|>' + message.role"
    rare = without_marks("qwen3").replace(role, "{{- '!' if 'zebra' in message.content }}" + role)
    made = Encoder(tokenizer, stand_in(Template("tokenizer", rare), tokenizer, NOW), now=NOW, shortcuts=False)
    made.encode(Conversation((Message("user", "horse"), Message("assistant", "A"))))
    with pytest.raises(Refused, match="template_differs"):
        made.encode(Conversation((Message("user", "zebra"), Message("assistant", "A"))))


def test_a_run_trains_by_the_marked_one_and_exports_its_own(tmp_path: Path):
    tokenizer = made_for("qwen3")
    tokenizer.chat_template = without_marks("qwen3")
    tokenizer.save_pretrained(tmp_path)
    made = make_encoder(ModelSection(path=str(tmp_path)), DataSection(sources=[Source(path="x")]), tmp_path, False)
    assert made.template.own == tokenizer.chat_template
    assert resolve_template("auto", made.tokenizer, tmp_path).source == tokenizer.chat_template


def test_markers_that_the_tokenizer_lacks_are_told():
    plain = byte_level(special=("</s>",), eos_token="</s>")
    said = notes.of_encoding(Encoder(plain, builtin_template("gemma", plain), now=NOW))
    assert "<start_of_turn>, <end_of_turn>" in said[0] and "ordinary text" in said[0]
    assert not notes.of_encoding(Encoder(made_for("gemma"), builtin_template("gemma", made_for("gemma")), now=NOW))
