"""What a preparation has done so far, chunk by chunk, so that one that was killed goes on where it was.

Results are appended as they come and read back by the next preparation of the same identity, in place of doing the work again. A
process's death loses at most the entry that was being written: each carries its length and a checksum, and the first one that is not
whole ends the journal. Numbers and JSON only: nothing in it can be executed.
"""

import dataclasses
import json
import struct
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from dstune.data.block import Block
from dstune.data.conversation import Refused
from dstune.data.tally import FileTally
from dstune.data.work import Drop, Result
from dstune.loggers import get_logger

log = get_logger(__name__)

_FRAME = struct.Struct("<QII")
"""Bytes of the entry, of the JSON at its beginning, CRC-32 of the entry."""
_MAX_BYTES = 1 << 32
_KEPT_SECONDS = 7 * 24 * 3600
_SUFFIX = ".journal"


class Journal:
    """The results of one preparation's chunks, in order, in one file."""

    def __init__(self, path: Path) -> None:
        """Opens `path`, made if it is not there. Raises OSError."""
        self.path = path
        self._file: BinaryIO = path.open("r+b" if path.exists() else "w+b")

    def replay(self) -> Iterator[Result]:
        """Every result that was written whole; what stands behind them is cut off, and `add` goes on there."""
        while (result := self._next()) is not None:
            yield result
        self._file.truncate()

    def add(self, result: Result) -> None:
        """Append one result. Raises OSError (a full disk) as it comes."""
        head, arrays = _encoded(result)
        body = b"".join([head, *arrays])
        self._file.write(_FRAME.pack(len(body), len(head), zlib.crc32(body)) + body)
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _next(self) -> Result | None:
        start = self._file.tell()
        frame = self._file.read(_FRAME.size)
        if len(frame) == _FRAME.size:
            size, head, checksum = _FRAME.unpack(frame)
            body = self._file.read(size) if size < _MAX_BYTES else b""
            if len(body) == size and zlib.crc32(body) == checksum:
                return _decoded(body[:head], body[head:])
        self._file.seek(start)
        return None


def path_beside(final: Path, part: str) -> Path:
    """Where the journal of the directory `final` is kept; `part`: `examples` or `validation`."""
    return final.with_name(f".{final.name}.{part}{_SUFFIX}")


def remove_old(folder: Path) -> None:
    """Delete journals of preparations that nobody went on with for a week."""
    for path in folder.glob(f".*{_SUFFIX}"):
        try:
            if time.time() - path.stat().st_mtime > _KEPT_SECONDS:
                log.info("deleting %s, of a preparation that was given up", path)
                path.unlink()
        except FileNotFoundError:
            continue  # another process was faster


def _encoded(result: Result) -> tuple[bytes, list[bytes]]:
    block = result.block
    arrays: dict[str, npt.NDArray[Any]] = {
        **{field.name: getattr(block, field.name) for field in dataclasses.fields(block)},
        "records": result.records,
    }
    for name in ("digests", "signatures"):
        if (array := getattr(result, name)) is not None:
            arrays[name] = array
    tally = {name: value for name, value in vars(result.tally).items() if value}
    drops = [(drop.line, drop.part, drop.refused.reason, drop.refused.detail) for drop in result.drops]
    head = {
        "chunk": [result.file, result.num_records, result.last_line, result.last_parts],
        "tally": tally,
        "drops": drops,
        "arrays": [(name, array.dtype.str, array.shape) for name, array in arrays.items()],
    }
    text = json.dumps(head)  # ASCII: a lone surrogate in a detail stays what it is
    return text.encode("ascii"), [np.ascontiguousarray(array).tobytes() for array in arrays.values()]


def _decoded(head: bytes, rest: bytes) -> Result:
    entry: dict[str, Any] = json.loads(head)
    arrays: dict[str, npt.NDArray[Any]] = {}
    at = 0
    for name, kind, shape in entry["arrays"]:
        array = np.frombuffer(rest, dtype=kind, count=int(np.prod(shape)), offset=at).reshape(shape)
        arrays[name] = array.copy() if name == "parts" else array
        at += array.nbytes
    tally = FileTally("", 0, "", 0)
    for name, value in entry["tally"].items():
        setattr(tally, name, Counter(value) if isinstance(value, dict) else value)
    file, num_records, last_line, last_parts = entry["chunk"]
    return Result(
        file,
        num_records,
        tally,
        Block(*(arrays[field.name] for field in dataclasses.fields(Block))),
        arrays["records"],
        arrays.get("digests"),
        arrays.get("signatures"),
        [Drop(line, part, Refused(reason, detail)) for line, part, reason, detail in entry["drops"]],
        last_line,
        last_parts,
    )
