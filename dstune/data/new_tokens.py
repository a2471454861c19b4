"""Tokens that a run adds to its model's tokenizer (`model.new_tokens`): their ids are the rows that the embeddings get."""

from typing import Any

from dstune.config.new_tokens import NewTokensSection
from dstune.errors import ConfigError, Problem
from dstune.loggers import get_logger

log = get_logger(__name__)


def add(tokenizer: Any, wanted: NewTokensSection) -> range:
    """Put `wanted` into `tokenizer` (transformers'); the ids that are new, one after another behind all others.

    A token that is there already stays as it is, with a note. Raises ConfigError where it would have to become a control token.
    """
    before = tokenizer.get_vocab()
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    problems: list[Problem] = []
    for token, is_special in wanted.written():
        if is_special and token in before and token not in special:
            came = f"{token!r} is in this tokenizer already, as ordinary text"
            problems.append(Problem("model.new_tokens.special", came, "a spelling of its own, or leave it out"))
        elif token in before:
            log.info("model.new_tokens: %r is in the tokenizer already (token %d)", token, before[token])
    if problems:
        raise ConfigError(problems)
    fresh = [(token, is_special) for token, is_special in wanted.written() if token not in before]
    for token, is_special in fresh:
        tokenizer.add_tokens([token], special_tokens=is_special)
    ids = [int(tokenizer.convert_tokens_to_ids(token)) for token, _ in fresh]
    if not ids:
        return range(0)
    new = range(ids[0], ids[0] + len(ids))
    if ids != list(new) or new.start <= max(before.values()):
        came = f"this tokenizer gives them the ids {ids[:5]}, and its own end with {max(before.values())}"
        raise ConfigError(Problem("model.new_tokens", came, "a tokenizer that puts new tokens behind its own"))
    return new
