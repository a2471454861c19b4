"""Small tokenizers made on the spot: byte-level, with the added tokens that a test wants."""

from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHATML = ("<|im_start|>", "<|im_end|>")


def byte_level(
    special: Sequence[str] = CHATML, plain: Sequence[str] = (), alphabet: str | None = None, **named: Any
) -> PreTrainedTokenizerFast:
    """One token a byte (of `alphabet`, in ByteLevel's spelling), a few merges, `special` and `plain` added tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet()) if alphabet is None else sorted(set(alphabet))
    merges = [pair for pair in [("Ċ", "Ċ"), ("e", "r"), ("a", "n"), ("Ġ", "a")] if set(pair) <= set(letters)]
    words = letters + [left + right for left, right in merges]
    backend = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=merges))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **named)


def unigram(pieces: str, byte_fallback: bool = False, **named: Any) -> PreTrainedTokenizerFast:
    """SentencePiece-like: one piece a character of `pieces`, ▁ for blanks, `<unk>` for the rest."""
    vocabulary = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -1.0)] + [(piece, -2.0) for piece in pieces]
    if byte_fallback:
        vocabulary += [(f"<0x{byte:02X}>", -9.0) for byte in range(256)]
    backend = Tokenizer(models.Unigram(vocabulary, 0, byte_fallback))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", **named)
