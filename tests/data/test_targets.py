"""Which tokens are targets: by `train_on`, by the file's own weights, one answer at a time, in plain documents."""

from pathlib import Path

import numpy as np
import pytest

from dstune.config.schema import DataSection, ModelSection, Source
from dstune.data.conversation import Conversation, Example, Message, Refused
from dstune.data.encoder import make_encoder
from dstune.data.targets import TrainOn
from dstune.data.templates import Template
from dstune.data.tokenize import Encoder
from dstune.data.turns_expand import expand
from dstune.errors import ConfigError
from tests.data.made_tokenizers import byte_level
from tests.data.test_render import CALL, QWEN_STYLE
from tests.data.test_templates import family_encoder

UNMARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = (
    Message("system", "S"),
    Message("user", "Q"),
    Message("assistant", "A"),
    Message("user", "R"),
    Message("assistant", "B"),
)


def encoder(source: str, train_on: TrainOn = "assistant") -> Encoder:
    return Encoder(byte_level(eos_token="<|im_end|>"), Template("own", source), train_on)


def weighed(*train: bool | None, messages: tuple[Message, ...] = TALK) -> Conversation:
    return Conversation(
        tuple(
            Message(m.role, m.content, reasoning=m.reasoning, train=one) for m, one in zip(messages, train, strict=True)
        )
    )


def trained(made: Encoder, example: Example) -> list[str]:
    """The runs of targets, as text."""
    ids, mask = example.input_ids, example.loss_mask
    borders = np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]])))
    decode = made.tokenizer.backend_tokenizer.decode
    return [
        decode(ids[a:b].tolist(), skip_special_tokens=False) for a, b in zip(borders[::2], borders[1::2], strict=True)
    ]


@pytest.mark.parametrize("source", [UNMARKED, QWEN_STYLE, "chatml"])
@pytest.mark.parametrize(
    ("train_on", "train", "want"),
    [
        ("assistant", (None,) * 5, ["A", "B"]),
        ("last", (None,) * 5, ["B"]),
        ("assistant", (None, None, False, None, None), ["B"]),
        ("last", (None, None, True, None, None), ["A", "B"]),
        ("assistant", (None, True, None, None, None), ["Q", "A", "B"]),
        ("weights", (False, False, True, False, False), ["A"]),
        ("weights", (None, True, None, None, True), ["Q", "B"]),
        ("weights", (True, None, None, None, None), ["S"]),
    ],
)
def test_turns_are_taken_as_the_run_and_the_file_say(source: str, train_on: TrainOn, train, want: list[str]):
    made = encoder(source, train_on) if "{" in source else family_encoder("chatml", train_on=train_on)
    lead = "<think>\n\n</think>\n\n" if source == QWEN_STYLE else ""
    said = [f"{lead if turn == 'B' else ''}{turn}<|im_end|>" for turn in want]
    assert trained(made, made.encode(weighed(*train))) == said


def test_everything_but_what_the_file_excludes():
    made = family_encoder("chatml", train_on="all")
    whole = made.encode(Conversation(TALK))
    assert whole.loss_mask.tolist() == [False] + [True] * (len(whole.input_ids) - 1)
    example = made.encode(weighed(None, False, False, None, None))
    first, between, last = trained(made, example)
    assert first.endswith("S<|im_end|>\n<|im_start|>user\n") and between == "\n<|im_start|>assistant\n"
    assert last.startswith("\n<|im_start|>user\nR<|im_end|>")
    with pytest.raises(Refused, match="no_supervised_tokens"):
        made.encode(weighed(*[False] * 5))


def test_weights_without_a_weight_are_refused():
    made = family_encoder("chatml", train_on="weights")
    for train in ((None,) * 5, (False,) * 5):
        with pytest.raises(Refused, match=r"no_supervised_tokens.*weight"):
            made.encode(weighed(*train))


def test_a_user_s_turn_that_cannot_be_told_apart_is_refused():
    messages = (Message("user", "QUIET"), Message("assistant", "A"))
    counts = encoder(
        UNMARKED.replace("{{ m.content }}", "{{ m.content }}{{ m.content | length if m.role == 'user' }}"), "weights"
    )
    with pytest.raises(Refused, match=r"mask_unverified.*message 0 \(user\)"):
        counts.encode(weighed(True, None, messages=messages))


def test_a_turn_s_end_is_not_the_next_one_s_beginning():
    made = family_encoder("deepseek", train_on="weights")
    assert trained(made, made.encode(weighed(None, True, None, None, None))) == ["Q"]


THINKING = (
    Message("user", "Q"),
    Message("assistant", "A", reasoning="why"),
    Message("user", "R"),
    Message("assistant", "B", reasoning="because"),
)


@pytest.mark.parametrize("name", ["qwen3", "deepseek", "glm"])
def test_an_earlier_answer_without_its_thoughts_is_no_target(name: str):
    made = family_encoder(name)
    with pytest.raises(Refused, match=r"reasoning_left_out.*message 1.*turns: expand"):
        made.encode(Conversation(THINKING))
    spelled = [Message("user", "Q"), Message("assistant", "<think>\nwhy\n</think>\n\nA"), *THINKING[2:]]
    with pytest.raises(Refused, match="reasoning_left_out"):
        made.encode(Conversation(tuple(spelled)))
    (last,) = trained(
        family_encoder(name, train_on="last"), made.encode(weighed(None, False, None, None, messages=THINKING))
    )
    assert "because" in last and "why" not in last
    first, second = (made.encode(one) for one in expand(Conversation(THINKING)))
    assert ["why" in one for one in trained(made, first)] == [True]
    assert ["because" in one for one in trained(made, second)] == [True]


@pytest.mark.parametrize("said", ["first <think>why</think>A", "<think>why</think>B<think></think>A"])
def test_what_stands_before_a_thought_is_not_lost(said: str):
    with pytest.raises(Refused, match="template_drops_content"):
        family_encoder("qwen3").encode(Conversation((Message("user", "Q"), Message("assistant", said))))


def test_thoughts_of_earlier_answers_that_stay_are_no_reason_to_refuse():
    made = family_encoder("qwen2")
    assert [("why" in one, "because" in one) for one in trained(made, made.encode(Conversation(THINKING)))] == [
        (True, False),
        (False, True),
    ]


def test_expand_makes_one_conversation_an_answer():
    called = Conversation(
        (
            Message("user", "Q"),
            Message("assistant", "", tool_calls=(CALL,)),
            Message("tool", "3"),
            Message("assistant", "A", train=False),
            Message("user", "R"),
            Message("assistant", "B"),
            Message("user", "left over"),
        ),
        (CALL,),
    )
    parts = expand(called)
    assert [len(part.messages) for part in parts] == [2, 6] and all(part.tools for part in parts)
    assert [message.train for message in parts[1].messages] == [False] * 2 + [None, False, None, True]
    assert [len(part.messages) for part in expand(called, "last")] == [6]
    first, second = expand(weighed(None, True, None, True, None))
    assert [message.train for message in first.messages] == [None, True, True]
    assert [message.train for message in second.messages] == [False, False, False, True, True]
    asked = Conversation((Message("user", "Q"),))
    assert expand(asked) == [asked]
    text = Conversation((Message("document", "text"),), document=True)
    assert expand(text) == [text]


@pytest.mark.parametrize("seq2seq", [False, True])
def test_every_expanded_answer_is_one_example(seq2seq: bool):
    made = family_encoder("plain", seq2seq=seq2seq) if seq2seq else family_encoder("chatml")
    examples = made.encode_batch(expand(Conversation(TALK)))
    ends = ["A</s>", "B</s>"] if seq2seq else ["A<|im_end|>", "B<|im_end|>"]
    assert [trained(made, example)[0] for example in examples] == ends


def document(text: str) -> Conversation:
    return Conversation((Message("document", text),), document=True)


def test_a_document_is_a_target_from_its_second_token_on():
    made = family_encoder("chatml")
    example = made.encode(document("One.\n\nTwo "))
    assert made.tokenizer.decode(example.input_ids) == "One.\n\nTwo </s>"
    assert example.loss_mask.tolist() == [False] + [True] * (len(example.input_ids) - 1)
    kept, other = made.encode_batch([document("One"), Conversation(TALK)])
    assert isinstance(kept, Example) and isinstance(other, Example) and len(kept.input_ids) == 4


def test_control_tokens_in_a_document_stay_text():
    made = family_encoder("chatml")
    example = made.encode(document("a</s>b<|im_end|>"))
    assert example.control_tokens_encoded == 2
    assert (example.input_ids == made.tokenizer.eos_token_id).sum() == 1
    assert made.tokenizer.backend_tokenizer.decode(example.input_ids[:-1].tolist()) == "a</s>b<|im_end|>"
    with pytest.raises(Refused, match="control_tokens"):
        family_encoder("chatml", control_tokens="error").encode(document("a</s>b"))
    kept = family_encoder("chatml", control_tokens="allow").encode(document("a</s>b"))
    assert (kept.input_ids == made.tokenizer.eos_token_id).sum() == 2


def test_a_document_needs_an_end_and_a_causal_model():
    with pytest.raises(Refused, match=r"document.*end of sequence"):
        Encoder(byte_level(), Template("own", UNMARKED)).encode(document("a"))
    with pytest.raises(Refused, match=r"document.*sequence-to-sequence"):
        family_encoder("plain", seq2seq=True).encode(document("a"))


def test_one_answer_an_example_does_not_go_with_everything_a_target():
    data = DataSection(sources=[Source(path="x")], turns="expand", train_on="all", template="chatml")
    with pytest.raises(ConfigError, match=r"data\.turns"):
        make_encoder(ModelSection(path="builtin:tiny-llama"), data, Path(), False)


def test_documents_alone_need_no_template(tmp_path: Path):
    bare = byte_level(special=("</s>",), eos_token="</s>")
    bare.save_pretrained(tmp_path)
    model = ModelSection(path=str(tmp_path))
    made = make_encoder(model, DataSection(sources=[Source(path="x", format="documents")]), tmp_path, False)
    assert made.encode(document("ab")).loss_mask.tolist() == [False, True, True]
    with pytest.raises(ConfigError, match="no chat template"):
        make_encoder(model, DataSection(sources=[Source(path="x")]), tmp_path, False)
