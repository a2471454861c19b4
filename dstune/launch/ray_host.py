"""The process that holds Ray for a driver: `python -m dstune.launch.ray_host SETTINGS DESCRIPTOR`, started by `local.RayExecutor`.

Ray lives in a process of its own because it may take its process down with it (a lost head ends every driver), replaces signal
handlers, and writes to the terminal. The driver speaks to it over a socket, a JSON object a line; when the driver is gone, however it
ended, the socket closes and this process goes too, and with it the embedded Ray or the attempt's workers.
"""

import importlib
import json
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray._private.state import available_resources_per_node
from ray.exceptions import OutOfMemoryError, RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import WorkerGroupError

from dstune.atomic import write_json
from dstune.engine import heap
from dstune.errors import first_line
from dstune.launch import fence
from dstune.launch.local import HostSettings
from dstune.paths import RunPaths

_OBJECT_STORE_BYTES = 128 << 20


def _at_start(resources: Mapping[str, float]) -> Mapping[str, str]:
    """What a worker's process starts with that has these resources of Ray."""
    return {} if "GPU" in resources else heap.at_start(resources["CPU"])


class WorldConfig(BackendConfig):
    """Says to Ray Train who gives the workers their world."""

    def __init__(self, workers_file: str, loopback: bool) -> None:
        self.workers_file, self.loopback = workers_file, loopback

    @property
    def backend_cls(self) -> type[Backend]:
        return WorldBackend


class WorldBackend(Backend):
    """Gives each worker the variables that torchrun would (RANK, WORLD_SIZE, …); worker 0's node has the rendezvous.

    Process groups are the worker's own business, as under torchrun and srun: Ray makes none, and tears none down.
    """

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: WorldConfig) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        address, port = worker_group.execute_single(0, _rendezvous, backend_config.loopback)
        worker_group.execute(_set_world, address, port)
        seats: list[dict[str, Any]] = worker_group.execute(_seat)
        write_json(Path(backend_config.workers_file), [{"rank": rank} | seat for rank, seat in enumerate(seats)])


def _rendezvous(loopback: bool) -> tuple[str, int]:
    address = "127.0.0.1" if loopback else ray.util.get_node_ip_address()
    with socket.socket() as listener:
        listener.bind(("", 0))
        return address, listener.getsockname()[1]


def _set_world(address: str, port: int) -> None:
    context = ray.train.get_context()
    os.environ |= {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "RANK": str(context.get_world_rank()),
        "WORLD_SIZE": str(context.get_world_size()),
        "LOCAL_RANK": str(context.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
        "NODE_RANK": str(context.get_node_rank()),
    }


def _seat() -> dict[str, Any]:
    return {"node": socket.gethostname(), "pid": os.getpid(), "started": fence.started(os.getpid())}


def train_function(config: dict[str, Any]) -> None:
    """What Ray Train runs in each worker: the entry `module:function(run_directory, attempt)`."""
    fence.hold(RunPaths(Path(config["run_directory"])))
    module, _, function = config["entry"].partition(":")
    status = vars(importlib.import_module(module))[function](Path(config["run_directory"]), config["attempt"])
    if status:
        raise RuntimeError(f"the worker ended with exit status {status}")


class Host:
    """Answers the driver's requests; one attempt at a time."""

    def __init__(self, settings: HostSettings, channel: socket.socket) -> None:
        self._settings, self._channel = settings, channel
        self._writing = threading.Lock()
        self._requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._embedded = settings.address is None
        self._gpus = settings.gpus

    def serve(self) -> None:
        """Read requests until the driver closes."""
        threading.Thread(target=self._read, name="requests", daemon=True).start()
        try:
            self._connect()
        except Exception as error:  # noqa: BLE001 - whatever Ray raises is told to the driver, which says it to the user
            self._reply(0, error=f"{type(error).__name__}: {error}")
            return
        self._reply(0, ready=True)
        while (request := self._requests.get())["do"] != "close":
            if request["do"] == "available":
                self._reply(request["id"], available=self._available())
            elif request["do"] == "run":
                threading.Thread(target=self._run, args=(request,), name="attempt", daemon=True).start()
        ray.shutdown()
        self._reply(request["id"])

    def _read(self) -> None:
        with self._channel.makefile("r", encoding="utf-8") as lines:
            for line in lines:
                self._requests.put(json.loads(line))
        # The driver is gone: an embedded Ray is in this process's session, a cluster ends the actors of a lost job.
        fence.kill_session(os.getsid(0), but=os.getpid())
        os._exit(1)

    def _reply(self, identity: int, **facts: Any) -> None:
        with self._writing:
            self._channel.sendall((json.dumps({"id": identity} | facts) + "\n").encode())

    def _connect(self) -> None:
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "WARNING"}
        if not self._embedded:
            ray.init(address=self._settings.address, **quiet)
            return
        ray.init(
            num_cpus=max(os.cpu_count() or 1, self._settings.workers * self._settings.cpus_per_worker),
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            _node_ip_address="127.0.0.1",
            _temp_dir=self._settings.temporary,
            **quiet,
        )

    def _resources(self) -> dict[str, float]:
        # Once there was one, workers wait for GPUs that went away: on the head's processor a run would take years.
        self._gpus = self._gpus or bool(ray.cluster_resources().get("GPU", 0))
        return {"CPU": float(self._settings.cpus_per_worker)} | ({"GPU": 1.0} if self._gpus else {})

    def _available(self) -> int:
        """Workers that fit on each node, summed: a worker does not spread over nodes."""
        needs = self._resources()
        nodes: list[dict[str, float]] = list(available_resources_per_node().values())
        return sum(min(int(node.get(name, 0) // amount) for name, amount in needs.items()) for node in nodes)

    def _run(self, request: dict[str, Any]) -> None:
        try:
            facts = self._fit(request)
        except Exception as error:  # noqa: BLE001 - the driver decides what follows from it
            facts = {"kind": "lost", "message": f"{type(error).__name__}: {error}", "failed_ranks": []}
        self._reply(request["id"], **facts)

    def _fit(self, request: dict[str, Any]) -> dict[str, Any]:
        paths, attempt = RunPaths(Path(request["run_directory"])), request["attempt"]
        resources = self._resources()
        environment = {**_at_start(resources), **request["environment"]}
        trainer = DataParallelTrainer(
            train_function,
            train_loop_config={"entry": request["entry"], "run_directory": str(paths.root), "attempt": attempt},
            backend_config=WorldConfig(str(paths.workers(attempt)), self._embedded),
            scaling_config=ScalingConfig(
                num_workers=request["world_size"], use_gpu="GPU" in resources, resources_per_worker=resources
            ),
            run_config=RunConfig(
                name="ray-train",
                storage_path=str(paths.attempt(attempt)),
                failure_config=FailureConfig(max_failures=0),
                worker_runtime_env={"env_vars": environment} if environment else None,
            ),
        )
        try:
            trainer.fit()
        except WorkerGroupError as error:
            return _failed(error, json.loads(paths.workers(attempt).read_text("utf-8")))
        except RayError as error:
            return {"kind": "lost", "message": f"the Ray cluster was lost: {first_line(error)}", "failed_ranks": []}
        return {"kind": "finished", "message": "", "failed_ranks": []}


def _failed(error: WorkerGroupError, seats: list[dict[str, Any]]) -> dict[str, Any]:
    """The workers that died without raising, by rank, and where they were."""
    dead = {
        rank: failure.health_check_failure
        for rank, failure in error.worker_failures.items()
        if isinstance(failure, WorkerHealthCheckFailedError)
    }
    said = [
        f"worker {rank} on node {seats[rank]['node']} (process {seats[rank]['pid']}) died: {_why_dead(dead[rank])}"
        for rank in sorted(dead)
    ]
    return {"kind": "failed", "message": "; ".join(said), "failed_ranks": sorted(error.worker_failures)}


def _why_dead(error: Exception) -> str:
    text = str(error)
    if isinstance(error, OutOfMemoryError) or "running low on memory" in text:
        return f"out of memory ({first_line(error)})"
    if "node" in text and "terminated" in text:
        return "its node went away"
    why = "it was killed (signal 9; out of memory?), or NCCL gave up waiting for another worker, or native code crashed"
    return f"{why}; its last words are in logs/ray, or on that node in Ray's own logs"


def main() -> None:
    """Serve the driver on the other end of the socket."""
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # they are for the driver, which also tells when to end
    settings = HostSettings(**json.loads(sys.argv[1]))
    Host(settings, socket.socket(fileno=int(sys.argv[2]))).serve()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
