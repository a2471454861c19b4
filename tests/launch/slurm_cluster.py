"""A real Slurm of two nodes on this machine: own munged, slurmctld and two slurmd, in a directory of its own, on free ports."""

import os
import secrets
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from tests.spawn import free_port

_NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")

_CONF = """\
ClusterName=dstune
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/linear
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=1,sched_min_interval=0
ReturnToService=2
SlurmdParameters=config_overrides
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/none
JobRequeue=1
KillWait=10
MinJobAge=600
FirstJobId={first_job}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={n1} CPUs=2 RealMemory=1000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={n2} CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=urgent Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str | None:
    """Why no Slurm can be started here; None where one can."""
    if os.geteuid() != 0:
        return "Slurm's daemons want root"
    absent = [name for name in _NEEDED if shutil.which(name) is None]
    return f"not installed: {', '.join(absent)} (Debian: slurm-wlm)" if absent else None


class SlurmCluster:
    """Started by `with`; `environment` makes sbatch, squeue and scontrol talk to it (SLURM_CONF)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._before: dict[str, str | None] = {}

    def __enter__(self) -> "SlurmCluster":
        for name in ("state", "spool-n1", "spool-n2"):
            (self.folder / name).mkdir(parents=True)
        self.folder.chmod(0o755)
        self._before = {name: os.environ.get(name) for name in self.environment}
        os.environ.update(self.environment)
        with ExitStack() as stack:
            stack.callback(self._stop)
            self._start()
            stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def run(self, *command: str, check: bool = True) -> str:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        if check and done.returncode:
            raise AssertionError(f"{command}: {done.stderr}")
        return done.stdout.strip()

    def job(self, job_id: str) -> dict[str, str]:
        shown = self.run("scontrol", "show", "job", "--oneliner", job_id)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def wait_for(self, job_id: str, *states: str, seconds: float = 120) -> dict[str, str]:
        """The job's facts once its state is one of `states`."""
        for _ in ticks(seconds):
            facts = self.job(job_id)
            if facts["JobState"] in states:
                return facts
        raise AssertionError(
            f"job {job_id} is {facts['JobState']} ({facts['Reason']}), not {states}; {self.last_words()}"
        )

    def release(self, job_id: str) -> None:
        """Let a requeued job start soon: Slurm holds it for two minutes.

        Not at once: slurmd refuses a job ("credential revoked") whose new credential is of the second in which the old one ended.
        """
        self.run("scontrol", "update", f"JobId={job_id}", "StartTime=now+5seconds")

    def cancel_all(self) -> None:
        self.run("scancel", "--full", "--user=root", check=False)

    def last_words(self) -> str:
        return (self.folder / "slurmctld.log").read_text()[-2000:]

    def _start(self) -> None:
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        numbers = {"controller": free_port(), "n1": free_port(), "n2": free_port()}
        host = socket.gethostname().split(".")[0]
        first_job = 100_000 + secrets.randbelow(60_000_000)
        conf = _CONF.format(folder=self.folder, host=host, first_job=first_job, **numbers)
        (self.folder / "slurm.conf").write_text(conf)
        munge = [f"--socket={self.folder}/munge.socket", f"--key-file={key}", f"--pid-file={self.folder}/munged.pid"]
        files = [f"--log-file={self.folder}/munged.log", f"--seed-file={self.folder}/munged.seed"]
        self._daemon("munged", "--foreground", "--force", *munge, *files)
        for _ in ticks(30):
            if (self.folder / "munge.socket").exists():
                break
        self._daemon("slurmctld", "-D", "-c")
        for node in ("n1", "n2"):
            self._daemon("slurmd", "-D", "-N", node)
        for _ in ticks(90):
            if self.run("sinfo", "--noheader", "--format=%D %t", "--partition=main", check=False) == "2 idle":
                return
        raise AssertionError(f"Slurm did not come up: {self.last_words()}")

    def _daemon(self, *command: str) -> None:
        with (self.folder / f"{len(self._daemons)}-{command[0]}.out").open("wb") as output:
            self._daemons.append(subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT))

    def left_behind(self, job: int | str, seconds: float = 120) -> list[str]:
        """The commands of a job's processes that outlive it by so long. Slurm itself follows no process that left its parent."""
        found: list[str] = []
        for _ in ticks(seconds):
            found = list(_processes_of(str(job)))
            if not found:
                break
        return found

    def _stop(self) -> None:
        if len(self._daemons) == 4:
            self.cancel_all()
            for _ in ticks(30):
                if not self.run("squeue", "--noheader", check=False):
                    break
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _processes_of(job: str) -> Iterator[str]:
    for process in Path("/proc").iterdir():
        try:
            variables = (process / "environ").read_bytes().split(b"\0")
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
        except OSError:
            continue  # no process, or no longer one
        if f"SLURM_JOB_ID={job}".encode() in variables and command:
            yield command


def ticks(seconds: float, every: float = 0.25) -> Iterator[None]:
    """Come back every so often until the time is over; the caller returns or breaks when what it waits for is there."""
    end, pause = time.monotonic() + seconds, threading.Event()
    while time.monotonic() < end:
        yield
        pause.wait(every)
