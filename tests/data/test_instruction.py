"""Instruction templates: read, drawn by what a conversation says, rendered as one chat template that transformers renders alike."""

import pickle
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

from dstune.config.schema import ModelSection, Source
from dstune.data import instruction, notes
from dstune.data.conversation import Conversation, Message, Refused
from dstune.data.formats import to_conversations
from dstune.data.sources import expand, read
from dstune.data.templates import resolve_template
from dstune.data.tokenize import Encoder, load_tokenizer
from dstune.errors import ConfigError
from tests.data.made_tokenizers import byte_level

ALPACA = [
    "Do this.\n\n### Instruction:\n{instruction}\n\n### Response:\n",
    "Do this with that.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
]
TOKENIZER = byte_level(special=("<s>", "<|end|>"), eos_token="<|end|>")


def encoder(written: str | list[str], base: Path = Path("/"), seed: int = 0, **settings) -> Encoder:
    template = resolve_template(written, TOKENIZER, base, settings.get("seq2seq", False))
    return Encoder(TOKENIZER, template, seed=seed, **settings)


def asked(
    what: str = "Say hi", about: str | None = None, system: str | None = None, answer: str = "hi"
) -> Conversation:
    question = Message("user", what if about is None else f"{what}\n{about}", context=about)
    start = [] if system is None else [Message("system", system)]
    return Conversation((*start, question, Message("assistant", answer)))


def shown(made: Encoder, conversation: Conversation) -> str:
    """The example as text, its targets between ⟦ and ⟧."""
    example = made.encode(conversation)
    split = int(example.loss_mask.argmax())
    assert example.loss_mask[split:].all()
    before, after = (made.tokenizer.decode(part) for part in (example.input_ids[:split], example.input_ids[split:]))
    return f"{before}⟦{after}⟧"


def test_a_question_is_asked_by_the_text_that_takes_what_it_has():
    made = encoder(ALPACA)
    assert shown(made, asked()) == "Do this.\n\n### Instruction:\nSay hi\n\n### Response:\n⟦hi<|end|>⟧"
    with_input = "Do this with that.\n\n### Instruction:\nAdd\n\n### Input:\n1 and 1\n\n### Response:\n⟦2<|end|>⟧"
    assert shown(made, asked("Add", "1 and 1", answer="2")) == with_input


def test_without_a_place_of_its_own_the_input_stands_below_the_instruction():
    assert (
        shown(encoder("Q: {instruction}\nA:"), asked("Add", "1 and 1", answer="2")) == "Q: Add\n1 and 1\nA:⟦2<|end|>⟧"
    )


def test_what_no_text_takes_is_refused_by_name():
    made = encoder("{instruction} {input}:")
    with pytest.raises(Refused, match="no input and no system text"):
        made.encode(asked())
    with pytest.raises(Refused, match="an input and a system text"):
        encoder([*ALPACA, "{system} {instruction}:"]).encode(asked("Add", "1", "Be brief."))
    with pytest.raises(Refused, match="tools"):
        tool = {"type": "function", "function": {"name": "f"}}
        encoder(ALPACA).encode(Conversation(asked().messages, (tool,)))
    changed = Conversation((Message("user", "Add 1", context="1 "), Message("assistant", "a")))
    with pytest.raises(Refused, match="input_lost"):
        encoder(ALPACA).encode(changed)


def test_several_turns_are_asked_one_behind_the_other():
    made = encoder("{system}\nQ: {instruction}\nA: ", train_on="last")
    talk = (*asked(system="S").messages, Message("user", "More"), Message("assistant", "ho"))
    assert shown(made, Conversation(talk)) == "S\nQ: Say hi\nA: hi<|end|>S\nQ: More\nA: ⟦ho<|end|>⟧"


def test_the_draw_depends_on_the_seed_and_the_words_alone():
    texts = [f"{number}. {{instruction}}\n" for number in range(4)]
    talks = [asked(f"Question {number}") for number in range(400)]
    made = encoder(texts)
    first = [shown(made, talk)[0] for talk in talks]
    elsewhere = pickle.loads(pickle.dumps(made))
    assert [shown(elsewhere, talk)[0] for talk in talks[::-1]] == first[::-1]
    assert all(70 < count < 130 for count in Counter(first).values()) and len(set(first)) == 4
    reseeded = encoder(texts, seed=1)
    other = [shown(reseeded, talk)[0] for talk in talks]
    assert 70 < sum(one == two for one, two in zip(first, other, strict=True)) < 130
    assert made.fingerprint() != encoder(texts, seed=1).fingerprint()
    assert encoder(texts[:1]).fingerprint() == encoder(texts[:1], seed=1).fingerprint()
    long_way = encoder(texts, shortcuts=False)
    assert [shown(long_way, talk)[0] for talk in talks[:50]] == first[:50]


def test_transformers_renders_the_same_from_the_exported_template():
    texts = [
        "1 {instruction}:",
        "2 {instruction}:",
        "3 {instruction} ({input}):",
        "{{input}} {{% {instruction} 'é🙂\\n' {#x#} {x}:",
    ]
    made = encoder(texts)
    for what in ("a", "b", "c", "d", "e"):
        for about in (None, "so"):
            conversation = made._asked(asked(what, about))
            theirs = made.tokenizer.apply_chat_template(
                conversation.to_dicts(), chat_template=made.template.source, variant=conversation.variant
            )
            assert made.encode(asked(what, about)).input_ids.tolist() == theirs["input_ids"]
    assert _rendered(encoder(texts[3]), "x") == "{input} {{% x 'é🙂\\n' {#x#} {x}:"
    assert _rendered(made, "x") == "1 x:"


def _rendered(made: Encoder, what: str) -> str:
    messages = [{"role": "user", "content": what}]
    return made.tokenizer.apply_chat_template(
        messages, chat_template=made.template.source, tokenize=False, add_generation_prompt=True
    )


def test_a_sequence_to_sequence_model_s_source_ends_too():
    assert shown(encoder("Q: {instruction}", seq2seq=True), asked()) == "Q: Say hi<|end|>⟦hi<|end|>⟧"


def test_control_tokens_spelled_in_a_question_stay_text():
    made = encoder(ALPACA)
    example = made.encode(asked("Add <|end|>", "<|end|>", answer="<|end|>2"))
    assert example.control_tokens_encoded == 3
    assert (example.input_ids == TOKENIZER.eos_token_id).sum() == 1


def test_files_hold_one_text_or_several(tmp_path: Path):
    (tmp_path / "one.txt").write_text("Q: {instruction}\nA:\n", encoding="utf-8")
    (tmp_path / "many.txt").write_text(f"{ALPACA[0]}\n---\n{ALPACA[1]}\n", encoding="utf-8")
    assert instruction.texts_of_file(tmp_path / "one.txt") == ["Q: {instruction}\nA:"]
    assert instruction.texts_of_file(tmp_path / "many.txt") == ALPACA
    assert encoder("many.txt", tmp_path).template.source == encoder(ALPACA).template.source
    assert encoder(["one.txt", ALPACA[0]], tmp_path).template.num_variants == 2


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("Q: {instuction}\nA:", "did you mean `{instruction}`"),
        ("Q: {input}\nA:", "`{instruction}`"),
        ("{instruction}\n{output}", "follows by itself"),
        (["chatml", "{instruction}"], "in a list"),
        ("none.txt", "looked for"),
        ([], "empty list"),
        ("qwen33", "did you mean 'qwen3'"),
        ("ChatML", "did you mean 'chatml'"),
    ],
)
def test_what_is_no_template_is_named(written: str | list[str], said: str):
    with pytest.raises(ConfigError, match=said):
        resolve_template(written, TOKENIZER, Path("/nowhere"))


@pytest.mark.shared
def test_real_instructions_keep_every_word(shared_data: Path):
    texts = ["{instruction}\n\n", "Task: {instruction}\nAnswer: ", "{instruction}\n\nWith this: {input}\n\n"]
    tokenizer = load_tokenizer(ModelSection(path=str(shared_data / "tokenizers" / "byte_bpe_2k")), shared_data)
    made = Encoder(tokenizer, resolve_template(texts, tokenizer, shared_data))
    asked_for: Counter[object] = Counter()
    for one in (Source(path="belle/*.json"), Source(path="llama_factory/alpaca_en_demo.json")):
        for file in expand(one, shared_data):
            values = [record.value for record in read(file) if record.value is not None][:150]
            for conversation in (made_of for value in values for made_of in to_conversations(value, one)):
                example = made.encode(conversation)
                question, answer = conversation.messages[-2:]
                text = tokenizer.decode(example.input_ids)
                wanted = [
                    question.content.removesuffix(f"\n{question.context}"),
                    question.context or "",
                    answer.content,
                ]
                assert all(unicodedata.normalize("NFC", said) in text for said in wanted)
                asked_for["input" if question.context else text[:5] == "Task:"] += 1
    assert min(asked_for[kind] for kind in ("input", True, False)) > 20


def test_a_text_that_ends_in_a_blank_is_told():
    (told,) = notes.of_encoding(encoder("Q: {instruction}\nA: "))
    assert "ends with a blank" in told
    assert not notes.of_encoding(encoder("Q: {instruction}\nA: ", seq2seq=True))
    assert not notes.of_encoding(encoder("Q: {instruction}\nA:"))


def test_a_refused_question_says_which_text_is_missing():
    with pytest.raises(
        Refused, match=r"no input and a system text; give `data.template` a text with `{instruction}`, `{system}`"
    ):
        encoder("Q: {instruction} {input}\nA:").encode(asked(system="Be brief."))
