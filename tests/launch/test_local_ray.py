"""The executor on a real embedded Ray: a worker group, kill -9 of a worker, of the raylet, of the process that holds Ray."""

import json
import os
import signal
import socket
import subprocess
import threading
from pathlib import Path

import pytest

from dstune.errors import UsageError
from dstune.launch.driver import DriveLimits, drive
from dstune.launch.local import HostSettings, RayExecutor, passed_environment
from tests.launch.process_executor import events, lines, planner, steps, stub_run
from tests.launch.slurm_cluster import ticks

pytestmark = pytest.mark.ray
ENTRY = "tests.launch.stub_worker:main"


@pytest.fixture(scope="module")
def executor(tmp_path_factory):
    logs = tmp_path_factory.mktemp("logs")
    with RayExecutor(2, log_directory=logs, entry=ENTRY) as running:
        running.log_directory_of_test = logs
        yield running


def attempt(executor, paths, number=1, world=2):
    paths.attempt(number).mkdir()
    planner(paths)(number, world, None, 0)
    return executor.run(str(paths.root), number, world, {})


def when_training(paths, act):
    """Call `act` once the first step is there."""

    def wait():
        pause = threading.Event()
        while not paths.metrics.exists():
            pause.wait(0.1)
        act()

    threading.Thread(target=wait, daemon=True).start()


def lives(pid):
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def session(executor):
    """The processes of the executor's Ray."""
    return subprocess.run(
        ["ps", "-s", str(executor._host._process.pid), "-o", "pid=,comm="], capture_output=True, text=True
    ).stdout


def test_workers_run_where_they_were_placed_and_ray_says_nothing_to_the_terminal(tmp_path, executor, capfd):
    paths = stub_run(tmp_path)
    assert executor.available_workers() >= 2
    assert attempt(executor, paths).kind == "finished"
    assert [seat["rank"] for seat in json.loads(paths.workers(1).read_text())] == [0, 1]
    assert {record["world"] for record in lines(paths.metrics)} == {2}
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""


def test_everything_listens_on_loopback_only(executor):
    executor.available_workers()
    pids = {line.split()[0] for line in session(executor).splitlines()}
    listening = subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True).stdout.splitlines()
    ours = [line for line in listening if any(f"pid={pid}," in line for pid in pids)]
    assert ours and all(line.split()[3].startswith(("127.0.0.1:", "[::1]:", "[::ffff:127.0.0.1]:")) for line in ours), (
        ours
    )


def test_a_killed_worker_is_named_and_the_run_goes_on_until_one_raises_and_is_quoted(tmp_path, executor):
    killed = {"rank": 1, "step": 12, "attempts": [1]}
    raises = {"rank": 1, "step": 13, "kind": "ValueError", "attempts": [2]}
    paths = stub_run(tmp_path, die=killed, fail=raises)
    end = drive(paths, executor, planner(paths), DriveLimits(2, 2, max_failures=1), handle_signals=False)
    assert end.exit_status == 1 and "ValueError: bad luck" in end.message
    assert steps(paths)[:12] == list(range(1, 13))
    failure = events(paths, "failure")[0]
    assert failure["rank"] == 1 and failure["message"].startswith("worker 1 on node ")
    assert [event["from_step"] for event in events(paths, "attempt_started")] == [0, 10]


def test_kill_ends_the_workers_at_once(tmp_path, executor):
    """They began with what a heap wants that keeps what is freed (`engine.heap`)."""
    paths = stub_run(tmp_path, steps=100_000, seconds=0.1)
    began_with = []

    def act():
        for seat in json.loads(paths.workers(1).read_text()):
            began_with.append(Path(f"/proc/{seat['pid']}/environ").read_text())
        executor.kill()

    when_training(paths, act)
    outcome = attempt(executor, paths)
    assert outcome.kind == "lost" and outcome.message == "killed by the driver"
    assert len(began_with) == 2
    assert all("glibc.malloc.tcache_count=0" in text and "MALLOC_ARENA_MAX=1" in text for text in began_with)
    workers = [seat["pid"] for seat in json.loads(paths.workers(1).read_text())]
    for _ in ticks(20):
        if not any(lives(pid) for pid in workers):
            return
    raise AssertionError(f"workers live on: {workers}")


def test_a_lost_raylet_and_a_lost_host_are_lost_and_come_back(tmp_path, executor):
    def kill_raylet():
        raylet = next(line.split()[0] for line in session(executor).splitlines() if "raylet" in line)
        os.kill(int(raylet), signal.SIGKILL)

    paths = stub_run(tmp_path, steps=100_000, seconds=0.1)
    when_training(paths, kill_raylet)
    assert attempt(executor, paths).kind == "lost"
    paths.metrics.unlink()
    when_training(paths, lambda: os.kill(executor._host._process.pid, signal.SIGKILL))
    assert attempt(executor, paths, 2).kind == "lost"
    assert executor.available_workers() >= 2


def test_an_address_where_no_ray_is():
    with RayExecutor(1, address="127.0.0.1:9") as lonely, pytest.raises(UsageError, match="cannot reach Ray"):
        lonely.available_workers()


def test_what_may_pass_to_workers():
    passed = passed_environment(
        {
            "HF_HOME": "a",
            "HF_TOKEN": "s",
            "NCCL_DEBUG": "b",
            "PYTORCH_ALLOC_CONF": "c",
            "AWS_SECRET_ACCESS_KEY": "s",
            "PATH": "p",
        }
    )
    assert passed == {"HF_HOME": "a", "NCCL_DEBUG": "b", "PYTORCH_ALLOC_CONF": "c"}


@pytest.mark.parametrize(("wanted", "expected"), [(False, [None, 1.0, 1.0]), (True, [1.0, 1.0, 1.0])])
def test_workers_wait_for_gpus_that_went_away(wanted, expected, monkeypatch):
    """A head's processors would take the run while the machines with GPUs are replaced, and keep it."""
    from dstune.launch import ray_host

    seen = iter([{"CPU": 8.0}, {"CPU": 16.0, "GPU": 8.0}, {"CPU": 8.0}])
    monkeypatch.setattr(ray_host.ray, "cluster_resources", lambda: next(seen))
    settings = HostSettings(address="auto", workers=2, cpus_per_worker=1, gpus=wanted, temporary="")
    host = ray_host.Host(settings, socket.socketpair()[0])
    assert [host._resources().get("GPU") for _ in range(3)] == expected
