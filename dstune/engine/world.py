"""How many workers there are and which one this is: read from torchrun's, srun's or no environment at all."""

import atexit
import os
import re
import resource
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from dstune.engine import pinned
from dstune.engine.control import ControlGroup
from dstune.engine.quiet import prepare_environment, start_deepspeed
from dstune.errors import ConfigError, Problem, UsageError, first_line

_FIRST_PORT = 15000
"""Below Linux's ephemeral range (32768), so that a port derived from a job id is not some client's by chance."""
_NUM_PORTS = 15000
_BACKEND = "backend"
"""In the store: worker 0's, when it is here."""
_MOST_FILES = 1 << 16
_DOCUMENTATION_ADDRESS = "192.0.2.1"
"""Of nobody (RFC 5737): the way there is the way to other machines. Nothing is sent."""


@dataclass(frozen=True)
class World:
    """One worker's place among `world_size` workers. Nothing is started before `init`."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Number of this worker on its machine; picks the GPU."""
    local_world_size: int = 1
    node: int = 0
    """Number of this machine, from 0."""
    master_address: str = "127.0.0.1"
    master_port: int = 0

    @classmethod
    def from_environment(cls, env: Mapping[str, str] | None = None) -> "World":
        """The world that torchrun (or Ray Train) describes, else srun, else a single worker.

        Raises UsageError where the variables are incomplete or contradict each other.
        """
        env = os.environ if env is None else env
        if "RANK" in env and "WORLD_SIZE" in env:
            world = _from_torchrun(env)
        elif "SLURM_PROCID" in env and ("SLURM_STEP_NUM_TASKS" in env or "SLURM_NTASKS" in env):
            world = _from_slurm(env)
        else:
            world = cls()
        if not 0 <= world.rank < world.world_size or not 0 <= world.local_rank < world.local_world_size:
            raise UsageError(Problem("environment", f"{world}", "0 <= rank < world_size, on the machine as well"))
        return world

    @property
    def device(self) -> torch.device:
        """This worker's GPU, or the CPU of a machine without."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        # A task that was bound to its own GPU (`--gpus-per-task`) sees only that one, as number 0.
        return torch.device("cuda", self.local_rank % torch.cuda.device_count())

    @property
    def backend(self) -> str:
        """torch.distributed's backend for the training's own collectives."""
        return "nccl" if self.device.type == "cuda" else "gloo"

    def init(self, timeout_seconds: float = 600.0, arrival_seconds: float | None = None) -> None:
        """Choose the device and join the group of all workers; a group that is there already (Ray Train's) is used.

        Blocks until all workers are here, at most `arrival_seconds` (None: as the next); afterwards a collective that waits longer than
        `timeout_seconds` raises.
        """
        self._export()
        _allow_a_socket_for_each_worker()
        if self.world_size > self.local_world_size:
            _name_gloo_an_interface(self.master_address)
        prepare_environment(self.device.type)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            pinned.take_no_more_than_asked()
        if not dist.is_initialized():
            self._join(timedelta(seconds=timeout_seconds), timedelta(seconds=arrival_seconds or timeout_seconds))
            # NOTE: a process that exits with the group's threads alive is now and then aborted by the C++ runtime.
            atexit.register(self.close)
        if (dist.get_rank(), dist.get_world_size()) != (self.rank, self.world_size):
            found = f"rank {dist.get_rank()} of {dist.get_world_size()}"
            raise UsageError(
                Problem("environment", f"torch.distributed says {found}", f"{self.rank} of {self.world_size}")
            )
        start_deepspeed(self.backend, timedelta(seconds=timeout_seconds))

    def require_gpu(self) -> None:
        """Raises ConfigError where torch sees no GPU: training on a processor that was planned for GPUs is a waste nobody asked for."""
        if self.device.type == "cpu":
            came = f"torch sees none on {socket.gethostname()}: {_why_no_gpu()}"
            do = "Mend the driver or take the build of torch for it; CUDA_VISIBLE_DEVICES= trains on processors."
            raise ConfigError(Problem("the GPUs that were planned with", came, do=do))

    def control(self, timeout_seconds: float = 1800.0) -> ControlGroup:
        """A gloo group of its own, on the CPU. A collective call: every worker makes it once, at the same point."""
        return ControlGroup(timedelta(seconds=timeout_seconds))

    def row_group(self, members: int, timeout_seconds: float = 600.0) -> Any:
        """The process group of the `members` workers in a row (neighbours on their machine) that this one is of, for the training's
        own collectives. A collective call, as `control`; `members` divides the world.
        """
        group, _ = dist.new_subgroups(members, timeout=timedelta(seconds=timeout_seconds))
        return group

    def close(self) -> None:
        """Leave the group of all workers."""
        if joined():
            dist.destroy_process_group()

    def abandon(self) -> None:
        """Leave it after a failure here, of which the others do not know.

        NOTE: NCCL's groups end when all that is in flight has, and the others are in a collective that waits for this worker: it would
        hang in its own clean-up, and nobody hear of the failure. There the end of this process, by a signal or `os._exit`, ends them.
        """
        if self.backend == "nccl":
            atexit.unregister(self.close)
        else:
            self.close()

    def _export(self) -> None:
        """Tell libraries below what they look for in the environment (torch's names, and DeepSpeed's for the machine).

        NOTE: DeepSpeed takes LOCAL_RANK for the GPU's number, which is another one where a task sees its own GPU alone.
        """
        device = self.device
        os.environ.update(
            RANK=str(self.rank),
            WORLD_SIZE=str(self.world_size),
            LOCAL_RANK=str(self.local_rank if device.index is None else device.index),
            LOCAL_WORLD_SIZE=str(self.local_world_size),
            MASTER_ADDR=self.master_address,
            MASTER_PORT=str(self.master_port),
            LOCAL_SIZE=str(self.local_world_size),
            CROSS_RANK=str(self.node),
            CROSS_SIZE=str(-(-self.world_size // self.local_world_size)),
        )

    def _join(self, timeout: timedelta, arrival: timedelta) -> None:
        if self.world_size == 1:
            # No port is opened where there is nobody to talk to.
            dist.init_process_group(self.backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
            return
        store, _, _ = next(dist.rendezvous("env://", self.rank, self.world_size, timeout=arrival))
        store.set_timeout(arrival)
        # Worker 0 comes last where it prepares the data; the groups below wait for each other no longer than for a collective.
        if self.rank == 0:
            store.set(_BACKEND, self.backend)
        if (others := store.get(_BACKEND).decode()) != self.backend:
            came = f"{socket.gethostname()}: {_devices(self.backend)}, and worker 0 {_devices(others)}"
            raise ConfigError(Problem("the workers' machines", came, "the same on all"))
        dist.init_process_group(
            self.backend,
            store=dist.PrefixStore("group", store),
            rank=self.rank,
            world_size=self.world_size,
            timeout=timeout,
            device_id=self.device if self.device.type == "cuda" else None,
        )


def joined() -> bool:
    """Whether this process is in the group of all workers."""
    return dist.is_initialized()


def _devices(backend: str) -> str:
    return "has GPUs" if backend == "nccl" else f"has none ({_why_no_gpu()})"


def _why_no_gpu() -> str:
    try:
        torch.cuda.init()
    except (AssertionError, RuntimeError) as error:  # the first: a build without CUDA
        return first_line(error)
    return "no device"


def _allow_a_socket_for_each_worker() -> None:
    """A gloo group holds a connection to every other worker, and there are several: 512 workers need more than the usual 1,024 files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft not in (-1, resource.RLIM_INFINITY) and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _name_gloo_an_interface(master_address: str) -> None:
    """Where this machine's name means itself alone (Ubuntu's 127.0.1.1), have gloo listen where the other machines can reach it."""
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return
    try:
        ours = socket.gethostbyname(socket.gethostname())
    except OSError:  # nobody knows the name: gloo would not either
        ours = "127.0.0.1"
    if ours.startswith("127.") and (name := _interface_to(master_address) or _interface_to(_DOCUMENTATION_ADDRESS)):
        os.environ["GLOO_SOCKET_IFNAME"] = name


def _interface_to(address: str) -> str | None:
    """By which network interface `address` is reached, unless it is the machine's own loop; None where none leads there."""
    import psutil

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))
        except OSError:
            return None
        ours = probe.getsockname()[0]
    names = (name for name, kept in psutil.net_if_addrs().items() if any(one.address == ours for one in kept))
    return None if ours.startswith("127.") else next(names, None)


def _number(env: Mapping[str, str], key: str, default: int | None = None) -> int:
    text = env.get(key)
    if text is None:
        if default is None:
            raise UsageError(Problem("environment", f"{key} is not set", "a number"))
        return default
    if not re.fullmatch(r"\d+", text):
        raise UsageError(Problem("environment", f"{key}={text!r}", "a number"))
    return int(text)


def _from_torchrun(env: Mapping[str, str]) -> World:
    world_size = _number(env, "WORLD_SIZE")
    rank = _number(env, "RANK")
    local_world_size = _number(env, "LOCAL_WORLD_SIZE", world_size if world_size == 1 else None)
    return World(
        rank=rank,
        world_size=world_size,
        local_rank=_number(env, "LOCAL_RANK", 0 if world_size == 1 else None),
        local_world_size=local_world_size,
        node=_number(env, "GROUP_RANK", _number(env, "NODE_RANK", rank // local_world_size)),
        master_address=env.get("MASTER_ADDR", "127.0.0.1"),
        master_port=_number(env, "MASTER_PORT", 0 if world_size == 1 else None),
    )


def _from_slurm(env: Mapping[str, str]) -> World:
    world_size = _number(env, "SLURM_STEP_NUM_TASKS", _number(env, "SLURM_NTASKS", 1))
    hosts = expand_hosts(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_NODELIST") or "127.0.0.1")
    node = _number(env, "SLURM_NODEID", 0)
    local_world_size = -(-world_size // len(hosts))
    if tasks := env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE"):
        local_world_size = dict(enumerate(tasks_per_node(tasks))).get(node, local_world_size)
    job = _number(env, "SLURM_JOB_ID", 0) * 7 + _number(env, "SLURM_STEP_ID", 0)
    return World(
        rank=_number(env, "SLURM_PROCID"),
        world_size=world_size,
        local_rank=_number(env, "SLURM_LOCALID"),
        local_world_size=local_world_size,
        node=node,
        master_address=env.get("MASTER_ADDR") or hosts[0],
        master_port=_number(env, "MASTER_PORT", _FIRST_PORT + job % _NUM_PORTS),
    )


def expand_hosts(nodelist: str) -> list[str]:
    """Slurm's compressed host list in full: `gpu[01-03,07],login` is gpu01, gpu02, gpu03, gpu07, login."""
    hosts: list[str] = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodelist):
        hosts += _expand_brackets(part)
    return hosts


def _expand_brackets(part: str) -> list[str]:
    match = re.fullmatch(r"([^\[]*)\[([^\]]+)\](.*)", part)
    if match is None:
        return [part]
    before, numbers, after = match.groups()
    hosts: list[str] = []
    for item in numbers.split(","):
        first, _, last = item.partition("-")
        for number in range(int(first), int(last or first) + 1):
            hosts += [f"{before}{number:0{len(first)}d}{rest}" for rest in _expand_brackets(after)]
    return hosts


def tasks_per_node(tasks: str) -> list[int]:
    """Slurm's compressed task counts in full: `4(x2),3` is 4, 4, 3."""
    counts: list[int] = []
    for item in tasks.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item)
        if match is None:
            raise UsageError(Problem("environment", f"tasks per node {tasks!r}", "such as 4(x2),3"))
        counts += [int(match.group(1))] * int(match.group(2) or 1)
    return counts
