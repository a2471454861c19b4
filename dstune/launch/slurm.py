"""A run as a Slurm batch job: one readable script that brings up Ray over the allocation and runs the same driver."""

import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dstune.atomic import write_text
from dstune.config.schema import SiteConfig
from dstune.errors import FitError, Problem, UsageError
from dstune.launch import control
from dstune.paths import RunPaths, shared_files

_COMMAND_SECONDS = 60
_START_SECONDS = 120

_QUEUED = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "SUSPENDED")
_RUNNING = ("RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING", "RESIZING", "STOPPED")


@dataclass(frozen=True)
class Allocation:
    """What a run asks Slurm for."""

    nodes: int
    """Machines."""
    cpus_per_node: int
    """Cores on each: workers on a node times cores of a worker."""
    gpus_per_node: int = 0
    """GPUs on each; 0: none are asked for."""
    python: str = sys.executable
    """The interpreter, at the same path on every node."""
    options: Mapping[str, str | int] = field(default_factory=dict)
    """sbatch's long options that go over the site's."""


def checked(value: str | int, what: str) -> str:
    """The value as text. Raises UsageError where a line end or another control character would leave its place in a script."""
    text = str(value)
    if not text.isprintable():
        raise UsageError(Problem(what, f"{text!r} holds a control character", expected="one line of text"))
    return text


def render(paths: RunPaths, site: SiteConfig, allocation: Allocation) -> str:
    """The batch script, complete: exactly what `sbatch` will be given."""
    run_directory = checked(str(paths.root), "the run directory")
    template = (shared_files("cluster") / "slurm.sbatch").read_text("utf-8")
    values = {
        "OPTIONS": "\n".join(_options(paths, site, allocation)),
        "RUN_DIRECTORY": shlex.quote(run_directory),
        "PYTHON": shlex.quote(checked(allocation.python, "python")),
        "SETUP": "\n".join(checked(line, "the site's setup") for line in site.setup),
        "ENVIRONMENT": "\n".join(_exports(site)),
        "CPUS_PER_NODE": str(allocation.cpus_per_node),
        "START_SECONDS": str(_START_SECONDS),
    }
    parts = template.split("@@")  # every other part is a key; what a value holds is never looked at again
    return "".join(values[part] if number % 2 else part for number, part in enumerate(parts))


def script_file(paths: RunPaths) -> Path:
    """Where the script of the last submission stands."""
    return paths.root / "submit.sbatch"


def submit(paths: RunPaths, site: SiteConfig, allocation: Allocation) -> dict[str, Any]:
    """Hand the run to `sbatch`; returns the submission's record. Raises UsageError, or FitError where Slurm refuses it."""
    paths.make()
    script = script_file(paths)
    write_text(script, render(paths, site, allocation))
    done = _slurm(["sbatch", "--parsable", str(script)])
    if done.returncode:
        raise FitError(
            Problem("sbatch", done.stderr.strip(), do=f"the script is {script}; the site file sets its options")
        )
    return {"to": "slurm", "job_id": done.stdout.strip().split(";")[0], "script": str(script)}


def job_state(job_id: str) -> dict[str, Any]:
    """`{"state": "queued" | "running" | "ended" | "unknown", "slurm": Slurm's word, "reason", "nodes", "start"}`."""
    fields = _show_job(job_id) or _account(job_id)
    if not fields:
        return {"state": "unknown", "slurm": "", "reason": "Slurm does not know the job any more"}
    word = fields["JobState"].split()[0]
    state = "queued" if word in _QUEUED else "running" if word in _RUNNING else "ended"
    shown = {"slurm": word, "reason": fields.get("Reason", ""), "nodes": fields.get("NodeList", "")}
    return {"state": state} | shown | {"start": fields.get("StartTime", ""), "restarts": fields.get("Restarts", "")}


def stop(paths: RunPaths, job_id: str) -> str:
    """End the job: `cancelled` where it was still queued, `asked` where it runs (it saves first), `ended` where it is over."""
    state = job_state(job_id)["state"]
    if state == "running":
        control.request_stop(paths, control.USER)
        return "asked"
    if state != "queued":
        return "ended"
    done = _slurm(["scancel", "--state=PENDING", job_id])
    if done.returncode:
        raise UsageError(Problem("scancel", done.stderr.strip()))
    if job_state(job_id)["state"] == "running":  # it started meanwhile
        control.request_stop(paths, control.USER)
        return "asked"
    return "cancelled"


def log_files(paths: RunPaths, job_id: str) -> list[Path]:
    """What the job's script and driver said."""
    return [paths.logs / f"slurm-{job_id}.out"]


def _options(paths: RunPaths, site: SiteConfig, allocation: Allocation) -> list[str]:
    slurm = site.slurm
    if "\\" in str(paths.root):  # a backslash switches Slurm's own %j off
        raise UsageError(Problem(str(paths.root), "Slurm cannot write into a path with a backslash"))
    options: dict[str, str | int | None] = {
        "job-name": f"dstune-{paths.root.name}",
        "nodes": allocation.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": allocation.cpus_per_node,
        "gpus-per-node": allocation.gpus_per_node or None,
        "output": str(paths.logs).replace("%", "%%") + "/slurm-%j.out",
        "open-mode": "append",
        "signal": f"B:USR1@{slurm.signal_seconds}",
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "time": slurm.time,
    }
    options |= slurm.options | dict(allocation.options)
    lines = ["#SBATCH --requeue"]
    for name, value in options.items():
        if value is None:
            continue
        if not name.replace("-", "").isalnum():
            raise UsageError(
                Problem("slurm.options", f"{name!r} is no option of sbatch", expected="a long option's name")
            )
        lines.append(f"#SBATCH --{name}={_directive(checked(value, f'slurm option {name}'))}")
    return lines


def _directive(value: str) -> str:
    """Quoted for an #SBATCH line, where a backslash escapes within and without double quotes, and # begins no comment in them."""
    if value and all(c.isalnum() or c in "-_./:@%,+=" for c in value):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _exports(site: SiteConfig) -> list[str]:
    lines: list[str] = []
    for name, value in site.env.items():
        if not name.isidentifier() or not name.isascii():
            raise UsageError(Problem("the site's env", f"{name!r} is no name of a variable"))
        lines.append(f"export {name}={shlex.quote(checked(value, f'the site variable {name}'))}")
    return lines


def _show_job(job_id: str) -> dict[str, str]:
    done = _slurm(["scontrol", "show", "job", "--oneliner", job_id])
    return dict(word.split("=", 1) for word in done.stdout.split() if "=" in word) if done.returncode == 0 else {}


def _account(job_id: str) -> dict[str, str]:
    """The accounting's word, where the controller has forgotten the job."""
    done = _slurm(
        ["sacct", "--allocations", "--noheader", "--parsable2", "--jobs", job_id, "--format", "State,NodeList"]
    )
    line = done.stdout.strip().splitlines()[:1]
    if done.returncode or not line:
        return {}
    state, _, nodes = line[0].partition("|")
    return {"JobState": state, "NodeList": nodes}


def _slurm(command: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_SECONDS, check=False)
    except FileNotFoundError:
        do = "run this on a machine that can submit to Slurm, or print the script with --dry-run"
        raise UsageError(Problem(command[0], "not found", do=do)) from None
    except subprocess.TimeoutExpired:
        raise UsageError(
            Problem(command[0], f"no answer within {_COMMAND_SECONDS} s", do="is slurmctld up? (scontrol ping)")
        ) from None
