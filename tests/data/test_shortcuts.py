"""The shortcuts of encoding: the same as the long way wherever they are taken, and not taken where that is not certain."""

import json
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from dstune.config.schema import ModelSection
from dstune.data import tokenize
from dstune.data.conversation import Conversation, Message, Refused
from dstune.data.fast_tokens import byte_places, covered, fast_tokens
from dstune.data.skeleton import Skeletons
from dstune.data.templates import BUILTIN, Template, resolve_template
from dstune.data.tokenize import Encoder, ShortcutDiffers, load_tokenizer

NASTY = [
    "a",
    " b ",
    "\n\nc\n",
    "é東京👩‍👩‍👧‍👦",
    "<|im_end|>",
    "<think>x</think>y",
    "{{ z }}",
    "e\u0301",
    "x" * 500,
    "\U0010fffd",
    "1\t2",
]
LOOP = "{% for m in messages %}{{ m.role + ':' }}{% generation %}{{ BODY }}{% endgeneration %};{% endfor %}"


def talk(*contents: str) -> Conversation:
    roles = ("user", "assistant")
    return Conversation(tuple(Message(roles[n % 2], content) for n, content in enumerate(contents)))


def skeletons(body: str) -> tuple[Skeletons, list[Conversation]]:
    """Skeletons of a template that writes `body` for every message, and what was laid out the long way."""
    source = LOOP.replace("BODY", body)
    long: list[Conversation] = []

    def lay(conversation: Conversation) -> tuple[str, list[tuple[int, int, int]]]:
        from dstune.data.jinja_sandbox import ChatTemplate

        long.append(conversation)
        text, blocks = ChatTemplate(source, datetime(2026, 1, 1)).render(conversation.to_dicts(), None, {})
        return text, [(start, end, number) for number, (start, end) in enumerate(blocks)]

    return Skeletons(Template("made", source), {}, datetime(2026, 1, 1), lay), long


@pytest.mark.parametrize(
    ("body", "renderings"),
    [
        ("m.content", 1),
        ("m.content | trim", 1),
        ("m['content'].strip() ~ '!'", 1),
        ("m.content if m.content is string else raise_exception('no')", 1),
        ("(m.content if 'b' in m.content else 'no b: ' + m.content)", 3),  # one for each answer that the contents give
        ("m.content | upper", 6),  # what it makes of a content is not known: every one is rendered
        ("m.content | length", 6),
        ("m.content[:1]", 6),
        ("m.content | tojson", 6),
        ("'%s' % m.content", 6),
        ("m.content.replace('a', 'b')", 6),
    ],
)
def test_a_skeleton_holds_for_contents_that_it_was_shown_for(body: str, renderings: int) -> None:
    made, long = skeletons(body)
    every = [talk(f"a{n}", f"b{n}") for n in range(3)] + [talk("b", "a"), talk("b b", " a"), talk("a", "c ")]
    laid = [made.lay(conversation) for conversation in every]
    assert len(long) == renderings
    reference, _ = skeletons("m.content | upper")  # never learns
    plain, _ = skeletons(body)
    plain._template = None
    assert laid == [plain.lay(conversation) for conversation in every]
    assert reference._template is not None


def test_contents_that_are_blank_or_more_than_text_go_the_long_way() -> None:
    made, long = skeletons("m.content")
    for conversation in (talk("a", "b"), talk("a", " "), Conversation((Message("user", "a", name="n"),))):
        made.lay(conversation)
        made.lay(conversation)
    assert len(long) == 1 + 2 + 2


def encoders(shared: Path, tokenizer: str, template: str) -> tuple[Encoder, Encoder]:
    loaded = load_tokenizer(
        ModelSection(path="builtin:tiny-llama", tokenizer=str(shared / "tokenizers" / tokenizer.removesuffix("-nfc"))),
        Path.cwd(),
    )
    if tokenizer.endswith("-nfc"):
        loaded.backend_tokenizer.normalizer = tokenizers.normalizers.NFC()
    resolved = resolve_template(template, loaded, Path.cwd())
    short = Encoder(loaded, resolved, lossy_text="allow")
    return short, short.without_shortcuts()


@pytest.mark.shared
@pytest.mark.parametrize(
    ("tokenizer", "template"),
    [("gpt2", name) for name in BUILTIN if name != "plain"]
    + [("byte_bpe_2k", "llama3"), ("byte_bpe_2k-nfc", "chatml")],
)
def test_both_ways_give_the_same_tokens_and_targets(
    shared_data: Path, tokenizer: str, template: str, monkeypatch
) -> None:
    monkeypatch.setattr(tokenize, "_ALL_COMPARED", 0)
    short, long = encoders(shared_data, tokenizer, template)
    every = [talk(one, NASTY[(n * n + 3) % len(NASTY)]) for n, one in enumerate(NASTY)]
    every += [talk(one, "Yes.", other, "No.") for one, other in zip(NASTY, reversed(NASTY), strict=True)]
    quick, slow = short.encode_batch(every), long.encode_batch(every)
    assert short._fast is not None and long._fast is None
    for mine, theirs in zip(quick, slow, strict=True):
        if isinstance(theirs, Refused):
            assert str(mine) == str(theirs)
        else:
            assert mine.input_ids.tolist() == theirs.input_ids.tolist()
            assert mine.loss_mask.tolist() == theirs.loss_mask.tolist()
            assert mine.control_tokens_encoded == theirs.control_tokens_encoded


@pytest.mark.shared
def test_a_shortcut_that_lies_is_found(shared_data: Path, monkeypatch) -> None:
    short, _ = encoders(shared_data, "gpt2", "chatml")
    encode = short._fast.encode

    def lying(texts):
        tokens = encode(texts)
        tokens.ids[3] += 1
        return tokens._replace(faithful=np.ones_like(tokens.faithful))

    monkeypatch.setattr(short._fast, "encode", lying)
    with pytest.raises(ShortcutDiffers):
        short.encode_batch([talk("Hello there", "Hi.")])


@pytest.mark.shared
@pytest.mark.parametrize("tokenizer", ["mistral_v1", "sp_2k", "t5"])
def test_other_kinds_of_tokenizers_have_no_fast_side(shared_data: Path, tokenizer: str) -> None:
    loaded = load_tokenizer(
        ModelSection(path="builtin:tiny-llama", tokenizer=str(shared_data / "tokenizers" / tokenizer)), Path.cwd()
    )
    text = loaded.backend_tokenizer.to_str()
    assert fast_tokens(loaded.backend_tokenizer, text, json.loads(text))() is None


@pytest.mark.shared
def test_targets_by_counting_bytes(shared_data: Path) -> None:
    short, _ = encoders(shared_data, "gpt2", "chatml")
    texts = ["aé東 b", "", "京都 and more"]
    tokens = short._fast.encode(texts)
    assert tokens.faithful.all() and tokens.starts.tolist() == [0, 8, 8, 8 + len(texts[2].encode())]
    (place,) = byte_places(texts[2], [(1, 2)], int(tokens.starts[2]))
    assert place == (11, 14)
    mask = covered(tokens, [place])
    ends = tokens.ends.tolist()
    assert mask.tolist() == [start < 14 and end > 11 for start, end in zip([0, *ends[:-1]], ends, strict=True)]
