"""CSV, Parquet and Arrow files, read row by row."""

import csv
import io
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dstune.data.conversation import Refused
from dstune.data.json_stream import Record
from dstune.errors import DataError, Problem, first_line

_BATCH_ROWS = 256
_BATCH_BYTES = 1 << 20
_PAGE_BYTES = 1 << 20
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


def read_parquet(file: pa.NativeFile, name: str, cap: int) -> Iterator[Record]:
    """The rows of a Parquet file; nulls are absent keys. Raises DataError where the file is damaged.

    A column's pages are read as they are needed, and so many rows at a time as hold about a megabyte.
    """
    try:
        with pq.ParquetFile(file, buffer_size=_PAGE_BYTES, pre_buffer=False) as parquet:
            yield from _rows(_row_groups(parquet), name, cap)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _damaged(name, "Parquet", error) from None


def _row_groups(parquet: pq.ParquetFile) -> Iterator[pa.RecordBatch]:
    for number in range(parquet.num_row_groups):
        group = parquet.metadata.row_group(number)
        row_bytes = group.total_byte_size // max(1, group.num_rows)
        rows = min(_BATCH_ROWS, max(1, _BATCH_BYTES // max(1, row_bytes)))
        yield from parquet.iter_batches(batch_size=rows, row_groups=[number], use_threads=False)


def read_arrow(file: pa.NativeFile, is_file: bool, name: str, cap: int) -> Iterator[Record]:
    """The rows of an Arrow file (with random access) or else stream, such as `datasets` writes."""
    try:
        if is_file:
            reader = pa.ipc.open_file(file)
            yield from _rows((reader.get_batch(index) for index in range(reader.num_record_batches)), name, cap)
        else:
            yield from _rows(pa.ipc.open_stream(file), name, cap)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _damaged(name, "Arrow", error) from None


def _damaged(name: str, what: str, error: Exception) -> DataError:
    return DataError(Problem(name, f"not a whole {what} file: {first_line(error)}", do="make it anew"))


def _rows(batches: Iterable[pa.RecordBatch], name: str, cap: int) -> Iterator[Record]:
    line = 0
    for batch in batches:
        names = batch.schema.names
        if twice := {column for column in names if names.count(column) > 1}:
            raise DataError(Problem(name, f"column {min(twice)!r} stands twice", "each column once"))
        _validate(batch)
        for start in range(0, batch.num_rows, _BATCH_ROWS):
            piece = batch.slice(start, _BATCH_ROWS)
            yield from _values(piece, line + start, cap)
        line += batch.num_rows


def _validate(batch: pa.RecordBatch) -> None:
    """Raises ArrowInvalid where offsets point outside of what the file holds: pyarrow itself would read there.

    A plain column with bytes that are no UTF-8 passes: its rows are then refused one by one.
    """
    for column in batch.columns:
        try:
            column.validate(full=True)
        except pa.ArrowInvalid as error:
            if "UTF8" not in str(error) or pa.types.is_nested(column.type):
                raise


def _values(piece: pa.RecordBatch, line: int, cap: int) -> Iterator[Record]:
    """The rows of a piece of a table, whose first follows row `line`; one by one where something is wrong with one of them."""
    if piece.nbytes <= cap:
        try:
            values = piece.to_pylist()
        except (UnicodeDecodeError, ValueError):
            values = None
        if values is not None:
            for number, value in enumerate(values, start=line + 1):
                yield Record(number, _without_nulls(value))
            return
    for index in range(piece.num_rows):
        yield _arrow_row(line + index + 1, piece.slice(index, 1), cap)


def _arrow_row(line: int, row: pa.RecordBatch, cap: int) -> Record:
    if row.nbytes > cap:
        return Record(line, None, Refused("record_too_long", f"more than {cap} bytes (`data.max_record_bytes`)"))
    try:
        value: dict[str, Any] = row.to_pylist()[0]
    except UnicodeDecodeError as error:
        return Record(line, None, Refused("invalid_utf8", str(error)))
    except ValueError as error:  # a struct with two fields of one name, a date that no calendar has
        return Record(line, None, Refused("unreadable_cell", first_line(error)))
    return Record(line, _without_nulls(value))


def _without_nulls(value: Any) -> Any:
    """Arrow gives every struct all keys that any row has: what is null was not there."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
