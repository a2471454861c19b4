"""Files are hashed as they are on the disk, whatever their length, and what cannot be read is an answer."""

import hashlib
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from dstune.checkpoint import hashing
from dstune.checkpoint.hashing import Unreadable, hashed
from dstune.checkpoint.layout import FileRecord

_LENGTHS = (0, 1, 4095, 4096, 4097, 65536, 65537, 300_001)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "_BLOCK_BYTES", 65536)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / str(length) for length in _LENGTHS]
    for path in paths:
        path.write_bytes(random.Random(path.name).randbytes(int(path.name)))
    return paths


def _right(path: Path) -> FileRecord:
    content = path.read_bytes()
    return FileRecord(len(content), hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize("past_cache", [True, False])
def test_every_length_in_the_order_asked(files: list[Path], past_cache: bool) -> None:
    counts: list[int] = []
    assert list(hashed(files, past_cache=past_cache, on_bytes=counts.append)) == [_right(path) for path in files]
    assert sum(counts) == sum(_LENGTHS)


def test_a_file_system_without_direct_reads(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path: str, flags: int, *mode: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(path, flags, *mode)

    monkeypatch.setattr(os, "open", refuse)
    assert list(hashed(files, past_cache=True)) == [_right(path) for path in files]


def test_reads_that_come_in_odd_pieces(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv

    def some(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        return min(real(descriptor, buffers, offset), 5000)

    monkeypatch.setattr(os, "preadv", some)
    assert list(hashed(files, past_cache=True)) == [_right(path) for path in files]


def test_what_cannot_be_read_is_named_with_its_place(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv

    def broken(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if offset == 131072:
            raise OSError(5, "Input/output error")
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", broken)
    *others, last, missing = hashed([*files, files[0].parent / "none"], past_cache=True)
    assert others == [_right(path) for path in files[:-1]]
    assert last == Unreadable("Input/output error", 131072, 196608)
    assert missing == Unreadable("No such file or directory")


def test_nobody_waits_for_files_that_nobody_wants(files: list[Path]) -> None:
    counts: list[int] = []
    contents: Iterator[FileRecord | Unreadable] = hashed(
        [files[1], *[files[-1]] * 500], past_cache=False, on_bytes=counts.append
    )
    next(contents)
    contents.close()
    assert sum(counts) < 500 * _LENGTHS[-1]
