"""Worlds from torchrun's and srun's variables; the control group; what DeepSpeed may not do."""

import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from dstune import worker
from dstune.engine import world as worlds
from dstune.engine.quiet import start_deepspeed
from dstune.engine.world import World, expand_hosts, tasks_per_node
from dstune.errors import ConfigError, UsageError
from dstune.paths import RunPaths
from tests.spawn import free_port, run_workers, start_worker


def test_no_environment_is_a_world_of_one() -> None:
    assert World.from_environment({}) == World(0, 1, 0, 1, 0)


def test_torchrun() -> None:
    env = {
        "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1",
        "MASTER_ADDR": "n1", "MASTER_PORT": "29500",
    }  # fmt: skip
    assert World.from_environment(env) == World(5, 8, 1, 4, 1, "n1", 29500)


def test_srun() -> None:
    env = {
        "SLURM_PROCID": "5", "SLURM_NTASKS": "7", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_JOB_ID": "123",
        "SLURM_NODELIST": "gpu[07-08]", "SLURM_TASKS_PER_NODE": "4,3",
    }  # fmt: skip
    world = World.from_environment(env)
    assert (world.rank, world.world_size, world.local_rank, world.local_world_size, world.node) == (5, 7, 1, 3, 1)
    assert world.master_address == "gpu07" and 15000 <= world.master_port < 30000
    assert World.from_environment(env | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}).master_port == world.master_port
    assert World.from_environment(env | {"SLURM_JOB_ID": "124"}).master_port != world.master_port
    assert World.from_environment(env | {"SLURM_STEP_ID": "1"}).master_port != world.master_port


def test_the_four_variables_of_srun_are_enough() -> None:
    env = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1", "SLURM_NODELIST": "n1"}
    world = World.from_environment(env)
    assert (world.rank, world.world_size, world.local_world_size, world.master_address) == (1, 2, 2, "n1")


def test_a_task_that_sees_one_gpu_alone_tells_deepspeed_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm's --gpus-per-task: it is number 0 to each of them. DeepSpeed takes LOCAL_RANK for the device."""
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for visible, number in ((1, "0"), (4, "3")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda visible=visible: visible)
        world = World(rank=3, world_size=4, local_rank=3, local_world_size=4)
        world._export()
        assert os.environ["LOCAL_RANK"] == number and world.device == torch.device("cuda", int(number))
        assert os.environ["LOCAL_SIZE"] == "4"


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_WORLD_SIZE is not set"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK='x'"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_PORT": "1"}, "rank=2"),
    ],
)
def test_a_wrong_environment_is_a_usage_error(env: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        World.from_environment(env)


def test_slurms_compressed_lists() -> None:
    assert expand_hosts("gpu[01-03,07],login") == ["gpu01", "gpu02", "gpu03", "gpu07", "login"]
    assert expand_hosts("r[1-2]n[09-10]") == ["r1n09", "r1n10", "r2n09", "r2n10"]
    assert expand_hosts("one") == ["one"]
    assert tasks_per_node("4(x2),3") == [4, 4, 3]


def _talk() -> tuple[list[object], object, str, str, bool]:
    world = World.from_environment()
    world.init(30)
    control = world.control(30)
    gathered = control.gather({"rank": world.rank, "text": "é" * world.rank})
    told = control.broadcast(["from", world.rank])
    control.barrier()
    import deepspeed.comm

    no_shared_memory = deepspeed.comm.comm.cdb.shm_comm_op is None
    world.close()
    return gathered, told, os.environ["LOCAL_SIZE"], os.environ["CROSS_SIZE"], no_shared_memory


@pytest.mark.dist
def test_control_says_the_same_to_all() -> None:
    for gathered, told, local_size, cross_size, no_shared_memory in run_workers(_talk, 3):
        assert gathered == [{"rank": 0, "text": ""}, {"rank": 1, "text": "é"}, {"rank": 2, "text": "éé"}]
        assert told == ["from", 0]
        assert (local_size, cross_size) == ("3", "1")
        assert no_shared_memory


@pytest.mark.parametrize(("backend", "tried"), [("nccl", False), ("gloo", True)])
def test_deepspeed_tries_compilers_only_where_something_must_be_kept_from_them(
    backend: str, tried: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To import `__compatible_ops__` is to try: on a GPU for each of DeepSpeed's kernels, with lines on stdout."""
    import deepspeed

    monkeypatch.delitem(vars(deepspeed.ops), "__compatible_ops__", raising=False)
    asked: list[None] = []
    monkeypatch.setattr(deepspeed.ops, "_probe_compatible_ops", lambda: asked.append(None) or {})
    monkeypatch.setattr(deepspeed, "init_distributed", lambda **settings: None)
    start_deepspeed(backend, timedelta(seconds=1))
    monkeypatch.delitem(vars(deepspeed.ops), "__compatible_ops__", raising=False)
    assert bool(asked) == tried


def _say_who_is_there() -> None:
    world = World.from_environment()
    world.init(30)
    print(world.control(30).gather(world.rank))
    world.close()


@pytest.mark.dist
def test_srun_like_workers_find_each_other(tmp_path: Path) -> None:
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "RANK", "WORLD"))}
    common = {"SLURM_NTASKS": "2", "SLURM_NODELIST": "localhost", "MASTER_PORT": str(free_port())}
    ranks = [{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2)]
    logs = [tmp_path / str(rank) for rank in range(2)]
    processes = [
        start_worker(_say_who_is_there, environment=plain | common | own, log=log)
        for own, log in zip(ranks, logs, strict=True)
    ]
    for process, log in zip(processes, logs, strict=True):
        process.join(60)
        assert process.exitcode == 0 and log.read_text().splitlines()[-1] == "[0, 1]", log.read_text()


def test_a_world_of_one_needs_no_port_and_says_nothing(tmp_path: Path) -> None:
    """The engine's whole way, without a compiler in reach and without a line on stdout or stderr."""
    code = (
        "from dstune.engine.world import World\nfrom tests.engine import tiny\n"
        "world = World.from_environment({}); world.init(30)\n"
        "engine = tiny.engine(world, 3); tiny.train(engine, world, range(1)); world.close()\n"
    )
    environment = {
        "PATH": str(tmp_path), "HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2]),
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not (tmp_path / "extensions").exists()


@pytest.mark.parametrize(("backend", "left"), [("gloo", True), ("nccl", False)])
def test_who_fails_does_not_wait_in_its_own_clean_up_for_workers_that_wait_for_it(
    backend: str, left: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL's groups end when all that is in flight has; gloo's, on processors, end at once."""
    paths, ended = RunPaths(tmp_path), list[str]()
    paths.make()
    paths.attempt(1).mkdir(parents=True)
    monkeypatch.setattr(World, "backend", backend)
    monkeypatch.setattr(worlds.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(worlds.dist, "destroy_process_group", lambda: ended.append("waited"))
    with pytest.raises(RuntimeError, match="out of memory"), worker._accounted(paths, 1, World()):
        raise RuntimeError("out of memory")
    assert paths.rank_failure(1, 0).is_file() and bool(ended) == left
    ended.clear()
    with worker._accounted(paths, 1, World()):
        pass
    assert ended == ["waited"]


def test_a_machine_whose_gpus_do_not_work_is_named_before_anybody_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its worker would train on the processor over gloo, the others wait for it in NCCL."""
    store = torch.distributed.HashStore()
    store.set("backend", "nccl")
    monkeypatch.setattr(World, "backend", "gloo")
    monkeypatch.setattr(worlds.dist, "rendezvous", lambda *_, **__: iter([(store, 1, 2)]))
    world = World(rank=1, world_size=2, local_rank=1, local_world_size=2)
    with pytest.raises(ConfigError, match=f"{socket.gethostname()}: has none .*, and worker 0 has GPUs"):
        world._join(timedelta(seconds=1), timedelta(seconds=1))


@pytest.mark.skipif(torch.cuda.is_available(), reason="wants none")
def test_what_was_planned_for_gpus_does_not_train_on_processors() -> None:
    with pytest.raises(ConfigError, match=r"torch sees none on .*: .+"):
        World().require_gpu()


def test_there_are_files_for_a_connection_to_each_of_many_workers() -> None:
    code = (
        "import resource as r\nfrom dstune.engine.world import _allow_a_socket_for_each_worker as allow\n"
        "hard = r.getrlimit(r.RLIMIT_NOFILE)[1]\nr.setrlimit(r.RLIMIT_NOFILE, (256, hard)); allow()\n"
        "most = 65536 if hard == r.RLIM_INFINITY else min(hard, 65536)\nassert r.getrlimit(r.RLIMIT_NOFILE) == (most, hard)\n"
        "r.setrlimit(r.RLIMIT_NOFILE, (hard, hard)); allow(); assert r.getrlimit(r.RLIMIT_NOFILE) == (hard, hard)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("ours", "set_before", "ways", "named"),
    [
        ("127.0.1.1", None, {"n0": "eth1"}, "eth1"),
        ("127.0.1.1", None, {"192.0.2.1": "eth0"}, "eth0"),  # worker 0's machine, whose own name leads to its loop
        ("127.0.1.1", None, {}, None),
        ("127.0.1.1", "ib0", {"n0": "eth1"}, "ib0"),
        ("10.0.0.5", None, {"n0": "eth1"}, None),
    ],
)
def test_gloo_listens_where_other_machines_reach_it(
    ours: str, set_before: str | None, ways: dict[str, str], named: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ubuntu writes a machine's own name into its hosts file as 127.0.1.1, and gloo offers that to the others."""
    monkeypatch.setattr(os, "environ", {} if set_before is None else {"GLOO_SOCKET_IFNAME": set_before})
    monkeypatch.setattr(socket, "gethostbyname", lambda _: ours)
    monkeypatch.setattr(worlds, "_interface_to", ways.get)
    worlds._name_gloo_an_interface("n0")
    assert os.environ.get("GLOO_SOCKET_IFNAME") == named


def test_an_interface_is_found_by_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    assert worlds._interface_to("127.0.0.1") is None
    address = next(
        (
            a.address
            for kept in psutil.net_if_addrs().values()
            for a in kept
            if a.family == socket.AF_INET and not a.address.startswith("127.")
        ),
        None,
    )
    assert address is None or worlds._interface_to(address) in psutil.net_if_addrs()
