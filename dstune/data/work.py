"""What a preparing process does: records to conversations to tokens, chunk by chunk. It decides nothing; refusals travel back."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dstune.config.schema import DataSection, ModelSection, Source
from dstune.data.conversation import Conversation, Example, Refused
from dstune.data.formats import to_conversations
from dstune.data.sources import Record
from dstune.data.templates import resolve_template
from dstune.data.tokenize import Encoder, load_tokenizer

OVERLONG = "overlong"
NO_TARGETS = "no_supervised_tokens"

CHUNK_RECORDS = 128
CHUNK_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Job:
    """What every process needs to know; the same for all chunks."""

    model: ModelSection
    data: DataSection
    base: Path
    """The run file's directory."""
    seq2seq: bool


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


def make_encoder(job: Job) -> Encoder:
    """The tokenizer and template of a run. Raises ConfigError, DataError where they cannot do what the run asks."""
    tokenizer = load_tokenizer(job.model, job.base)
    template = resolve_template(job.data.template, tokenizer, job.base, job.seq2seq)
    data = job.data
    return Encoder(tokenizer, template, data.train_on, data.control_tokens, data.lossy_text, job.seq2seq)


def setup(job: Job) -> Callable[[Chunk], Result]:
    """The work of one process (`pool.map_in_order`)."""
    encoder = make_encoder(job)

    def work(chunk: Chunk) -> Result:
        return Result(chunk.file, [_record(record, chunk.source, encoder, job.data) for record in chunk.records])

    return work


def _record(record: Record, source: Source, encoder: Encoder, data: DataSection) -> Done:
    if record.value is None:
        return Done(record.line, record.error or Refused("unreadable"), [])
    try:
        conversations = to_conversations(record.value, source)
    except Refused as refused:
        return Done(record.line, refused, [])
    if not conversations:
        return Done(record.line, Refused("no_conversation", "the record holds none"), [])
    return Done(record.line, None, [_part(conversation, encoder, data) for conversation in conversations])


def _part(conversation: Conversation, encoder: Encoder, data: DataSection) -> Part:
    try:
        example = encoder.encode(conversation)
    except Refused as refused:
        return Part(None, refused, 0)
    length = len(example.input_ids)
    if length <= data.max_length:
        return Part(example, None, length)
    if data.overlong != "truncate":
        return Part(None, Refused(OVERLONG, f"{length} tokens, and max_length is {data.max_length}"), length)
    mask = example.loss_mask[: data.max_length].copy()
    if not mask.any():
        return Part(None, Refused(NO_TARGETS, f"none among the first {data.max_length} of {length} tokens"), length)
    ids = example.input_ids[: data.max_length].copy()
    return Part(Example(ids, mask, example.control_tokens_encoded, example.lossy_characters), None, length)


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
