"""What benchmarks of data and training work on: chats grown from real ones, and a byte-level BPE trained on their text.

The real ones are the developers' in ../shared/data (or $DSTUNE_SHARED/data); without them the quickstart's generator stands in, and
the report says so.
"""

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VOCABULARY = 128_000
_SHARED = Path(os.environ.get("DSTUNE_SHARED", Path(__file__).parents[3] / "shared")) / "data"
_PAIRS = ("llama_factory/alpaca_en_demo.json", "llama_factory/alpaca_zh_demo.json", "gsm8k/gsm_8k_train.json")
_TURNS = (1, 1, 1, 2, 2, 3, 4)
"""Questions in a chat, drawn among these."""
_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""Llama 3's way of cutting text into words."""


def make(folder: Path, num_chats: int, vocabulary: int = VOCABULARY) -> tuple[Path, Path, str]:
    """The chats' JSONL file, the tokenizer's directory and where the chats come from; made in `folder` if not there.

    `vocabulary`: tokens of the BPE; three special ones are added.
    """
    folder.mkdir(parents=True, exist_ok=True)
    real = list(_real_pairs()) if _SHARED.is_dir() else []
    pairs = real or list(_generated_pairs())
    chats = folder / f"chats-{num_chats}-{'real' if real else 'generated'}.jsonl"
    if not chats.exists():
        _grow(pairs, num_chats, chats)
    tokenizer = folder / f"bpe-{vocabulary}-{'real' if real else 'generated'}"
    if not (tokenizer / "tokenizer_config.json").exists():
        _train(tokenizer, vocabulary)
    return (
        chats,
        tokenizer,
        "grown from the real chats in ../shared/data" if real else "from the quickstart's generator",
    )


def _real_pairs() -> Iterator[tuple[str, str]]:
    for name in _PAIRS:
        for record in json.loads((_SHARED / name).read_text(encoding="utf-8")):
            question = "\n".join(part for part in (record["instruction"], record.get("input")) if part)
            yield question, record["output"]
    for record in json.loads((_SHARED / "fastchat" / "dummy_conversation.json").read_text(encoding="utf-8")):
        said = [turn["value"] for turn in record["conversations"]]
        yield from zip(said[::2], said[1::2], strict=False)
    for line in (_SHARED / "oasst" / "en_100_tree.jsonl").read_text(encoding="utf-8").strip().split("\n"):
        yield from _branches(json.loads(line)["prompt"])


def _branches(node: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for reply in node.get("replies", []):
        if node["role"] == "prompter":
            yield node["text"], reply["text"]
        yield from _branches(reply)


def _generated_pairs() -> Iterator[tuple[str, str]]:
    from dstune.data import builtin

    for record in builtin.records(None):
        yield record["instruction"], record["output"]


def _grow(pairs: list[tuple[str, str]], num_chats: int, path: Path) -> None:
    draw = random.Random(0)
    pairs = [pair for pair in pairs if all(said.strip() for said in pair)]
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        for number in range(num_chats):
            messages: list[dict[str, str]] = []
            if draw.random() < 0.3:
                messages.append({"role": "system", "content": f"You are a helpful assistant. Case {number}."})
            for _ in range(draw.choice(_TURNS)):
                question, answer = draw.choice(pairs)
                messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    temporary.rename(path)


def _train(folder: Path, vocabulary: int) -> None:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_SPLIT), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, min_frequency=1, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 131_072,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _texts() -> Iterator[str]:
    if not _SHARED.is_dir():
        for question, answer in _generated_pairs():
            yield from (question, answer)
        return
    for path in sorted(_SHARED.rglob("*")):
        if path.suffix in (".json", ".jsonl", ".txt") and "tokenizers" not in path.parts:
            yield from path.read_text(encoding="utf-8").splitlines()
