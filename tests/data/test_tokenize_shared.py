"""Every real conversation with every real tokenizer: ids, text and targets compared with transformers' own."""

import json
import unicodedata
from functools import cache
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor

from dstune.config.schema import ModelSection, Source
from dstune.data.conversation import Conversation, Example, Message
from dstune.data.formats import to_conversations
from dstune.data.sources import expand, read
from dstune.data.templates import resolve_template
from dstune.data.tokenize import Encoder, load_tokenizer

pytestmark = pytest.mark.shared

FILES = (
    "gsm8k/*.json",
    "llama_factory/alpaca_*.json",
    "llama_factory/glaive_*.json",
    "llama_factory/identity.json",
    "llama_factory/v1_sft_demo.jsonl",
    "fastchat/*.json",
    "dolly/*.json",
    "torchtitan_sft/*.json",
    "crosswoz/*.jsonl",
    "belle/*.json",
    "t0_p3/*.jsonl",
    "ms_swift_formats/*",
)
PER_FILE = 8


@cache
def conversations(root: Path, pattern: str) -> list[Conversation]:
    """Some of every file, spread over it."""
    source, made = Source(path=pattern), []
    for file in expand(source, root):
        found = [record.value for record in read(file) if record.value is not None]
        for value in found[:: max(1, len(found) // PER_FILE)]:
            made += to_conversations(value, source)
    return made


@cache
def encoder(root: Path, tokenizer: str, template: str, lossy: str = "error") -> Encoder:
    path = tokenizer if tokenizer.startswith("builtin:") else str(root / "tokenizers" / tokenizer)
    loaded = load_tokenizer(ModelSection(path=path), root)
    return Encoder(loaded, resolve_template(template, loaded, root), lossy_text=lossy)  # pyright: ignore


def decoded(made: Encoder, ids) -> str:
    return made.tokenizer.backend_tokenizer.decode(list(map(int, ids)), skip_special_tokens=False)


def assert_as_transformers(made: Encoder, conversation: Conversation, example: Example) -> None:
    messages, tools = conversation.to_dicts(), list(conversation.tools) or None
    source = made.template.for_tools(bool(tools))
    whole = made.tokenizer.apply_chat_template(messages, tools=tools, chat_template=source, tokenize=False)
    found = made.tokenizer.apply_chat_template(
        messages, tools=tools, chat_template=source, return_assistant_tokens_mask=True
    )
    if not example.control_tokens_encoded:
        assert example.input_ids.tolist() == found["input_ids"]
        if all(
            character.isascii() for character in whole
        ):  # transformers leaves out the last bytes of a longer character
            assert example.loss_mask.tolist() == [bool(mark) for mark in found["assistant_masks"]]
    assert example.loss_mask.any() and not example.loss_mask[0]
    if example.lossy_characters:
        return
    assert (
        decoded(made, example.input_ids) == unicodedata.normalize("NFC", whole)
        or decoded(made, example.input_ids) == whole
    )
    if not any(message.tool_calls for message in conversation.messages):
        end = decoded(made, made.end_of_turn_ids)
        trims = made.template.name == "llama3"
        said = [message.content for message in conversation.messages if message.role == "assistant"]
        want = "".join((one.strip() if trims else one) + end for one in said)
        assert decoded(made, example.input_ids[example.loss_mask]) in (want, unicodedata.normalize("NFC", want))


@pytest.mark.parametrize("template", ["chatml", "llama3", "alpaca"])
@pytest.mark.parametrize("tokenizer", ["gpt2", "byte_bpe_2k"])
def test_lossless_tokenizers_take_everything(shared_data: Path, tokenizer: str, template: str):
    made = encoder(shared_data, tokenizer, template)
    for pattern in FILES:
        found = conversations(shared_data, pattern)
        for conversation, example in zip(found, made.encode_batch(found), strict=True):
            assert isinstance(example, Example), (pattern, example)
            assert_as_transformers(made, conversation, example)


def test_spelled_ends_of_text_are_counted(shared_data: Path):
    made = encoder(shared_data, "gpt2", "chatml")
    found = conversations(shared_data, "t0_p3/*.jsonl")
    for conversation, example in zip(found, made.encode_batch(found), strict=True):
        assert isinstance(example, Example)
        spelled = sum(message.content.count("<|endoftext|>") for message in conversation.messages)
        assert example.control_tokens_encoded == spelled > 0
        assert (example.input_ids == made.tokenizer.eos_token_id).sum() == 1


def test_a_lossy_tokenizer_is_found_out_exactly(shared_data: Path):
    made = encoder(shared_data, "tiny_qwen_style", "auto", "allow")
    lost = 0
    for pattern in FILES:
        found = conversations(shared_data, pattern)
        for conversation, example in zip(found, made.encode_batch(found), strict=True):
            assert isinstance(example, Example)
            whole = unicodedata.normalize("NFC", made._renderer.render(conversation).text)
            assert (decoded(made, example.input_ids) != whole) == (example.lossy_characters > 0)
            assert_as_transformers(made, conversation, example)
            lost += example.lossy_characters
    assert lost > 10_000


@pytest.mark.parametrize("tokenizer", ["gpt2", "byte_bpe_2k", "builtin:tiny-llama"])
def test_naughty_strings_pass_unchanged(shared_data: Path, tokenizer: str):
    made = encoder(shared_data, tokenizer, "chatml")
    strings = [text for text in json.loads((shared_data / "naughty_strings/blns.json").read_text()) if text.strip()]
    for naughty in strings:
        message = Message("user", naughty)
        conversation = Conversation((Message("system", naughty), message, Message("assistant", naughty)))
        assert_as_transformers(made, conversation, made.encode(conversation))


@pytest.mark.parametrize(("tokenizer", "seq2seq"), [("t5", True), ("mistral_v1", False), ("sp_2k", True)])
def test_bare_sentencepiece_files_open(shared_data: Path, tokenizer: str, seq2seq: bool):
    loaded = load_tokenizer(ModelSection(path=str(shared_data / "tokenizers" / tokenizer)), shared_data)
    template = resolve_template("auto" if seq2seq else "chatml", loaded, shared_data, seq2seq)
    made = Encoder(loaded, template, seq2seq=seq2seq)
    said = Conversation((Message("user", "say hello to the world"), Message("assistant", "hello world")))
    example = made.encode(said)
    targets = example.input_ids[example.loss_mask].tolist()
    assert targets[-1] == loaded.eos_token_id
    assert loaded.decode(targets[:-1]).strip() == "hello world"
    if seq2seq:
        (file,) = (shared_data / "tokenizers" / tokenizer).glob("*.model")
        assert targets[:-1] == SentencePieceProcessor(model_file=str(file)).encode("hello world")
    else:
        assert example.input_ids[0] == loaded.bos_token_id
