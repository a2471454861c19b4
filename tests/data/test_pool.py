import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dstune.data.pool import map_in_order
from dstune.errors import DataError, Problem, RunFailed

REPOSITORY = Path(__file__).parents[2]


def make_doubler(delay):
    """A `setup`: the work sleeps longer on early chunks, so that late ones finish first."""

    def work(chunk):
        print("noise on stdout")
        time.sleep(delay / (1 + chunk))
        return chunk * 2, os.getpid()

    return work


def make_failer(kind):
    def work(chunk):
        if chunk == 7 and kind == "refuse":
            raise DataError(Problem("a.json:7", "no good"))
        if chunk == 7 and kind == "bug":
            raise KeyError("a bug of ours")
        if chunk == 7 and kind == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        return chunk

    return work


@pytest.mark.parametrize("num_processes", [1, 3])
def test_results_come_in_order(num_processes):
    results = list(map_in_order(make_doubler, 0.02, range(40), num_processes))
    assert [value for value, _ in results] == [2 * number for number in range(40)]
    pids = {pid for _, pid in results}
    assert (pids == {os.getpid()}) if num_processes == 1 else (os.getpid() not in pids and len(pids) <= 3)


def test_a_few_chunks_are_done_here():
    assert {pid for _, pid in map_in_order(make_doubler, 0, range(3), 8)} == {os.getpid()}
    assert list(map_in_order(make_doubler, 0, [], 8)) == []


def test_chunks_are_not_read_far_ahead():
    taken = []

    def chunks():
        for number in range(1000):
            taken.append(number)
            yield number

    results = map_in_order(make_doubler, 0, chunks(), 2)
    assert next(results)[0] == 0
    assert len(taken) < 20
    results.close()


@pytest.mark.parametrize("num_processes", [1, 2])
def test_an_error_for_the_user_comes_in_its_turn(num_processes):
    seen = []
    with pytest.raises(DataError, match=r"a\.json:7: no good"):
        for result in map_in_order(make_failer, "refuse", range(30), num_processes):
            seen.append(result)
    assert seen == list(range(7))


def test_a_bug_shows_the_childs_traceback():
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*KeyError: 'a bug of ours'"):
        list(map_in_order(make_failer, "bug", range(30), 2))


def test_a_killed_child_is_an_error_with_a_hint():
    with pytest.raises(RunFailed, match=r"signal 9.*\n.*num_processes"):
        list(map_in_order(make_failer, "die", range(30), 2))


@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize("good", [0, 2, 25])
def test_an_error_of_the_chunks_comes_after_what_was_before_it(num_processes, good):
    def chunks():
        yield from range(good)
        raise DataError("cut short")

    seen = []
    with pytest.raises(DataError, match="cut short"):
        for result, _ in map_in_order(make_doubler, 0, chunks(), num_processes):
            seen.append(result)
    assert seen == [2 * number for number in range(good)]


_WITHOUT_GUARD = """
from dstune.data.pool import map_in_order
from tests.data.test_pool import make_doubler
print(sum(value for value, _ in map_in_order(make_doubler, 0, range(50), 2)))
"""


def test_a_script_without_a_main_guard(tmp_path):
    """And modules of the working directory are not taken for the standard library's."""
    (tmp_path / "script.py").write_text(_WITHOUT_GUARD)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "pickle.py").write_text("raise SystemExit('the wrong pickle')")
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py")],
        cwd=elsewhere,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(entry for entry in [str(REPOSITORY), *sys.path] if entry)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "2450"), done.stderr


_ENDLESS = """
import itertools, sys
from dstune.data.pool import map_in_order
from tests.data.test_pool import make_doubler
for _, pid in map_in_order(make_doubler, 0, itertools.count(), 2):
    print(pid, flush=True)
"""


def _lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_children_end_with_a_killed_parent():
    parent = subprocess.Popen(
        [sys.executable, "-c", _ENDLESS],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )
    children = {int(parent.stdout.readline()) for _ in range(50)}
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 20
    while any(_lives(pid) for pid in children):
        assert time.monotonic() < deadline, "a child outlived its parent"
