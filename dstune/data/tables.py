"""CSV, Parquet and Arrow files, read row by row."""

import csv
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dstune.data.conversation import Refused
from dstune.data.json_stream import Record
from dstune.errors import DataError, Problem

_BATCH_ROWS = 256
_DELIMITERS = ",;\t|"


class _Lines:
    """A file's lines for the csv module: bytes that are not UTF-8 travel as surrogates, and no record outgrows `cap`."""

    def __init__(self, file: io.BufferedReader, name: str, cap: int) -> None:
        self.file = file
        self.name = name
        self.cap = cap
        self.line = 0
        self.held = 0

    def __iter__(self) -> Iterator[str]:
        while raw := self.file.readline(self.cap + 1):
            self.line += 1
            self.held += len(raw)
            if self.held > self.cap:
                came = f"a record above {self.cap} bytes ends on this line"
                raise DataError(Problem(f"{self.name}:{self.line}", came, do="is a closing quote missing above?"))
            if self.line == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            yield raw.decode("utf-8", "surrogateescape")


def read_csv(file: io.BufferedReader, name: str, cap: int, delimiter: str | None = None) -> Iterator[Record]:
    """A table whose first line names the columns; every cell is a string. Raises DataError where the table is broken."""
    lines = _Lines(file, name, cap)
    csv.field_size_limit(cap)
    delimiter = delimiter or _delimiter(file)
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        header = next(rows, None)
        if not header:
            raise DataError(Problem(name, "the file is empty", "a line with the columns' names"))
        twice = {column for column in header if header.count(column) > 1}
        if twice:
            raise DataError(Problem(f"{name}:1", f"column {min(twice)!r} stands twice", "each column once"))
        start = lines.line + 1
        for cells in rows:
            if cells:
                yield _row(start, header, cells)
            start, lines.held = lines.line + 1, 0
    except csv.Error as error:
        raise DataError(Problem(f"{name}:{lines.line}", str(error), "a table as RFC 4180 has it")) from None


def _delimiter(file: io.BufferedReader) -> str:
    """The most frequent of `, ; tab |` in the first line; a comma when there is none."""
    first = file.peek(1 << 16).partition(b"\n")[0].decode("utf-8", "replace")
    return max(_DELIMITERS, key=first.count)


def _row(line: int, header: list[str], cells: list[str]) -> Record:
    if len(cells) != len(header):
        detail = f"{len(cells)} cells under {len(header)} columns"
        return Record(line, None, Refused("wrong_number_of_cells", detail))
    for cell in cells:
        try:
            cell.encode("utf-8")
        except UnicodeEncodeError:
            return Record(line, None, Refused("invalid_utf8", f"in {cell.encode('utf-8', 'replace')[:60]!r}"))
    return Record(line, dict(zip(header, cells, strict=True)))


def read_parquet(path: Path, name: str) -> Iterator[Record]:
    """The rows of a Parquet file; nulls are absent keys. Raises DataError where the file is damaged."""
    try:
        with pq.ParquetFile(path) as file:
            yield from _rows(file.iter_batches(batch_size=_BATCH_ROWS))
    except (pa.ArrowException, OSError) as error:
        raise DataError(Problem(name, f"not a whole Parquet file: {_first_line(error)}", do="make it anew")) from None


def read_arrow(path: Path, name: str) -> Iterator[Record]:
    """The rows of an Arrow file or stream, such as `datasets` writes."""
    try:
        with pa.memory_map(str(path)) as source:
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            if is_file:
                reader = pa.ipc.open_file(source)
                yield from _rows(reader.get_batch(index) for index in range(reader.num_record_batches))
            else:
                yield from _rows(pa.ipc.open_stream(source))
    except (pa.ArrowException, OSError) as error:
        raise DataError(Problem(name, f"not a whole Arrow file: {_first_line(error)}", do="make it anew")) from None


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]


def _rows(batches: Iterable[pa.RecordBatch]) -> Iterator[Record]:
    line = 0
    for batch in batches:
        for index in range(batch.num_rows):
            line += 1
            yield _arrow_row(line, batch.slice(index, 1))


def _arrow_row(line: int, row: pa.RecordBatch) -> Record:
    try:
        value: dict[str, Any] = row.to_pylist()[0]
    except UnicodeDecodeError as error:
        return Record(line, None, Refused("invalid_utf8", str(error)))
    return Record(line, _without_nulls(value))


def _without_nulls(value: Any) -> Any:
    """Arrow gives every struct all keys that any row has: what is null was not there."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
