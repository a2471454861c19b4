"""Blocks' hashes: what is read is checked while it is read, a change is placed, and checkpoints without them are read as before."""

import hashlib
import json
import os
import random
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dstune.atomic import dump_json
from dstune.checkpoint import blocks, checking, layout
from dstune.checkpoint.audit import audit, check
from dstune.checkpoint.blocks import BlockHasher, Blocks, block_bytes_for
from dstune.checkpoint.checking import Changed, checked
from dstune.checkpoint.hashing import Unreadable
from dstune.checkpoint.header import parse
from dstune.checkpoint.layout import FileRecord, load_manifest
from dstune.checkpoint.reader import Reader
from dstune.checkpoint.resolve import newest_whole, verify
from dstune.checkpoint.shard_writer import write_shard
from dstune.checkpoint.shards import OpenShard, read_header
from dstune.errors import DamagedCheckpoint
from dstune.paths import CheckpointPaths, step_directory
from dstune.protocols import Slice
from tests.checkpoint.sample import at, commit

_BLOCK = 4096


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for room in (blocks, layout):
        monkeypatch.setattr(room, "MIN_BLOCK_BYTES", _BLOCK)


def _flip(path: Path, byte: int) -> None:
    with path.open("r+b") as file:
        file.seek(byte)
        (before,) = file.read(1)
        file.seek(byte)
        file.write(bytes([before ^ 4]))


def _record(content: bytes) -> FileRecord:
    hasher = BlockHasher(_BLOCK)
    hasher.update(memoryview(content))
    return FileRecord(len(content), hashlib.sha256(content).hexdigest(), _BLOCK, hasher.finish())


def test_the_length_of_blocks_keeps_manifests_small() -> None:
    sizes = [0, 1 << 20, 1 << 30, (1 << 30) + 1, 100 << 30]
    assert [block_bytes_for(size) >> 10 for size in sizes] == [256, 256, 256, 512, 32 << 10]
    assert all(size <= 4096 * block_bytes_for(size) for size in sizes)


def test_the_hashes_do_not_depend_on_how_the_bytes_come() -> None:
    content = random.Random(1).randbytes(3 * _BLOCK + 17)
    expected = _record(content).block_hashes
    assert len(expected) == 4 * 16 and len({expected[at : at + 16] for at in range(0, 64, 16)}) == 4
    for step in (1000, _BLOCK, 5000, len(content)):
        hasher = BlockHasher(_BLOCK)
        for first in range(0, len(content), step):
            hasher.update(memoryview(content)[first : first + step])
        assert hasher.finish() == expected


@pytest.mark.parametrize("past_cache", [True, False])
def test_changes_are_placed_in_files_of_every_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, past_cache: bool
) -> None:
    for name in ("_CACHED_READ_BYTES", "_DIRECT_READ_BYTES"):
        monkeypatch.setattr(checking, name, 8192)
    monkeypatch.setattr(checking, "_TASK_BYTES", 3 * _BLOCK)
    files: list[tuple[Path, FileRecord]] = []
    for length in (0, 1, _BLOCK, _BLOCK + 1, 10 * _BLOCK, 100_001):
        path, content = tmp_path / str(length), random.Random(length).randbytes(length)
        path.write_bytes(content)
        files.append((path, _record(content)))
    plain = tmp_path / "plain"
    plain.write_bytes(b"x" * 99)
    files.append((plain, FileRecord(99, hashlib.sha256(b"x" * 99).hexdigest())))
    counts: list[int] = []
    assert list(checked(files, past_cache=past_cache, on_bytes=counts.append)) == [None] * len(files)
    assert sum(counts) == sum(record.bytes for _, record in files)
    _flip(files[4][0], 3 * _BLOCK)
    _flip(files[4][0], 9 * _BLOCK + 5)
    _flip(files[5][0], 100_000)
    _flip(plain, 4)
    found = list(checked([*files, (tmp_path / "none", files[4][1])], past_cache=past_cache))
    assert found[:4] == [None] * 4
    assert found[4] == Changed(((3 * _BLOCK, 4 * _BLOCK), (9 * _BLOCK, 10 * _BLOCK)))
    assert found[5] == Changed(((24 * _BLOCK, 100_001),))
    assert found[6] == Changed() and isinstance(found[7], Unreadable)


def _shard(tmp_path: Path) -> tuple[Path, FileRecord, list[Slice]]:
    pieces = [
        Slice("fp32", name, (5000,), 0, torch.randn(length)) for name, length in (("a", 3000), ("b", 7), ("c", 4999))
    ]
    path = tmp_path / "shard"
    return path, write_shard(path, pieces, 1), pieces


@pytest.mark.usefixtures("small_blocks")
def test_any_range_comes_as_it_was_written(tmp_path: Path) -> None:
    path, record, pieces = _shard(tmp_path)
    assert record.block_bytes == _BLOCK and record.bytes > 8 * _BLOCK
    shard, draw = OpenShard(path, Blocks(record)), random.Random(3)
    shard.check_header()
    for stored, piece in list(zip(read_header(path), pieces, strict=True)) * 40:
        start = draw.randrange(piece.tensor.numel() + 1)
        stop = draw.randrange(start, piece.tensor.numel() + 1)
        out = torch.empty(stop - start, dtype=draw.choice([torch.float32, torch.float64]))
        shard.copy(stored, start, out)
        assert torch.equal(out, piece.tensor[start:stop].to(out.dtype))


@pytest.mark.usefixtures("small_blocks")
def test_no_damaged_byte_is_given_and_whole_blocks_are(tmp_path: Path) -> None:
    path, record, pieces = _shard(tmp_path)
    stored = read_header(path)
    for byte in (stored[0].first_byte, stored[0].first_byte + 5000, record.bytes - 1):
        _flip(path, byte)
        shard, damaged = OpenShard(path, Blocks(record)), byte // _BLOCK
        for piece, kept in zip(stored, pieces, strict=True):
            for start in range(0, piece.entry.length, 101):
                out = torch.empty(min(101, piece.entry.length - start))
                first = piece.first_byte + 4 * start
                if first // _BLOCK <= damaged <= (first + out.nbytes - 1) // _BLOCK:
                    with pytest.raises(DamagedCheckpoint, match=rf"shard: is damaged: byte {damaged * _BLOCK} to"):
                        shard.copy(piece, start, out)
                else:
                    shard.copy(piece, start, out)
                    assert torch.equal(out, kept.tensor[start : start + 101])
        _flip(path, byte)


@pytest.mark.usefixtures("small_blocks")
def test_a_header_is_checked_before_it_is_believed(tmp_path: Path) -> None:
    commit(tmp_path, 1)
    path = CheckpointPaths(step_directory(tmp_path, 1)).shard(0, 1)
    for byte in (0, 7, 100):
        _flip(path, byte)
        with pytest.raises(DamagedCheckpoint):
            Reader(step_directory(tmp_path, 1))
        _flip(path, byte)
    Reader(step_directory(tmp_path, 1))
    state = step_directory(tmp_path, 1) / "state.json"
    state.write_bytes(state.read_bytes().replace(b"1", b"2"))
    with pytest.raises(DamagedCheckpoint, match=r"state\.json"):
        _ = Reader(step_directory(tmp_path, 1)).state


def test_workers_are_left_what_they_check_and_no_more(tmp_path: Path) -> None:
    commit(tmp_path, 1)
    shard = CheckpointPaths(step_directory(tmp_path, 1)).shard(0, 1)
    _flip(shard, shard.stat().st_size - 1)
    assert verify(at(tmp_path, 1)) and not verify(at(tmp_path, 1), blocks=False)
    _flip(shard.with_name("state.json"), 3)
    assert verify(at(tmp_path, 1), blocks=False) == ["state.json: its SHA-256 is not the manifest's"]
    os.truncate(shard, 100)
    assert "shard-00000" in verify(at(tmp_path, 1), blocks=False)[0]


@pytest.mark.usefixtures("small_blocks")
def test_a_changed_byte_is_placed_in_its_parameter(tmp_path: Path) -> None:
    from dstune.checkpoint.commit import save
    from tests.checkpoint.sample import Alone

    pieces = [Slice(state, name, (4000,), 0, torch.randn(4000)) for state in ("fp32", "exp_avg") for name in ("a", "b")]
    save(tmp_path, 1, pieces, {}, Alone(), {})
    directory = step_directory(tmp_path, 1)
    path = CheckpointPaths(directory).shard(0, 1)
    piece = next(one for one in parse(path).slices if (one.entry.state, one.entry.name) == ("exp_avg", "a"))
    with path.open("r+b") as file:
        file.seek(piece.first_byte + 8000)
        file.write(struct.pack("<f", 0.5))
    for look in (check(directory), *audit([directory])):
        (finding,) = look.findings
        assert {(part.state, part.name) for part in finding.lost} == {("exp_avg", "a")}
        assert finding.lost[0].first <= 2000 < finding.lost[0].last <= 2000 + 2 * _BLOCK // 4
        assert "its SHA-256 is not the manifest's; it was changed between byte" in str(finding)


def test_checkpoints_without_blocks_are_read_and_verified_as_before(tmp_path: Path) -> None:
    for step in (1, 2):
        commit(tmp_path, step)
        _forget_blocks(step_directory(tmp_path, step))
    assert newest_whole(tmp_path) == (at(tmp_path, 2), [])
    assert Reader(step_directory(tmp_path, 2)).state == {"step": 2}
    shard = CheckpointPaths(step_directory(tmp_path, 2)).shard(0, 1)
    _flip(shard, shard.stat().st_size - 1)
    assert "its SHA-256" in verify(at(tmp_path, 2))[0] and "its SHA-256" in verify(at(tmp_path, 2), blocks=False)[0]


def _forget_blocks(directory: Path) -> None:
    """The manifest as it was before there were blocks."""
    manifest = load_manifest(directory)
    files = {name: replace(record, block_bytes=0, block_hashes="") for name, record in manifest.files.items()}
    content = json.loads(replace(manifest, files=files).dump())
    for record in content["files"].values():
        del record["block_bytes"], record["block_hashes"]
    del content["sha256"]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (directory / "manifest.json").write_text(dump_json(content | {"sha256": digest}))
