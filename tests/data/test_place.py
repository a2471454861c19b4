import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dstune.data.place import build_once

REPOSITORY = Path(__file__).parents[2]


def _content(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_built_once(tmp_path):
    final = tmp_path / "cache" / "name-123"
    assert build_once(final, lambda folder: (folder / "file").touch())
    assert not build_once(final, lambda folder: pytest.fail("built again"))
    assert _content(tmp_path / "cache") == ["name-123", "name-123/file"]
    assert final.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), ValueError("x")]
)
def test_a_failed_build_leaves_nothing(tmp_path, error):
    def build(folder):
        (folder / "file").touch()
        raise error

    with pytest.raises(type(error)):
        build_once(tmp_path / "name-123", build)
    assert _content(tmp_path) == []


def test_one_builds_and_the_others_wait(tmp_path):
    built = []
    started = threading.Event()
    released = threading.Event()

    def slow(folder):
        started.set()
        released.wait(10)
        built.append(folder)
        (folder / "file").touch()

    results = []
    first = threading.Thread(target=lambda: results.append(build_once(tmp_path / "a", slow)))
    first.start()
    assert started.wait(10)
    others = [threading.Thread(target=lambda: results.append(build_once(tmp_path / "a", slow))) for _ in range(3)]
    for thread in others:
        thread.start()
    released.set()
    for thread in [first, *others]:
        thread.join(20)
    assert len(built) == 1
    assert sorted(results) == [False, False, False, True]
    assert _content(tmp_path) == ["a", "a/file"]


_HANGING = """
import sys, time
from pathlib import Path
from dstune.data.place import build_once
def build(folder):
    (folder / "half").touch()
    print(folder, flush=True)
    time.sleep(60)
build_once(Path(sys.argv[1]), build)
"""


def _hang(final):
    process = subprocess.Popen(
        [sys.executable, "-c", _HANGING, str(final)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )
    return process, Path(process.stdout.readline().strip())


def test_what_a_killed_build_leaves_is_deleted_and_what_a_living_one_has_is_not(tmp_path):
    killed, killed_folder = _hang(tmp_path / "killed-1")
    living, living_folder = _hang(tmp_path / "living-1")
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed-1").exists() and killed_folder.exists()
    assert build_once(tmp_path / "other-1", lambda folder: (folder / "file").touch())
    assert not killed_folder.exists()
    assert living_folder.exists()
    living.kill()
    living.wait()
    assert build_once(tmp_path / "living-1", lambda folder: (folder / "file").touch())
    assert not living_folder.exists()
    assert [path.name for path in sorted(tmp_path.iterdir()) if path.is_dir()] == ["living-1", "other-1"]
