"""JSON Lines, JSON arrays and JSON objects one after another, read record by record: memory is bounded by the longest record."""

import io
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from dstune.data.conversation import Refused
from dstune.data.strict_json import parse, parse_object, string_end
from dstune.errors import DataError, Problem

_BLANK = b" \t\r\n"
_BOM = b"\xef\xbb\xbf"
_READ_BYTES = 1 << 18
_BLOCK_BYTES = 1 << 20
_STRUCTURE = re.compile(rb'["{}\[\],]')
_INSIDE = re.compile(rb'["{}\[\]]')
_NOT_BLANK = re.compile(rb"[^ \t\r\n]")


class Record(NamedTuple):
    """One record of a file, or why it is none."""

    line: int
    """Where it starts, from 1; a row's number in Parquet and Arrow."""
    value: dict[str, Any] | None
    error: Refused | None = None


class Lines(NamedTuple):
    """Whole lines of JSON Lines, not looked at yet."""

    line: int
    """The first one's number, from 1."""
    raw: bytes


def read_json(file: io.BufferedReader, name: str, cap: int, lines: bool) -> Iterator[Record | Lines]:
    """The records of an open JSON file; `lines` says that its name promises JSON Lines. What it holds decides.

    JSON Lines come as they stand, some at once, for `parse_lines`.
    A record above `cap` bytes is refused without being held. Raises DataError where the file as a whole is broken.
    """
    head = file.peek(_READ_BYTES)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(Problem(name, "the file is in UTF-16", "UTF-8", "convert it: iconv -f UTF-16 -t UTF-8"))
    if head.startswith(_BOM):
        file.read(len(_BOM))
        head = head[len(_BOM) :]
    start = head.lstrip(_BLANK)
    if not start and len(head) < _READ_BYTES:
        raise DataError(Problem(name, "the file is empty", "records", "remove it from `sources`, or make it anew"))
    if _is_lines(start, lines):
        yield from line_blocks(file, cap)
    elif start[:1] == b"[":
        yield from _parsed(_Elements(file, name, cap).array())
    elif start[:1] == b"{":
        yield from _parsed(_Elements(file, name, cap).sequence())
    else:
        came = start[:20].decode("utf-8", "replace")
        raise DataError(Problem(f"{name}:1", f"the file starts with {came!r}", "JSON: `[` or `{`"))


def _is_lines(start: bytes, promised: bool) -> bool:
    """Whether records stand one to a line. An array may follow a `.jsonl` name, and JSON Lines a `.json` one."""
    first, newline, rest = start.partition(b"\n")
    follows = rest.lstrip(_BLANK)[:1]
    if start[:1] == b"[":
        return bool(newline) and follows in (b"[", b"{") and _complete(first)
    if promised or start[:1] != b"{":
        return promised
    return not newline or follows == b"{" or _complete(first)


def _complete(line: bytes) -> bool:
    try:
        parse(line.strip(_BLANK))
    except Refused:
        return False
    return True


def line_blocks(file: io.BufferedReader, cap: int) -> Iterator[Record | Lines]:
    """JSON Lines in blocks of about a mebibyte that end with a line; where they end depends on the file alone."""
    line, held = 1, b""
    while True:
        more = file.read(_BLOCK_BYTES - len(held) if len(held) < _BLOCK_BYTES else _BLOCK_BYTES)
        block = held + more
        ends = block.rfind(b"\n") + 1 if more else len(block)
        if ends:
            yield Lines(line, block[:ends])
            line += block.count(b"\n", 0, ends)
        held = block[ends:]
        if not more:
            return
        if len(held) > cap:
            yield Record(line, None, _too_long(cap))
            while held and not held.endswith(b"\n"):
                held = file.readline(_READ_BYTES)
            line, held = line + 1, b""


def parse_lines(lines: Lines, cap: int) -> Iterator[Record]:
    """The records of a block; blank lines are passed over."""
    for number, raw in enumerate(lines.raw.split(b"\n"), lines.line):
        if len(raw) > cap:
            yield Record(number, None, _too_long(cap))
        elif raw.strip(_BLANK):
            yield _record(number, raw)


def _record(line: int, raw: bytes | None, cap: int = 0) -> Record:
    if raw is None:
        return Record(line, None, _too_long(cap))
    try:
        return Record(line, parse_object(raw.strip(_BLANK)))
    except Refused as error:
        return Record(line, None, error)


def _too_long(cap: int) -> Refused:
    return Refused("record_too_long", f"more than {cap} bytes (`data.max_record_bytes`)")


def _parsed(elements: Iterator[tuple[int, bytes | None, int]]) -> Iterator[Record]:
    for line, raw, cap in elements:
        yield _record(line, raw, cap)


class _Elements:
    """Cuts a stream into its elements by counting brackets outside strings; what is inside an element is the parser's business."""

    def __init__(self, file: io.BufferedReader, name: str, cap: int) -> None:
        self.file = file
        self.name = name
        self.cap = cap
        self.buffer = b""
        self.position = 0
        self.line = 1
        """The line of `position`."""

    def array(self) -> Iterator[tuple[int, bytes | None, int]]:
        """(line, bytes or None where too long, cap) of each element of `[…]`."""
        self._next_byte()
        self.position += 1
        opened = self.line
        byte = self._next_byte()
        while byte != b"]":
            if not byte:
                raise self._broken(
                    f"the array that starts on line {opened} is never closed", "`]`; the file is cut short"
                )
            yield self._element()
            byte = self._next_byte()
            if byte == b",":
                self.position += 1
                if (byte := self._next_byte()) == b"]":
                    raise self._broken("a comma before `]`", "a further record, or no comma")
            elif byte and byte != b"]":
                raise self._broken(f"{byte.decode('latin-1')!r} after a record", "`,` or `]`")
        self.position += 1
        if byte := self._next_byte():
            raise self._broken(f"{byte.decode('latin-1')!r} after the end of the array", "the end of the file")

    def sequence(self) -> Iterator[tuple[int, bytes | None, int]]:
        """The same for objects that follow each other, each over several lines."""
        while byte := self._next_byte():
            if byte != b"{":
                raise self._broken(f"{byte.decode('latin-1')!r} between two records", "`{`")
            yield self._element()

    def _broken(self, came: str, expected: str) -> DataError:
        return DataError(Problem(f"{self.name}:{self.line}", came, expected))

    def _next_byte(self) -> bytes:
        """The next byte that is not blank, not consumed; empty at the end."""
        while True:
            if found := _NOT_BLANK.search(self.buffer, self.position):
                self._move(found.start())
                return found.group()
            self._move(len(self.buffer))
            if not self._fill():
                return b""

    def _move(self, position: int) -> None:
        self.line += self.buffer.count(b"\n", self.position, position)
        self.position = position

    def _fill(self) -> bool:
        """Read more behind what is not consumed yet, twice as much each time, so that a long record costs linear time."""
        kept = self.buffer[self.position :]
        more = self.file.read(max(_READ_BYTES, min(len(kept), self.cap)))
        self.buffer, self.position = kept + more, 0
        return bool(more)

    def _element(self) -> tuple[int, bytes | None, int]:
        """Consume one element, which starts at `position`."""
        line, depth, at, string = self.line, 0, self.position, False
        dropped = False
        while True:
            at, depth, string, ended = self._scan(at, depth, string)
            if ended:
                break
            if at - self.position > self.cap:
                dropped = True
                self._move(at)
            consumed = at - self.position
            if not self._fill():
                self._move(len(self.buffer))
                raise self._broken(
                    f"the record that starts on line {line} is never closed", "`}`; the file is cut short"
                )
            at = self.position + consumed
        raw = self.buffer[self.position : at]
        dropped = dropped or len(raw) > self.cap
        self._move(at)
        return line, None if dropped else raw, self.cap

    def _scan(self, at: int, depth: int, string: bool) -> tuple[int, int, bool, bool]:
        """Go on from `at`: (where, depth, inside a string, whether the element has ended) at its end or the buffer's."""
        buffer = self.buffer
        while True:
            if string:
                ended = string_end(buffer, at)
                if ended < 0:
                    return self._safe_cut(at), depth, True, False
                at, string = ended, False
            found = (_INSIDE if depth else _STRUCTURE).search(buffer, at)
            if not found:
                return len(buffer), depth, False, False
            at, byte = found.end(), found.group()
            if byte == b'"':
                string = True
            elif byte in b"{[":
                depth += 1
            elif depth == 0:  # a comma or bracket after a bare value such as 3 or "text"
                return max(at - 1, self.position + 1), 0, False, True
            elif byte in b"}]":
                depth -= 1
                if depth == 0:
                    return at, 0, False, True

    def _safe_cut(self, at: int) -> int:
        """How far an unfinished string may be passed over: not between a backslash and what it escapes."""
        tail = self.buffer[at:]
        backslashes = len(tail) - len(tail.rstrip(b"\\"))
        return len(self.buffer) - backslashes % 2
