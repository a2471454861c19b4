"""Logs of lines on disks that were full, or changed a bit: what is whole is read, and what comes next is whole again."""

import json
from pathlib import Path

import pytest

from dstune import atomic
from dstune.atomic import append_line, read_json_lines
from dstune.launch.follow import LineFollower, cut_back


def test_a_line_cut_short_costs_no_other(tmp_path: Path) -> None:
    log = tmp_path / "events.jsonl"
    log.write_bytes(b'{"step": 1}\n{"step": 2, "lo')
    append_line(log, '{"step": 3}')
    assert list(read_json_lines(log)) == [{"step": 1}, {"step": 3}]
    assert LineFollower(log, from_end=False).new() == [{"step": 1}, {"step": 3}]


@pytest.mark.parametrize("damaged", [b"x", b"[]", b"\xff", b"[" * 100_000, b'"step"'], ids=lambda text: text[:4])
def test_a_damaged_line_costs_no_other(tmp_path: Path, damaged: bytes) -> None:
    log = tmp_path / "metrics.jsonl"
    log.write_bytes(b'{"step": 1}\n' + damaged + b'\n{"step": 3}\n{"step": 4}\n')
    assert [record["step"] for record in read_json_lines(log)] == [1, 3, 4]
    assert cut_back(log, 3) == 2
    assert log.read_bytes() == b'{"step": 1}\n{"step": 3}\n'


def test_a_line_that_does_not_fit_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "events.jsonl"
    append_line(log, json.dumps({"step": 1}))
    write = atomic.os.write
    monkeypatch.setattr(atomic.os, "write", lambda descriptor, written: write(descriptor, written[:4]))
    with pytest.raises(OSError, match="No space left"):
        append_line(log, json.dumps({"step": 2}))
    monkeypatch.undo()
    append_line(log, json.dumps({"step": 2}))
    assert list(read_json_lines(log)) == [{"step": 1}, {"step": 2}]
