"""A real Ray head with a token and a job server, on the loopback address and free ports, ended by its own process."""

import os
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

from dstune.launch.fence import kill_session
from tests.launch.process_executor import ROOT
from tests.launch.slurm_cluster import ticks
from tests.spawn import free_port


class RayHead:
    """Started by `with`. `address` is the job server's; `token` is in this process's environment meanwhile."""

    def __init__(self, folder: Path, cpus: int = 2) -> None:
        self.folder, self.cpus = folder, cpus
        self.token = secrets.token_hex(32)
        self.port, self.dashboard = free_port(), free_port()
        self.address = f"http://127.0.0.1:{self.dashboard}"
        self.cluster_address = f"127.0.0.1:{self.port}"

    def __enter__(self) -> "RayHead":
        token = self.folder / "token"
        token.touch(mode=0o600)
        token.write_text(self.token)
        self._before = dict(os.environ)
        self._temporary = tempfile.TemporaryDirectory(prefix="dstune-head-", dir="/tmp", ignore_cleanup_errors=True)
        loopback = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)} | loopback
        ports = [f"--port={self.port}", f"--dashboard-port={self.dashboard}", f"--ray-client-server-port={free_port()}"]
        free = ["--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"]
        here = ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--temp-dir={self._temporary.name}"]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--num-cpus={self.cpus}"]
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        with (self.folder / "head.log").open("wb") as output:
            self._process = subprocess.Popen(
                [*command, *ports, *free, *here],
                env=os.environ | {"PYTHONPATH": str(ROOT), "PATH": path, "OMP_NUM_THREADS": "1"},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        kill_session(self._process.pid)  # asked to end, it takes longer than 10 s
        self._process.wait()
        self._temporary.cleanup()
        os.environ.clear()
        os.environ |= self._before

    def _wait(self) -> None:
        from ray.job_submission import JobSubmissionClient

        for _ in ticks(120):
            assert self._process.poll() is None, (self.folder / "head.log").read_text()
            try:
                JobSubmissionClient(self.address, headers={"authorization": f"Bearer {self.token}"}).list_jobs()
                return
            except (ConnectionError, RuntimeError) as error:
                last = error
        raise AssertionError(f"Ray's job server did not come up: {last}")
