"""Runs that were handed to Ray Jobs or Slurm, and those that were not: where they stand, what they said, how to stop them."""

import json
import math
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dstune.atomic import write_json
from dstune.config.schema import RunConfig, SiteConfig
from dstune.errors import Problem, UsageError, first_line
from dstune.launch import control, fence, machine, ray_job, slurm
from dstune.launch.status import ACTIVE, FINAL, StatusFile, driver_lives, read_status
from dstune.loggers import get_logger
from dstune.paths import RunPaths

log = get_logger(__name__)

_LOOK_SECONDS = 0.5
_NOT_STARTED = "nothing drives it; `dstune resume` starts it"
_INTERRUPTED = "its driver is gone without a word; `dstune resume` goes on from the newest committed step"

_ASK_THERE = "ask `dstune status` there; where that machine is gone, `dstune resume` goes on"


def describe(paths: RunPaths, config: RunConfig, to: str, site: SiteConfig, address: str | None) -> str:
    """Exactly what `submit` would send; nothing is written."""
    if to == "slurm":
        return slurm.render(paths, site, allocation(config))
    return str(ray_job.request(paths, _ray_address(config, site, address), site.env))


def submit(paths: RunPaths, config: RunConfig, to: str, site: SiteConfig, address: str | None) -> dict[str, Any]:
    """Hand the run over and note where it went (submission.json). Raises UsageError where it is being driven, or refused.

    A run whose Ray cluster does not answer may be handed to another one: its job went with the cluster, or who asks knows more.
    """
    address = _ray_address(config, site, address) if to == "ray" else None
    _refuse_active(paths, to, address)
    before = read_status(paths)
    status = StatusFile(paths)
    status.adopt(before)
    control.clear(paths)
    status.write(state="queued", reason=f"submitted to {to}", message=None)  # before: the job may start at once
    try:
        if to == "slurm":
            sent = slurm.submit(paths, site, allocation(config))
        else:
            sent = ray_job.submit(paths, ray_job.request(paths, address, site.env))
    except BaseException as error:
        told = {name: before.get(name) for name in ("reason", "message")}
        if before["state"] == "planned":
            do = f"`dstune resume {paths.root} --to {to}` hands it over again"
            told = {"reason": f"not submitted to {to}: {first_line(error)}; {do}", "message": str(error)}
        status.write(state=before["state"], **told)
        raise
    write_json(paths.submission, sent | {"time": round(time.time(), 3)})
    return {"id": sent["job_id"], "to": to, "run_directory": str(paths.root)} | sent


def allocation(config: RunConfig) -> slurm.Allocation:
    """What the run asks Slurm for: its nodes, and on each the cores (and GPUs) of its workers."""
    cluster = config.cluster
    cores = machine.cores_of_worker(cluster, elsewhere=True)
    if cluster.nodes is not None:
        per_node = cluster.gpus_per_node or 1
        return slurm.Allocation(cluster.nodes, per_node * cores, cluster.gpus_per_node or 0)
    most = (
        1 if cluster.workers == "auto" else cluster.workers if isinstance(cluster.workers, int) else cluster.workers[1]
    )
    return slurm.Allocation(1, most * cores)


def submission(paths: RunPaths) -> dict[str, Any] | None:
    """Where the run was handed to, or None for one that was started here."""
    try:
        return json.loads(paths.submission.read_text("utf-8"))
    except FileNotFoundError:
        return None


def status(paths: RunPaths) -> dict[str, Any]:
    """Where the run stands: status.json, corrected by who drives it and by the queue it is in.

    `state` is one of planned, queued, running, succeeded, failed, stopped, preempted. A run whose driver died has failed, and
    `interrupted` is true then; of a driver on another machine that holds no lock here, nobody knows, and the run's own word stays.
    """
    shown = {"name": paths.root.name, "run_directory": str(paths.root)} | read_status(paths)
    shown |= {"interrupted": False}
    sent = submission(paths)
    if shown["state"] == "planned" and not shown.get("reason"):
        shown |= {"reason": None if driver_lives(paths) else _NOT_STARTED}
    if shown["state"] not in (*ACTIVE, "preempted") or driver_lives(paths) or _is_being_submitted(shown, sent):
        return shown
    if sent is None:
        host = shown.get("host")
        return shown | (_gone(shown["state"]) if host == socket.gethostname() else _elsewhere(shown["state"], host))
    job = _job_state(sent)
    shown["job"] = {"to": sent["to"], "id": sent["job_id"]} | job
    if job["state"] == "queued":
        return shown | {"state": "queued", "reason": f"{sent['to']}: {job['reason'] or 'queued'}"}
    if job["state"] in ("running", "unreachable"):
        return shown
    return shown | _gone(shown["state"])


def stop(paths: RunPaths, wait: bool = False, seconds: float | None = None) -> dict[str, Any]:
    """Commit and stop: a running run at the end of its step, a queued one by leaving the queue. The status then.

    `wait` returns when it has stopped (after at most `seconds`). Raises UsageError for a run that is over or was never started.
    """
    now = status(paths)
    if now["state"] in FINAL and not now["interrupted"]:
        raise UsageError(Problem(str(paths.root), f"the run is over already ({now['state']} at step {now['step']})"))
    if now["state"] == "planned" or now["interrupted"]:
        raise UsageError(Problem(str(paths.root), "nothing drives this run", do="`dstune resume` goes on with it"))
    sent = submission(paths)
    if sent is None or driver_lives(paths):
        control.request_stop(paths, control.USER)
    elif _stop_job(paths, sent) == "cancelled":
        cancelled = StatusFile(paths)
        cancelled.adopt(read_status(paths))
        cancelled.write(state="stopped", reason="taken out of the queue")
    return _await_end(paths, seconds) if wait else status(paths)


def logs(paths: RunPaths, follow: bool = False, rank: int | None = None) -> Iterator[str]:
    """What the driver (or the worker of `rank`) wrote, line by line; `follow` goes on until the run ends."""
    sent = submission(paths)
    if rank is None and sent is not None and sent["to"] == "ray" and not paths.driver_log.exists():
        yield from ray_job.logs(sent["address"], sent["job_id"], follow)
        return
    file = _log_file(paths, sent, rank)
    if not file.exists() and not (follow and status(paths)["state"] in ACTIVE):
        raise UsageError(
            Problem(str(file), "no log there yet", do=f"`dstune status {paths.root.name}` says where it stands")
        )
    yield from _lines(file, paths, follow)


def _log_file(paths: RunPaths, sent: dict[str, Any] | None, rank: int | None) -> Path:
    if rank is not None:
        return paths.rank_log(rank)
    if sent is not None and sent["to"] == "slurm":
        return slurm.log_files(paths, sent["job_id"])[0]
    return paths.driver_log if paths.driver_log.exists() else paths.rank_log(0)


def _lines(file: Path, paths: RunPaths, follow: bool) -> Iterator[str]:
    """Whole lines; the last one too, when nothing more will come."""
    offset, rest = 0, b""
    pause = threading.Event()
    while True:
        over = not follow or not _goes_on(paths)  # looked at before reading, so that the last words are read
        if file.exists():
            with file.open("rb") as stream:
                stream.seek(offset)
                new = stream.read()
            offset += len(new)
            *lines, rest = (rest + new).split(b"\n")
            yield from (line.decode("utf-8", errors="replace") for line in lines)
        if over:
            if rest:
                yield rest.decode("utf-8", errors="replace")
            return
        pause.wait(_LOOK_SECONDS)


def _goes_on(paths: RunPaths) -> bool:
    return status(paths)["state"] in ACTIVE


def _await_end(paths: RunPaths, seconds: float | None) -> dict[str, Any]:
    began, pause = time.monotonic(), threading.Event()
    while True:
        now = status(paths)
        if now["state"] not in ACTIVE:
            return now
        if seconds is not None and time.monotonic() - began > seconds:
            return now
        pause.wait(_LOOK_SECONDS)


def _gone(state: str) -> dict[str, Any]:
    return {"state": "failed", "interrupted": True, "reason": _INTERRUPTED} if state in ACTIVE else {}


def _is_being_submitted(shown: dict[str, Any], sent: dict[str, Any] | None) -> bool:
    """Whether who wrote that it is queued waits for the queue's answer, with which submission.json comes."""
    if shown["state"] != "queued" or shown.get("host") != socket.gethostname():
        return False
    return (sent is None or sent.get("time", math.inf) < shown["time"]) and fence.started(int(shown["pid"])) is not None


def _elsewhere(state: str, host: Any) -> dict[str, Any]:
    """Locks are not seen from every machine: what drives a run on another one may live."""
    return (
        {"reason": f"its driver was on {host}, and holds no lock that is seen here: {_ASK_THERE}"}
        if state in ACTIVE
        else {}
    )


def _job_state(sent: dict[str, Any]) -> dict[str, Any]:
    """The queue's word; where it refuses (`running`) or does not answer (`unreachable`), what status.json says stays."""
    try:
        if sent["to"] == "slurm":
            return slurm.job_state(sent["job_id"])
        return ray_job.job_state(sent["address"], sent["job_id"])
    except ray_job.NobodyAnswers as error:
        return {"state": "unreachable", "reason": str(error)}
    except UsageError as error:
        return {"state": "running", "reason": str(error)}


def _stop_job(paths: RunPaths, sent: dict[str, Any]) -> str:
    if sent["to"] == "slurm":
        return slurm.stop(paths, sent["job_id"])
    return ray_job.stop(paths, sent["address"], sent["job_id"])


def _refuse_active(paths: RunPaths, to: str, address: str | None) -> None:
    """`to` and `address`: where the run is to go."""
    now = status(paths)
    lives, before = driver_lives(paths), submission(paths)
    if not lives and not _is_being_submitted(now, before) and (now["state"] not in ACTIVE or before is None):
        return
    do = f"watch it with `dstune status {paths.root.name}`, or end it with `dstune stop {paths.root.name}`"
    if not lives and now.get("job", {}).get("state") == "unreachable":
        sent = submission(paths) or {}
        if (to, _same(address)) != (sent["to"], _same(sent["address"])):
            log.warning("%s: job %s at %s does not answer, and is left", paths.root, sent["job_id"], sent["address"])
            return
        do = "its Ray cluster does not answer: wait for it, or name another one (`--address`) to hand the run to"
    raise UsageError(Problem(str(paths.root), f"this run is {now['state']} already", do=do))


def _same(address: str | None) -> str | None:
    return address and address.rstrip("/")


def _ray_address(config: RunConfig, site: SiteConfig, address: str | None) -> str | None:
    return address or site.ray_address or config.cluster.address
