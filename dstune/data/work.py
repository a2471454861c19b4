"""What a preparing process does: records to conversations to tokens, chunk by chunk. It decides nothing; refusals travel back."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dstune.config.schema import DeduplicateSection, Source
from dstune.data.block import Block, block_of
from dstune.data.cleaning import Cleaner
from dstune.data.contamination import Contamination
from dstune.data.conversation import Conversation, Example, Refused
from dstune.data.duplicates import Digests, Signatures, as_digests, sketches
from dstune.data.formats import converter
from dstune.data.json_stream import Lines, parse_lines
from dstune.data.sources import Record
from dstune.data.tally import FileTally
from dstune.data.tokenize import Encoder
from dstune.data.turns_expand import expand

OVERLONG = "overlong"
NO_TARGETS = "no_supervised_tokens"

_APART = 0x9E3779B97F4A7C15
"""Odd: no two small numbers times it are alike in any half of 64 bits."""
CHUNK_RECORDS = 512
CHUNK_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Job:
    """What every process needs to know; the same for all chunks."""

    encoder: Encoder
    max_length: int
    overlong: str
    """What becomes of what is longer, as `data.overlong` says."""
    max_record_bytes: int
    expand: bool = False
    """One conversation for each answer."""
    cleaner: Cleaner | None = None
    contamination: Contamination | None = None
    duplicates: DeduplicateSection | None = None


class Chunk(NamedTuple):
    """Some records of one file, in order: parsed, or whole lines of JSON."""

    file: int
    source: Source
    records: list[Record] | Lines


class Drop(NamedTuple):
    """A record, or one of its conversations, that is left out."""

    line: int
    part: int | None
    """None: the record as a whole. Counted from 0 on its line, within the chunk."""
    refused: Refused


class Result(NamedTuple):
    """What became of one chunk."""

    file: int
    num_records: int
    tally: FileTally
    block: Block
    records: npt.NDArray[np.int64]
    """[examples] number of the record within the chunk, from 0."""
    digests: Digests | None
    """[examples, 2] where repetitions are dropped."""
    signatures: Signatures | None
    drops: list[Drop]
    last_line: int
    """Line of the last record, and how many parts were made on it."""
    last_parts: int


def setup(job: Job) -> Callable[[Chunk], Result]:
    """The work of one process (`pool.map_in_order`)."""
    return _Work(job)


class _Made(NamedTuple):
    """A conversation on its way."""

    record: int
    line: int
    part: int
    conversation: Conversation


class _Kept(NamedTuple):
    """An example of a conversation, or of a piece of a document."""

    made: _Made
    piece: int
    ids: npt.NDArray[np.int32]
    mask: npt.NDArray[np.bool_]


class _Work:
    def __init__(self, job: Job) -> None:
        self._job = job

    def __call__(self, chunk: Chunk) -> Result:
        """Raises ShortcutDiffers (`Encoder.encode_batch`)."""
        job, tally, drops = self._job, FileTally("", 0, "", 0), list[Drop]()
        records = chunk.records
        if isinstance(records, Lines):
            records = list(parse_lines(records, job.max_record_bytes))
        made, last_line, last_parts = self._conversations(records, chunk.source, tally, drops)
        made = self._clean(made, tally, drops)
        kept: list[_Kept] = []
        for one, encoded in zip(made, job.encoder.encode_batch([one.conversation for one in made]), strict=True):
            kept += self._taken(one, encoded, tally, drops)
        block = block_of(
            [one.ids for one in kept],
            [one.mask for one in kept],
            chunk.file,
            [one.made.line for one in kept],
            [one.made.part + one.piece for one in kept],
        )
        places = np.array([one.made.record for one in kept], dtype=np.int64)
        digests, signatures = self._sketched(kept)
        drops.sort(key=lambda drop: (drop.line, -1 if drop.part is None else drop.part))
        return Result(chunk.file, len(records), tally, block, places, digests, signatures, drops, last_line, last_parts)

    def _conversations(
        self, records: Sequence[Record], source: Source, tally: FileTally, drops: list[Drop]
    ) -> tuple[list[_Made], int, int]:
        """Every conversation of the records, and the last line with the number of parts on it."""
        made: list[_Made] = []
        convert = converter(source)
        last, parts = 0, 0
        for number, record in enumerate(records):
            parts = parts if record.line == last else 0
            last = record.line
            try:
                if record.value is None:
                    raise record.error or Refused("unreadable")
                found = convert(record.value)
                if not found:
                    raise Refused("no_conversation", "the record holds none")
            except Refused as refused:
                tally.records_dropped[refused.reason] += 1
                drops.append(Drop(last, parts or None, refused))
                parts += 1
                continue
            tally.records_used += 1
            for one in found:
                for conversation in self._expanded(one):
                    if isinstance(conversation, Refused):
                        tally.dropped[conversation.reason] += 1
                        drops.append(Drop(last, parts, conversation))
                    else:
                        made.append(_Made(number, last, parts, conversation))
                    parts += 1
        return made, last, parts

    def _expanded(self, one: Conversation | Refused) -> Sequence[Conversation | Refused]:
        if not self._job.expand or isinstance(one, Refused):
            return (one,)
        return expand(one, self._job.encoder.train_on)

    def _clean(self, made: list[_Made], tally: FileTally, drops: list[Drop]) -> list[_Made]:
        """What the cleaning steps and the comparison with evaluation data leave."""
        job = self._job
        if job.cleaner is not None:
            cleaned: list[_Made] = []
            for one in made:
                try:
                    after = job.cleaner.clean(one.conversation)
                except Refused as refused:
                    _drop(one, refused, tally, drops)
                    continue
                tally.cleaned.update(after.changed)
                tally.flagged.update(after.flagged)
                cleaned.append(one._replace(conversation=after.conversation))
            made = cleaned
        if job.contamination is None:
            return made
        found = job.contamination.check_all([one.conversation for one in made])
        for one, refused in zip(made, found, strict=True):
            if refused is not None:
                _drop(one, refused, tally, drops)
        return [one for one, refused in zip(made, found, strict=True) if refused is None]

    def _taken(self, one: _Made, encoded: Example | Refused, tally: FileTally, drops: list[Drop]) -> list[_Kept]:
        """The example, cut or split where it may be, counted; empty where it is dropped."""
        if isinstance(encoded, Refused):
            return _drop(one, encoded, tally, drops)
        length, most = len(encoded.input_ids), self._job.max_length
        tally.longest = max(tally.longest, length)
        ids, mask = encoded.input_ids, encoded.loss_mask
        if length <= most:
            kept = [_Kept(one, 0, ids, mask)]
        elif self._job.overlong == "split" and one.conversation.document:
            kept = _pieces(one, encoded, most)
            tally.split += 1
        elif self._job.overlong != "truncate":
            whole = "; only documents are split" if self._job.overlong == "split" else ""
            return _drop(one, Refused(OVERLONG, f"{length} tokens, and max_length is {most}{whole}"), tally, drops)
        elif not mask[:most].any():
            return _drop(one, Refused(NO_TARGETS, f"none among the first {most} of {length} tokens"), tally, drops)
        else:
            kept = [_Kept(one, 0, ids[:most], mask[:most])]
            tally.truncated += 1
        tally.kept += len(kept)
        tally.control_tokens_encoded += encoded.control_tokens_encoded
        tally.examples_with_control_tokens += encoded.control_tokens_encoded > 0
        tally.lossy_characters += encoded.lossy_characters
        tally.lossy_examples += encoded.lossy_characters > 0
        return kept

    def _sketched(self, kept: list[_Kept]) -> tuple[Digests | None, Signatures | None]:
        settings = self._job.duplicates
        if settings is None:
            return None, None
        made = sketches([one.made.conversation for one in kept], settings) if kept else []
        signatures = [one.signature for one in made if one.signature is not None]
        digests = as_digests(b"".join(one.exact for one in made)).copy()
        # The pieces of one document repeat those of another, each its own, and not each other.
        apart = np.array([one.piece for one in kept], dtype=np.uint64) * np.uint64(_APART)
        digests[:, 0] ^= apart
        if not signatures:
            return digests, None
        return digests, np.stack(signatures) ^ (apart & np.uint64(0xFFFFFFFF)).astype(np.uint32)[:, None]


def _pieces(one: _Made, encoded: Example, most: int) -> list[_Kept]:
    """A document in examples of at most `most` tokens, each but the last full; none predicts its first token."""
    pieces: list[_Kept] = []
    for number, first in enumerate(range(0, len(encoded.input_ids), most)):
        mask = encoded.loss_mask[first : first + most].copy()
        mask[0] = False
        if mask.any():  # a last piece of one token has nothing to learn
            pieces.append(_Kept(one, number, encoded.input_ids[first : first + most], mask))
    return pieces


def _drop(one: _Made, refused: Refused, tally: FileTally, drops: list[Drop]) -> list[_Kept]:
    tally.dropped[refused.reason] += 1
    drops.append(Drop(one.line, one.part, refused))
    return []


def chunks(file: int, source: Source, records: Iterable[Record | Lines]) -> Iterator[Chunk]:
    """The records of a file in pieces of bounded size: what is in flight between processes never grows with the data."""
    held: list[Record] = []
    characters = 0
    for record in records:
        if isinstance(record, Lines):
            yield Chunk(file, source, record)
            continue
        held.append(record)
        characters += _characters(record.value)
        if len(held) >= CHUNK_RECORDS or characters >= CHUNK_CHARACTERS:
            yield Chunk(file, source, held)
            held, characters = [], 0
    if held:
        yield Chunk(file, source, held)


def _characters(value: Any) -> int:
    """About how large a record is."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(_characters(item) for item in value.values())  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, list | tuple):
        return sum(_characters(item) for item in value)  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, np.ndarray):
        return value.size
    return 8
