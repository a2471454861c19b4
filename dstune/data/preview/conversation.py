"""Conversations as HTML: a span for each token, as long as the page has room; else runs of text; else their two ends alone."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from dstune.data.preview.text import Marked, Piece, many, pieces, visible
from dstune.data.shards import Prepared, StoredExample

PAGE_BYTES = 3 << 20
"""Of all conversations together."""
_MOST_TOKENS = 100_000
"""Of one conversation; of a longer one only the ends are decoded."""
_TEASER_CHARACTERS = 90
_BLANKS = str.maketrans({" ": "␣", "\n": "↵", "\t": "⇥"})


@dataclass(frozen=True)
class Conversation:
    """One example, ready for the page."""

    number: int
    why: Sequence[str]
    """Why it is shown."""
    origin: str
    num_tokens: int
    num_trained: int
    num_control: int
    spells: Sequence[str]
    """Control tokens that stand in it as ordinary text."""
    teaser: str
    """How its first trained text begins."""
    body: Markup
    note: str
    """What is not shown, and empty where everything is."""


def conversations(
    prepared: Prepared, tokenizer: Any, marked: Marked, why: dict[int, list[str]], room: int = PAGE_BYTES
) -> list[Conversation]:
    """The examples of `why`, in its order, in about `room` bytes. The shortest come first to it: what they leave is for others."""
    lengths = {number: len(prepared.example(number).input_ids) for number in why}
    made: dict[int, Conversation] = {}
    for left, number in zip(range(len(why), 0, -1), sorted(why, key=lengths.__getitem__), strict=True):
        made[number] = _conversation(prepared, tokenizer, marked, number, why[number], room // left)
        room -= len(made[number].body)
    return [made[number] for number in why]


def _conversation(
    prepared: Prepared, tokenizer: Any, marked: Marked, number: int, why: Sequence[str], room: int
) -> Conversation:
    example = prepared.example(number)
    head, tail = _decoded(tokenizer, example)
    body, note = _fitted(head, tail, example, marked, room)
    return Conversation(
        number=number,
        why=why,
        origin=prepared.origin(number),
        num_tokens=len(example.input_ids),
        num_trained=int(example.loss_mask.sum()),
        num_control=int(np.isin(example.input_ids, list(marked.control)).sum()),
        spells=sorted({name for piece in (head, tail) for name in _spelled(piece, marked)}),
        teaser=_teaser(head, marked),
        body=body,
        note=note,
    )


def _decoded(tokenizer: Any, example: StoredExample) -> tuple[list[Piece], list[Piece]]:
    """All pieces, and none; or those of the two ends."""
    ids, mask = example.input_ids, example.loss_mask
    if len(ids) <= _MOST_TOKENS:
        return list(pieces(tokenizer, ids, mask)), []
    half = _MOST_TOKENS // 2
    return list(pieces(tokenizer, ids[:half], mask[:half])), list(pieces(tokenizer, ids[-half:], mask[-half:]))


def _fitted(
    head: list[Piece], tail: list[Piece], example: StoredExample, marked: Marked, room: int
) -> tuple[Markup, str]:
    """The conversation in at most about `room` characters, and what that leaves out."""
    if not tail:
        body = _markup(head, marked, by_token=True)
        if len(body) <= room:
            return body, ""
        body = _markup(head, marked, by_token=False)
        if len(body) <= room:
            return body, "too long to show the tokens one by one"
    head, tail = _within(head, room // 2), _within((tail or head)[::-1], room // 2)[::-1]
    first, last = _num_tokens(head), len(example.input_ids) - _num_tokens(tail)
    trained = int(example.loss_mask[first:last].sum())
    gap = f"… {many(last - first, 'token')} not shown, {trained:,} of them trained …"
    body = _markup(head, marked, by_token=False) + Markup('<b class="gap">{}</b>').format(gap)
    return body + _markup(tail, marked, by_token=False), "too long to show whole"


def _num_tokens(found: Iterable[Piece]) -> int:
    return sum(len(piece.ids) for piece in found)


def _within(found: Sequence[Piece], room: int) -> list[Piece]:
    """As many of the first pieces as have about `room` characters on the page."""
    sizes = accumulate(len(_shown(piece)) + 2 for piece in found)
    return [piece for piece, size in zip(found, sizes, strict=True) if size <= room]


def _markup(found: Iterable[Piece], marked: Marked, by_token: bool) -> Markup:
    """Markup by hand: every text in it comes from `_shown`, or is escaped as an attribute in `_span`."""
    parts: list[str] = []
    for trained, run in groupby(found, lambda piece: piece.trained):
        texts = "".join((_spans if by_token else _runs)(run, marked))
        parts.append(f"<mark>{texts}</mark>" if trained else texts)
    return Markup("".join(parts))


def _spans(run: Iterable[Piece], marked: Marked) -> Iterator[str]:
    return (_span(piece, _classes(piece, marked)) for piece in run)


def _runs(run: Iterable[Piece], marked: Marked) -> Iterator[str]:
    """Marked tokens by themselves, the others joined."""
    for special, group in groupby(run, lambda piece: _is_marked(piece, marked)):
        if special:
            yield from (_span(piece, _classes(piece, marked)) for piece in group)
        else:
            yield "".join(map(_shown, group))


def _span(piece: Piece, classes: str) -> str:
    numbers = "+".join(map(str, piece.ids))
    title = escape(f"{numbers} {visible(piece.text).translate(_BLANKS)}")
    named = f' class="{classes}"' if classes else ""
    return f'<i{named} title="{title}">{_shown(piece)}</i>'


def _shown(piece: Piece) -> str:
    """The text as HTML. What is spelled, because it cannot be seen, stands in an element of its own."""
    if (spelled := visible(piece.text)) == piece.text:
        return str(escape(spelled))
    runs = groupby(piece.text, lambda character: visible(character) == character)
    return "".join(_spelling(visible("".join(run)), shows) for shows, run in runs)


def _spelling(text: str, shows: bool) -> str:
    return str(escape(text)) if shows else f"<u>{escape(text)}</u>"


def _is_marked(piece: Piece, marked: Marked) -> bool:
    return any(number in marked.control or number == marked.unknown for number in piece.ids)


def _classes(piece: Piece, marked: Marked) -> str:
    """c: control token; u: unknown; n: holds a line's end; e: without text; g: several tokens."""
    found = {
        "c": not marked.control.keys().isdisjoint(piece.ids),
        "u": marked.unknown in piece.ids,
        "n": "\n" in piece.text,
        "e": not piece.text,
        "g": len(piece.ids) > 1,
    }
    return " ".join(name for name, holds in found.items() if holds)


def _spelled(found: Sequence[Piece], marked: Marked) -> Iterator[str]:
    for special, group in groupby(found, lambda piece: _is_marked(piece, marked)):
        if not special:
            yield from marked.spelled("".join(piece.text for piece in group))


def _teaser(found: Iterable[Piece], marked: Marked) -> str:
    text = ""
    for piece in found:
        if piece.trained and not _is_marked(piece, marked):
            text += piece.text
        if len(text) > _TEASER_CHARACTERS:
            return " ".join(text.split())[:_TEASER_CHARACTERS] + "…"
    return " ".join(text.split())
