"""The files that a preparation reads: found, hashed before they are read, and not changed until they were."""

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dstune.config.schema import Source
from dstune.data.sources import SourceFile, Stamp, digest, expand, read, read_pieces
from dstune.data.tally import FileTally
from dstune.data.work import Chunk, chunks
from dstune.errors import DataError, Problem


@dataclass(frozen=True)
class Input:
    """One file of one source."""

    file: SourceFile
    source: int
    """Number of its source among those of the run file, from 0."""
    sha256: str
    bytes: int
    stamp: Stamp | None
    """None for generated data."""

    def tally(self) -> FileTally:
        """Counts that begin at zero."""
        return FileTally(self.file.name, self.source, self.sha256, self.bytes)


def find(sources: Sequence[Source], base: Path, max_record_bytes: int) -> list[Input]:
    """Every file of `sources`, in their order, with the hash of its bytes. Raises ConfigError, DataError."""
    found: list[Input] = []
    for number, source in enumerate(sources):
        try:
            found += [_input(file, number) for file in expand(source, base, max_record_bytes)]
        except OSError as error:
            where = str(error.filename or source.path)
            raise DataError(Problem(where, f"cannot be read: {error.strerror or error}")) from None
    return found


def _input(file: SourceFile, source: int) -> Input:
    if file.is_builtin:
        content, size = hashlib.sha256(), 0
        for record in read(file):
            line = (json.dumps(record.value, ensure_ascii=False) + "\n").encode()
            content.update(line)
            size += len(line)
        return Input(file, source, content.hexdigest(), size, None)
    stamp = file.stamp()
    return Input(file, source, digest(file), stamp.size, stamp)


def read_chunks(inputs: Sequence[Input]) -> Iterator[Chunk]:
    """All records, in order, up to each source's `limit`. Raises DataError for a file that changed since it was hashed."""
    left: dict[int, int | None] = {one.source: one.file.source.limit for one in inputs}
    for number, one in enumerate(inputs):
        limit = left[one.source]
        if limit is None:
            yield from chunks(number, one.file.source, read_pieces(one.file))
        else:
            for chunk in chunks(number, one.file.source, itertools.islice(read(one.file), limit)):
                limit -= len(chunk.records)
                yield chunk
        left[one.source] = limit
        require_unchanged(one)


def require_unchanged(one: Input) -> None:
    """Raises DataError where the file is not the one that was hashed."""
    if one.stamp is None:
        return
    try:
        same = one.file.stamp() == one.stamp
    except OSError:
        same = False
    if not same:
        raise DataError(
            Problem(one.file.name, "the file changed while it was read", do="Prepare again once it is whole.")
        )
