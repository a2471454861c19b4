"""The executor on Ray: an embedded one on this machine, or an existing cluster. Ray itself lives in `ray_host`'s process."""

import contextlib
import itertools
import json
import os
import queue
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dstune.errors import Problem, UsageError
from dstune.launch import fence
from dstune.loggers import get_logger
from dstune.protocols import AttemptOutcome

log = get_logger(__name__)

_START_SECONDS = 120.0
_LISTENER_SECONDS = 10.0
_ANSWER_SECONDS = 30.0
_CLOSE_SECONDS = 20.0
_LONGEST_TEMPORARY = 36
_LARGEST_LOG_BYTES = 1 << 20

_PASSED_PREFIXES = ("DSTUNE_", "HF_", "TRANSFORMERS_", "TOKENIZERS_", "NCCL_", "GLOO_", "UCX_", "FI_", "TORCH_NCCL_")
_PASSED_NAMES = (
    "TORCH_EXTENSIONS_DIR",
    "OMP_NUM_THREADS",
    "CUDA_DEVICE_ORDER",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "XDG_CACHE_HOME",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_MAX_ATTEMPTS",
)
_SECRET_WORDS = ("TOKEN", "SECRET", "PASSWORD", "CREDENTIAL", "API_KEY", "AUTH")

_QUIET_RAY = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


@dataclass(frozen=True)
class HostSettings:
    """What the process that holds Ray needs to know."""

    address: str | None
    """A cluster's address or `auto`; None: embed one."""
    workers: int
    """The embedded Ray has room for so many, however few cores there are."""
    cpus_per_worker: int
    gpus: bool
    """A worker takes a GPU also while no machine with one is in the cluster."""
    temporary: str
    """An embedded Ray's directory; short, for a Unix socket's path has at most 107 characters."""


def passed_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that may reach workers through Ray, which keeps them in the open: settings, never secrets."""
    return {
        name: value
        for name, value in environment.items()
        if (name.startswith(_PASSED_PREFIXES) or name in _PASSED_NAMES)
        and not any(word in name for word in _SECRET_WORDS)
    }


class RayExecutor:
    """`protocols.Executor` on Ray Train v2: one attempt, one worker group, no retries of Ray's own."""

    def __init__(
        self,
        workers: int,
        cpus_per_worker: int = 1,
        gpus: bool = False,
        address: str | None = None,
        log_directory: Path | None = None,
        entry: str = "dstune.worker:main",
    ) -> None:
        """`entry` names `module:function(run_directory, attempt)`, which every worker runs. Nothing starts before it is needed."""
        self._workers, self._cpus, self._gpus, self._address = workers, cpus_per_worker, gpus, address
        self._logs, self._entry = log_directory, entry
        self._host: _HostProcess | None = None
        self._starting = threading.Lock()

    def available_workers(self) -> int:
        """How many workers could be placed now; 0 where Ray does not answer. Starts Ray where none runs.

        Raises UsageError where it cannot be started or reached.
        """
        host = self._running_host()
        answer = host.ask("available", _ANSWER_SECONDS)
        if answer is None and not host.alive:
            self._drop_host()
        return 0 if answer is None else int(answer["available"])

    def run(self, run_directory: str, attempt: int, world_size: int, environment: Mapping[str, str]) -> AttemptOutcome:
        """Start the workers and block until they are gone. `environment` goes over this process's own variables."""
        variables = dict(environment)
        if self._address is not None:  # an embedded Ray's workers inherit this process's variables
            variables = {"OMP_NUM_THREADS": str(self._cpus)} | passed_environment(os.environ) | variables
        facts = {"run_directory": run_directory, "attempt": attempt, "world_size": world_size, "entry": self._entry}
        host = self._running_host()
        answer = host.ask("run", None, environment=variables, **facts)
        if answer is None:
            self._drop_host()
            return AttemptOutcome(
                "lost", "killed by the driver" if host.killed else "Ray went away (its process ended)"
            )
        if answer["kind"] == "lost":
            self._drop_host()
        elif answer["kind"] == "failed" and self._host is not None:
            self._host.keep_logs()
        return AttemptOutcome(answer["kind"], answer["message"], tuple(answer["failed_ranks"]))

    def kill(self) -> None:
        """End the attempt's workers at once, and with them the process that holds Ray: a cluster ends a lost driver's workers."""
        if self._host is not None:
            self._host.kill()

    def close(self) -> None:
        """End the embedded Ray, or leave the cluster."""
        self._drop_host()

    def __enter__(self) -> "RayExecutor":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _running_host(self) -> "_HostProcess":
        with self._starting:
            if self._host is None or not self._host.alive:
                if self._host is not None:
                    self._host.close()
                    self._host = None
                _require_listener(self._address)
                self._host = _HostProcess(self._address, self._workers, self._cpus, self._gpus, self._logs)
            return self._host

    def _drop_host(self) -> None:
        with self._starting:
            host, self._host = self._host, None
        if host is not None:
            host.close()


class _HostProcess:
    """The other end of `ray_host`: starts it, asks it, ends it and all that it started."""

    def __init__(self, address: str | None, workers: int, cpus: int, gpus: bool, logs: Path | None) -> None:
        self._address, self._logs = address, logs
        self._temporary = Path(tempfile.mkdtemp(prefix="dstune-", dir=_short_temporary()))
        # Ray opens its directory to everybody: it gets one below ours, which is private.
        settings = HostSettings(address, workers, cpus, gpus, str(self._temporary / "ray"))
        self._channel, theirs = socket.socketpair()
        self._answers: dict[int, queue.SimpleQueue[dict[str, Any] | None]] = {0: queue.SimpleQueue()}
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self.alive, self.killed = True, False
        command = [sys.executable, "-m", "dstune.launch.ray_host", json.dumps(asdict(settings)), str(theirs.fileno())]
        with self._output() as output:
            self._process = subprocess.Popen(
                command,
                env=self._environment(),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        theirs.close()
        threading.Thread(target=self._read, name="ray-host", daemon=True).start()
        self._await_start()

    def ask(self, do: str, seconds: float | None, **facts: Any) -> dict[str, Any] | None:
        """Send a request and wait for its answer; None where the process went away or did not answer in time."""
        answer: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        with self._lock:
            if not self.alive:
                return None
            number = next(self._numbers)
            self._answers[number] = answer
        if not self._send(number, do, facts):
            return None
        try:
            return answer.get(timeout=seconds)
        except queue.Empty:
            return None

    def kill(self) -> None:
        """End the process and an embedded Ray without a word; whoever waits for an answer gets None."""
        self.killed = True
        fence.kill_session(self._process.pid)

    def keep_logs(self) -> None:
        """Copy what an embedded Ray's processes wrote to logs/ray, where a crash in native code left its last words."""
        if self._logs is None:
            return
        for file in self._temporary.glob("ray/session_*/logs/*"):
            if file.is_symlink() or not file.is_file() or file.stat().st_size == 0 or file.parent.parent.is_symlink():
                continue
            self._logs.mkdir(parents=True, exist_ok=True)
            with file.open("rb") as source:
                source.seek(max(0, file.stat().st_size - _LARGEST_LOG_BYTES))
                (self._logs / file.name).write_bytes(source.read())

    def close(self) -> None:
        """End the process, its Ray, and the temporary directory."""
        if self.alive:
            self.ask("close", _CLOSE_SECONDS)
        fence.kill_session(self._process.pid)  # before `wait`: until then its number is nobody else's
        self._process.wait()
        self._channel.close()
        shutil.rmtree(self._temporary, ignore_errors=True)

    def _await_start(self) -> None:
        try:
            answer = self._answers[0].get(timeout=_START_SECONDS)
        except queue.Empty:
            answer = {"error": f"Ray did not start within {_START_SECONDS:.0f} s"}
        if answer is not None and answer.get("ready"):
            return
        said = answer["error"] if answer else "its process ended"
        self.keep_logs()
        self.close()
        where = self._address or "the embedded Ray"
        if self._address is None:
            do = (
                f"see {self._logs}" if self._logs else "start again with free memory and a writable temporary directory"
            )
        else:
            do = "is the address right, the cluster up, and its token in RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH?"
        raise UsageError(Problem(where, f"cannot reach Ray: {said}", do=do))

    def _send(self, number: int, do: str, facts: dict[str, Any]) -> bool:
        try:
            self._channel.sendall((json.dumps({"id": number, "do": do} | facts) + "\n").encode())
        except OSError:
            return False
        return True

    def _read(self) -> None:
        with contextlib.suppress(OSError), self._channel.makefile("r", encoding="utf-8") as lines:
            for line in lines:
                answer = json.loads(line)
                with self._lock:
                    waiting = self._answers.pop(answer["id"], None) if answer["id"] else self._answers[0]
                if waiting is not None:
                    waiting.put(answer)
        with self._lock:
            self.alive = False
            for waiting in self._answers.values():
                waiting.put(None)

    def _environment(self) -> dict[str, str]:
        environment = dict(os.environ) | _QUIET_RAY
        if self._address is not None:
            return environment
        environment.pop("RAY_ADDRESS", None)
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
        environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # Ray's way to say: one node, on the loopback address
        if "RAY_AUTH_MODE" not in environment:
            token = self._temporary / "token"
            token.touch(mode=0o600)
            token.write_text(secrets.token_hex(32), "ascii")
            environment.pop("RAY_AUTH_TOKEN", None)
            environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        return environment

    def _output(self) -> Any:
        if self._logs is None:
            return open(os.devnull, "wb")  # noqa: PTH123 - closed by the caller's `with`
        self._logs.mkdir(parents=True, exist_ok=True)
        return (self._logs / "driver.log").open("ab")


def _require_listener(address: str | None) -> None:
    """Raises UsageError where nobody listens at HOST:PORT: Ray itself would try for two minutes."""
    host, _, port = (address or "").rpartition(":")
    if not host or not port.isdigit() or "/" in host:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_LISTENER_SECONDS).close()
    except OSError as error:
        do = "is the address right (HOST:PORT, as `ray start` printed it) and the cluster up?"
        raise UsageError(Problem(str(address), f"cannot reach Ray: {error.strerror or error}", do=do)) from None


def _short_temporary() -> str:
    directory = tempfile.gettempdir()
    return directory if len(directory) <= _LONGEST_TEMPORARY else "/tmp"
