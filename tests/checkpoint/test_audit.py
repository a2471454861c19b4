"""Damage is told with the file, the worker whose shard it is, and the parameters that lie in it where that can be known."""

import json
import math
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from dstune.checkpoint import hashing
from dstune.checkpoint.audit import Finding, audit, glance
from dstune.checkpoint.header import HeaderSlice, parse
from dstune.checkpoint.layout import Part, SliceEntry, gaps
from dstune.paths import step_directory
from tests.checkpoint.sample import SHAPES

_SECOND = "shard-00001-of-00003.safetensors"


def _found(checkpoints: Path) -> tuple[Finding, ...]:
    (one,) = audit([step_directory(checkpoints, 2)], past_cache=True)
    return one.findings


def _piece(checkpoints: Path, state: str, name: str) -> tuple[Path, HeaderSlice]:
    path = step_directory(checkpoints, 2) / _SECOND
    pieces = parse(path).slices
    return path, next(piece for piece in pieces if (piece.entry.state, piece.entry.name) == (state, name))


def _overwrite(path: Path, at: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(content)


def test_what_a_cut_shard_lost(checkpoints: Path) -> None:
    path, piece = _piece(checkpoints, "exp_avg", "embed.weight")
    os.truncate(path, piece.first_byte + 4 * 10 + 1)
    (finding,) = _found(checkpoints)
    assert (finding.file, finding.kind, finding.worker) == (_SECOND, "size", 1)
    assert finding.lost[0] == Part("exp_avg", "embed.weight", piece.entry.offset + 10, 2 * piece.entry.length)
    assert {part.name for part in finding.lost} == {"embed.weight", "norm.weight"}, "what comes behind it is gone too"
    assert f"{_SECOND} (worker 1): " in str(finding) and "lost: exp_avg/embed.weight[144:268]" in str(finding)


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: _overwrite(path, 0, b"\xff" * 200)])
def test_what_is_in_no_other_shard_is_lost_with_this_one(checkpoints: Path, damage: Callable[[Path], None]) -> None:
    damage(step_directory(checkpoints, 2) / _SECOND)
    (finding,) = _found(checkpoints)
    assert finding.worker == 1 and finding.kind in ("missing", "changed")
    expected = {
        (state, name, -(-math.prod(SHAPES[name]) // 3))
        for state in ("fp32", "exp_avg")
        for name in ("embed.weight", "norm.weight")
    }
    assert {(part.state, part.name, part.first) for part in finding.lost} == expected


def test_a_number_that_is_not_finite_shows_where_it_was_changed(checkpoints: Path) -> None:
    path, piece = _piece(checkpoints, "fp32", "embed.weight")
    _overwrite(path, piece.first_byte + 4 * 7, struct.pack("<f", math.nan))
    _overwrite(path, piece.first_byte + 4 * 9, struct.pack("<f", math.inf))
    (finding,) = _found(checkpoints)
    first = piece.entry.offset
    assert finding.lost == (Part("fp32", "embed.weight", first + 7, first + 10),)
    assert "not finite" in finding.message


def test_what_cannot_be_told_is_said_so(checkpoints: Path) -> None:
    path, piece = _piece(checkpoints, "fp32", "embed.weight")
    _overwrite(path, piece.first_byte, struct.pack("<f", 0.5))
    (finding,) = _found(checkpoints)
    assert finding.lost == () and "its SHA-256 is not the manifest's; which of its 4 pieces" in finding.message


def test_a_shard_of_another_step_is_known_by_its_header(checkpoints: Path) -> None:
    shutil.copy(step_directory(checkpoints, 1) / _SECOND, step_directory(checkpoints, 2) / _SECOND)
    (finding,) = _found(checkpoints)
    assert "its header says step 1" in finding.message and len(finding.lost) == 4


def test_what_a_bad_sector_holds(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, piece = _piece(checkpoints, "exp_avg", "norm.weight")
    monkeypatch.setattr(hashing, "_BLOCK_BYTES", 4096)
    real, inode = os.preadv, path.stat().st_ino
    bad = piece.first_byte // 4096 * 4096

    def broken(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if os.fstat(descriptor).st_ino == inode and offset == bad:
            raise OSError(5, "Input/output error")
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", broken)
    (finding,) = _found(checkpoints)
    assert (finding.kind, finding.worker) == ("unreadable", 1) and "Input/output error" in finding.message
    assert "norm.weight" in {part.name for part in finding.lost}


def test_no_damage_of_a_header_brings_the_search_down(checkpoints: Path) -> None:
    path = step_directory(checkpoints, 2) / _SECOND
    content = path.read_bytes()
    for old, new in (
        (b'"offset', b'"0ffset'),
        (b"F32", b"F99"),
        (b"[50, 8]", b"[50, 9]"),
        (b'\\"offset\\": 1', b'\\"offset\\": 9'),
    ):
        assert old in content
        path.write_bytes(content.replace(old, new))
        (finding,) = _found(checkpoints)
        assert finding.kind == "changed" and "its header is damaged too" in finding.message and finding.lost
    path.write_bytes(content)
    assert _found(checkpoints) == ()


def test_several_at_once_come_in_their_order(checkpoints: Path) -> None:
    (step_directory(checkpoints, 1) / "state.json").unlink()
    directories = [step_directory(checkpoints, step) for step in (2, 1, 2)]
    looks = list(audit(directories))
    assert [look.directory for look in looks] == directories
    assert [[str(finding) for finding in look.findings] for look in looks] == [[], ["state.json: is missing"], []]


def test_a_glance_sees_names_and_sizes_but_not_bytes(checkpoints: Path) -> None:
    path = step_directory(checkpoints, 2) / _SECOND
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert glance(step_directory(checkpoints, 2)).findings == ()
    path.write_bytes(content[:-1])
    assert glance(step_directory(checkpoints, 2)).findings[0].kind == "size"


def test_findings_are_json(checkpoints: Path) -> None:
    (step_directory(checkpoints, 2) / _SECOND).unlink()
    (finding,) = _found(checkpoints)
    value = json.loads(json.dumps(finding.as_dict()))
    assert value["worker"] == 1 and value["lost"][0].keys() == {"state", "name", "first", "last"}


def test_gaps_between_slices() -> None:
    def cut(name: str, offset: int, length: int) -> SliceEntry:
        return SliceEntry("fp32", name, (10,), offset, length)

    tensors = {"fp32": {"a": (10,), "b": (2, 5), "c": (10,)}}
    entries = [cut("a", 6, 2), cut("a", 0, 4), cut("b", 0, 7), cut("b", 5, 5)]
    assert list(gaps(tensors, entries)) == [
        Part("fp32", "a", 4, 6),
        Part("fp32", "a", 8, 10),
        Part("fp32", "c", 0, 10),
    ]
