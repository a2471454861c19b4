"""A run as a job of a Ray cluster: Ray queues it and starts the same driver on the cluster, in the same shared run directory.

The token comes from the environment (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH), never from a file of dstune's.
"""

import asyncio
import contextlib
import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstune.errors import Problem, UsageError, first_line
from dstune.launch import control
from dstune.launch.local import passed_environment
from dstune.paths import RunPaths

_STATES = {"PENDING": "queued", "RUNNING": "running", "SUCCEEDED": "ended", "FAILED": "ended", "STOPPED": "ended"}


@dataclass(frozen=True)
class JobRequest:
    """What will be sent to the cluster's job server."""

    address: str
    entrypoint: str
    """One shell line, every word quoted."""
    runtime_env: Mapping[str, Any]
    metadata: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"POST {self.address}/api/jobs/", f"entrypoint: {self.entrypoint}"]
        lines += [f"env: {name}={value}" for name, value in self.runtime_env["env_vars"].items()]
        return "\n".join([*lines, *(f"metadata: {name}={value}" for name, value in self.metadata.items())]) + "\n"


def request(paths: RunPaths, address: str | None, environment: Mapping[str, str], python: str = "python") -> JobRequest:
    """The job of a run. `python`: the cluster's interpreter, in which dstune is installed. Raises UsageError without an address."""
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS")
    if not address:
        do = "give --address http://HOST:8265, or `ray_address` in a site file, or RAY_API_SERVER_ADDRESS"
        raise UsageError(Problem("--to ray", "which Ray cluster?", do=do))
    if not str(paths.root).isprintable():
        raise UsageError(Problem(repr(str(paths.root)), "the run directory's name holds a control character"))
    words = [python, "-m", "dstune.cli.main", "drive", str(paths.root), "--address", "auto"]
    variables = passed_environment(os.environ) | dict(environment)
    return JobRequest(address, shlex.join(words), {"env_vars": variables}, {"dstune_run": paths.root.name})


def submit(paths: RunPaths, job: JobRequest) -> dict[str, Any]:
    """Send the job; returns the submission's record. Raises UsageError where the cluster refuses it or is not there."""
    paths.make()
    with _speaking_to(job.address) as client:
        job_id = client.submit_job(
            entrypoint=job.entrypoint, runtime_env=dict(job.runtime_env), metadata=dict(job.metadata)
        )
    return {"to": "ray", "address": job.address, "job_id": job_id}


def job_state(address: str, job_id: str) -> dict[str, Any]:
    """`{"state": "queued" | "running" | "ended" | "unknown", "ray": Ray's word, "reason"}`; unknown: to a cluster that answers.

    Raises NobodyAnswers where that is not so, and UsageError where the cluster refuses.
    """
    try:
        with _speaking_to(address) as client:
            info = client.get_job_info(job_id)
    except _NotKnown:
        return {"state": "unknown", "ray": "", "reason": "the cluster does not know the job (was it restarted?)"}
    word = info.status.value
    return {"state": _STATES[word], "ray": word, "reason": info.message or ""}


def stop(paths: RunPaths, address: str, job_id: str) -> str:
    """End the job: `cancelled` where it was still queued, `asked` where it runs (it saves first), `ended` where it is over.

    Ray's own stop gives a driver 3 seconds, so a running job is asked through the run directory's control file.
    """
    state = job_state(address, job_id)["state"]
    if state == "running":
        control.request_stop(paths, control.USER)
        return "asked"
    if state != "queued":
        return "ended"
    with _speaking_to(address) as client:
        client.stop_job(job_id)
    return "cancelled"


def logs(address: str, job_id: str, follow: bool) -> Iterator[str]:
    """What the job's driver said, line by line; `follow` goes on until the job ends."""
    if not follow:
        with _speaking_to(address) as client:
            yield from client.get_job_logs(job_id).splitlines()
        return
    with _speaking_to(address) as client, contextlib.closing(asyncio.new_event_loop()) as loop:
        chunks = aiter(client.tail_job_logs(job_id))
        rest = ""
        while (chunk := loop.run_until_complete(_next(chunks))) is not None:
            *lines, rest = (rest + chunk).split("\n")
            yield from lines
        if rest:
            yield rest


async def _next(chunks: Any) -> str | None:
    return await anext(chunks, None)


def _authorization() -> dict[str, str]:
    """The token's header, given by hand: Ray itself sends a token only where RAY_AUTH_MODE said so before it was imported."""
    token = os.environ.get("RAY_AUTH_TOKEN", "")
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not token and file.is_file():
        token = file.read_text("utf-8").strip()
    return {"authorization": f"Bearer {token}"} if token else {}


class NobodyAnswers(UsageError):
    """There is no job server at the address, or none that can be reached from here: what became of its jobs is not known."""


class _NotKnown(UsageError):
    """The job server has nothing by that name."""


class _speaking_to:
    """A client of the job server; what it raises for the outside world's faults becomes a UsageError that says what to do."""

    def __init__(self, address: str) -> None:
        self._address = address

    def __enter__(self) -> Any:
        from ray.job_submission import JobSubmissionClient

        try:
            return JobSubmissionClient(self._address, headers=_authorization())
        except self._faults() as error:
            raise self._problem(error) from None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, self._faults()):
            raise self._problem(error) from None

    def _faults(self) -> tuple[type[Exception], ...]:
        from ray.exceptions import AuthenticationError

        return ConnectionError, RuntimeError, OSError, AuthenticationError

    def _problem(self, error: BaseException) -> UsageError:
        came = f"the Ray cluster refuses: {first_line(error)}"
        do = "is the cluster up and the address right (http://HOST:8265)? its token goes into RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
        return _kind(error)(Problem(self._address, came, do=do))


def _kind(error: BaseException) -> type[UsageError]:
    if isinstance(error, ConnectionError):
        return NobodyAnswers
    return _NotKnown if str(error).startswith("Request failed with status code 404") else UsageError
