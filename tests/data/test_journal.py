"""A preparation that was killed goes on where it was, and what it had written torn or foreign is not used."""

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dstune.config.schema import DeduplicateSection
from dstune.data import journal, prepare
from dstune.data.conversation import Refused
from dstune.data.journal import Journal
from dstune.data.json_stream import Lines
from dstune.data.work import Chunk, Drop, Result, setup
from tests.data.test_prepare import (  # noqa: F401
    REPOSITORY,
    base,
    cache,
    files_of,
    make_config,
    record,
    write_lines,
)

_KILLED = """
import os, signal, sys
from pathlib import Path
from dstune.config.schema import RunConfig
from dstune.data import prepare
from dstune.data.journal import Journal

config, base, after = RunConfig.model_validate_json(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
add, written = Journal.add, []

def adding(self, result):
    add(self, result)
    written.append(result)
    if len(written) == after:
        os.kill(os.getpid(), signal.SIGKILL)

Journal.add = adding
prepare.prepare(config, base)
"""


@pytest.fixture
def results(base: Path) -> list[Result]:  # noqa: F811
    """What work on three chunks comes to."""
    config = make_config(deduplicate="near")
    build = prepare._Build(config, base, True, _encoder(config, base), lambda _: None, None)
    work = setup(dataclasses.replace(build._job, duplicates=DeduplicateSection()))
    lines = (base / "data/a.jsonl").read_bytes().splitlines(keepends=True)
    chunks = [
        Chunk(0, config.data.sources[0], Lines(first + 1, b"".join(lines[first : first + 20]))) for first in (0, 20, 40)
    ]
    made = [work(chunk) for chunk in chunks]
    made[1].drops.append(Drop(21, None, Refused("invalid_json", "half \udc80 a character")))
    return made


def _encoder(config, folder):
    from dstune.data.encoder import make_encoder

    return make_encoder(config.model, config.data, folder, False)


def same(one: Result, other: Result) -> bool:
    arrays = [getattr(one.block, field.name) for field in dataclasses.fields(one.block)]
    others = [getattr(other.block, field.name) for field in dataclasses.fields(other.block)]
    arrays += [one.records, one.digests, one.signatures]
    others += [other.records, other.digests, other.signatures]
    equal = all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(arrays, others, strict=True))
    drops = [[(d.line, d.part, str(d.refused)) for d in result.drops] for result in (one, other)]
    plain = [(r.file, r.num_records, r.tally, r.last_line, r.last_parts) for r in (one, other)]
    return equal and drops[0] == drops[1] and plain[0] == plain[1]


def test_what_is_written_comes_back(results: list[Result], tmp_path: Path) -> None:
    path = tmp_path / "j"
    log = Journal(path)
    assert list(log.replay()) == []
    for result in results:
        log.add(result)
    log.close()
    log = Journal(path)
    assert all(same(*both) for both in zip(results, log.replay(), strict=True))
    log.close()


@pytest.mark.parametrize("harm", ["cut", "flip", "foreign"])
def test_what_is_not_whole_is_cut_off(results: list[Result], tmp_path: Path, harm: str) -> None:
    path = tmp_path / "j"
    log = Journal(path)
    sizes = []
    for result in results:
        log.add(result)
        sizes.append(path.stat().st_size)
    log.close()
    content = bytearray(path.read_bytes())
    if harm == "cut":
        del content[sizes[1] + 100 :]
    elif harm == "flip":
        content[sizes[1] + 500] ^= 4
    else:
        content[sizes[1] :] = b"\xff" * 4000
    path.write_bytes(content)
    log = Journal(path)
    assert len(list(log.replay())) == 2 and path.stat().st_size == sizes[1]
    log.add(results[2])
    log.close()
    log = Journal(path)
    assert all(same(*both) for both in zip(results, log.replay(), strict=True))
    log.close()


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_it_goes_on(base: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, processes: int) -> None:  # noqa: F811
    write_lines(base / "data/a.jsonl", [record(number, 400) for number in range(3000)])  # 6 MB: several chunks
    config = make_config(max_length=1024, deduplicate="near", validation=0.1, num_processes=processes)
    monkeypatch.setenv("DSTUNE_CACHE", str(cache / "whole"))
    whole = prepare.prepare(config, base)
    monkeypatch.setenv("DSTUNE_CACHE", str(cache / "killed"))
    command = [sys.executable, "-c", _KILLED, config.model_dump_json(), str(base), "3"]
    died = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True)
    assert died.returncode == -signal.SIGKILL, died.stderr
    done: list[Result] = []
    add = Journal.add
    monkeypatch.setattr(Journal, "add", lambda self, result: (done.append(result), add(self, result))[1])
    again = prepare.prepare(config, base)
    assert files_of(again.root) == files_of(whole.root)
    assert sum(result.num_records for result in done) < 3000  # what was done was not done again
    assert [path.name for path in again.root.parent.iterdir()] == [again.root.name]


def test_given_up_journals_go(cache: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    cache.mkdir(parents=True)
    old, new = cache / ".old-1.examples.journal", cache / ".new-1.examples.journal"
    for path in (old, new):
        path.touch()
    os.utime(old, (0, 0))
    prepare.prepare(make_config(), base)
    assert not old.exists() and new.exists()
    assert journal.path_beside(cache / "demo-1", "examples").parent == cache
