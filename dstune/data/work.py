"""What a preparing process does: records to conversations to tokens, chunk by chunk. It decides nothing; refusals travel back."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from dstune.config.schema import Source
from dstune.data.conversation import Conversation, Example, Refused
from dstune.data.formats import to_conversations
from dstune.data.sources import Record
from dstune.data.tokenize import Encoder

OVERLONG = "overlong"
NO_TARGETS = "no_supervised_tokens"

CHUNK_RECORDS = 128
CHUNK_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Job:
    """What every process needs to know; the same for all chunks."""

    encoder: Encoder
    max_length: int
    truncate: bool
    """Cut what is longer, rather than refuse it."""


class Chunk(NamedTuple):
    """Some records of one file, in order."""

    file: int
    source: Source
    records: list[Record]


class Part(NamedTuple):
    """One conversation of a record: an example, or why it is none."""

    example: Example | None
    refused: Refused | None
    length: int
    """Tokens before any cut; 0 where it was refused before it had any."""


class Done(NamedTuple):
    """One record: its conversations, or why it has none."""

    line: int
    refused: Refused | None
    parts: list[Part]


class Result(NamedTuple):
    """A chunk's records, in order."""

    file: int
    records: list[Done]


def setup(job: Job) -> Callable[[Chunk], Result]:
    """The work of one process (`pool.map_in_order`)."""

    def work(chunk: Chunk) -> Result:
        opened = [_conversations(record, chunk.source) for record in chunk.records]
        every = [one for found in opened if isinstance(found, list) for one in found]
        encoded = iter(job.encoder.encode_batch(every))
        done: list[Done] = []
        for record, found in zip(chunk.records, opened, strict=True):
            if isinstance(found, Refused):
                done.append(Done(record.line, found, []))
            else:
                done.append(Done(record.line, None, [_part(next(encoded), job) for _ in found]))
        return Result(chunk.file, done)

    return work


def _conversations(record: Record, source: Source) -> list[Conversation] | Refused:
    if record.value is None:
        return record.error or Refused("unreadable")
    try:
        return to_conversations(record.value, source) or Refused("no_conversation", "the record holds none")
    except Refused as refused:
        return refused


def _part(encoded: Example | Refused, job: Job) -> Part:
    if isinstance(encoded, Refused):
        return Part(None, encoded, 0)
    length = len(encoded.input_ids)
    if length <= job.max_length:
        return Part(encoded, None, length)
    if not job.truncate:
        return Part(None, Refused(OVERLONG, f"{length} tokens, and max_length is {job.max_length}"), length)
    mask = encoded.loss_mask[: job.max_length].copy()
    if not mask.any():
        return Part(None, Refused(NO_TARGETS, f"none among the first {job.max_length} of {length} tokens"), length)
    ids = encoded.input_ids[: job.max_length].copy()
    return Part(Example(ids, mask, encoded.control_tokens_encoded, encoded.lossy_characters), None, length)


def chunks(file: int, source: Source, records: Iterable[Record]) -> Iterator[Chunk]:
    """The records of a file in pieces of bounded size: what is in flight between processes never grows with the data."""
    held: list[Record] = []
    characters = 0
    for record in records:
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
