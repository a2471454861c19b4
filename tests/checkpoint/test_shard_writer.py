"""A shard written from a copy or streamed is the same file; the disk's oddities change no byte."""

import errno
import os
from hashlib import sha256
from pathlib import Path

import pytest
import torch

from dstune.checkpoint import direct
from dstune.checkpoint.direct import HashedFile
from dstune.checkpoint.host_memory import HostMemory, available_bytes
from dstune.checkpoint.shard_writer import ShardWriter
from dstune.errors import CheckpointError
from dstune.protocols import Slice
from tests.checkpoint.sample import slices


def mixed() -> list[Slice]:
    """Pieces of several types, at places in the file that are no multiples of their elements' sizes."""
    odd = Slice("mask", "x", (3,), 0, torch.tensor([True, False, True]))
    return [odd, *slices(3), Slice("half", "y", (9,), 0, torch.arange(9).to(torch.bfloat16))]


def test_copied_and_streamed_are_the_same_bytes(tmp_path: Path) -> None:
    pieces = mixed()
    writer = ShardWriter(lambda: pieces)
    writer.copy()
    copied, streamed = writer.write(tmp_path / "a", 7), writer.stream(tmp_path / "b", 7)
    content = (tmp_path / "a").read_bytes()
    assert content == (tmp_path / "b").read_bytes()
    assert copied == streamed
    assert (copied.bytes, copied.sha256) == (len(content), sha256(content).hexdigest())
    assert copied.bytes == writer.num_bytes


def test_what_happens_after_the_copy_is_not_saved(tmp_path: Path) -> None:
    pieces = slices(1)
    writer = ShardWriter(lambda: pieces)
    before = writer.stream(tmp_path / "before", 1)
    writer.copy()
    for piece in pieces:
        piece.tensor.zero_()
    assert writer.write(tmp_path / "after", 1) == before
    writer.copy()
    assert writer.write(tmp_path / "zeros", 1).sha256 != before.sha256


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_copy_that_is_not_finite_is_refused_before_there_is_a_file(tmp_path: Path, value: float) -> None:
    pieces = slices(1)
    pieces[1].tensor[3] = value
    writer = ShardWriter(lambda: pieces)
    writer.copy()
    with pytest.raises(CheckpointError, match=r"fp32/norm.weight.*NaN or infinity"):
        writer.write(tmp_path / "a", 1)
    assert not (tmp_path / "a").exists()


def test_large_finite_numbers_are_finite(tmp_path: Path) -> None:
    pieces = [Slice("fp32", "x", (4,), 0, torch.full((4,), 3e38))]
    writer = ShardWriter(lambda: pieces)
    writer.copy()
    assert writer.write(tmp_path / "a", 1) == writer.stream(tmp_path / "b", 1)


def whole(path: Path, content: bytes) -> tuple[int, str]:
    memory = HostMemory(len(content))
    memory.tensor[: len(content)].numpy()[:] = memoryview(content)
    with HashedFile(path) as file:
        file.write(memory.view, len(content))
        record = file.finish()
    return record.bytes, record.sha256


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 3 * 8192, 3 * 8192 + 5])
def test_files_of_every_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(direct, "BLOCK_BYTES", 8192)
    content = os.urandom(size)
    assert whole(tmp_path / "a", content) == (size, sha256(content).hexdigest())
    assert (tmp_path / "a").read_bytes() == content


def test_a_disk_that_takes_a_part_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, block, at: real(file, block[:1000], at))
    content = os.urandom(10_000)
    assert whole(tmp_path / "a", content)[1] == sha256(content).hexdigest()
    assert (tmp_path / "a").read_bytes() == content


def test_without_direct_writes_it_goes_through_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_open, real_write = os.open, os.pwrite
    refused: list[str] = []

    def no_direct(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            refused.append(str(path))
            raise OSError(errno.EINVAL, "no O_DIRECT")
        return real_open(path, flags, mode)

    content = os.urandom(9_999)
    with monkeypatch.context() as patched:
        patched.setattr(os, "open", no_direct)
        assert whole(tmp_path / "a", content)[1] == sha256(content).hexdigest()
    assert refused and (tmp_path / "a").read_bytes() == content

    def refuses_once(file: int, block: memoryview, at: int) -> int:
        if len(refused) == 1:
            refused.append("write")
            raise OSError(errno.EINVAL, "not aligned as I want it")
        return real_write(file, block, at)

    monkeypatch.setattr(os, "pwrite", refuses_once)
    assert whole(tmp_path / "b", content)[1] == sha256(content).hexdigest()
    assert (tmp_path / "b").read_bytes() == content


def test_a_full_disk_is_an_error_with_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int, block: memoryview, at: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left") as caught:
        whole(tmp_path / "a", b"x" * 5000)
    assert caught.value.filename == str(tmp_path / "a")


def test_what_is_available_is_below_what_there_is() -> None:
    assert 0 < available_bytes() < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
