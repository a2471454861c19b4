"""What checkpoints take, and how often one pays: the disk they fill, the time they cost, the work that a failure loses."""

import math
from dataclasses import dataclass

from dstune.planning.hardware import GB, Cluster
from dstune.planning.memory import Memory

GPU_HOURS_BETWEEN_FAILURES = 50_700.0
"""419 in 54 days on 16,384 GPUs (Llama 3's report, section 3.3.4)."""
RESTART_SECONDS = 120.0
"""From a failure until the next attempt trains, beside the work that is done again."""
_WRITE_RATE = 2.0 * GB
"""Bytes/s that one machine writes to a checkpoint's disk."""
_COPY_RATE = 7.0 * GB
"""Bytes/s that a worker copies to memory of the host that it used before."""


@dataclass(frozen=True, kw_only=True)
class Saving:
    """Checkpoints of one run."""

    bytes: int
    """One, on the disk, over all workers."""
    shard_bytes: int
    """Of it, one worker's."""
    node_bytes: int
    """Of it, one machine's workers'."""
    disk_bytes: int
    """All that stay at once, with the one that is being written."""
    host_bytes_per_node: int
    """Copies that are written behind the training; they may be left out (`checkpoint.background`)."""
    background: bool
    """Whether there is room for these copies; otherwise the training waits for the disk."""
    seconds: float
    """To write one."""
    waiting_seconds: float
    """Of it, what the training waits for."""
    interval_seconds: float
    """Between two saves, for the least loss."""
    goodput: float
    """Share of the time that makes progress then."""


def saving(memory: Memory, cluster: Cluster, *, kept: int, node_hours: float, host_room: int) -> Saving:
    """Of a run that keeps `kept` checkpoints. `node_hours`: mean hours of one machine between failures; `host_room`: what one machine's
    memory has left beside the training.
    """
    copies = memory.checkpoint_copy * cluster.per_node
    seconds = memory.checkpoint_bytes / (_WRITE_RATE * cluster.nodes)
    background = copies <= host_room
    waiting = memory.checkpoint_copy / min(_COPY_RATE, cluster.device.host_link) if background else seconds
    mean = node_hours / cluster.nodes
    every = max(seconds, interval(waiting, mean))
    return Saving(
        bytes=memory.checkpoint_bytes,
        shard_bytes=memory.checkpoint_copy,
        node_bytes=copies,
        disk_bytes=memory.checkpoint_bytes * (kept + 1),
        host_bytes_per_node=copies,
        background=background,
        seconds=seconds,
        waiting_seconds=waiting,
        interval_seconds=every,
        goodput=goodput(waiting, every, RESTART_SECONDS, mean),
    )


def interval(waiting_seconds: float, mean_hours: float) -> float:
    """Seconds between two saves that lose the least: sqrt(2 C M) (Young 1974), C the wait for one and M the mean time between failures.

    Daly's (2006) further terms change it by less than C, which for C of minutes and M of hours nobody could tell.
    """
    return math.sqrt(2 * waiting_seconds * mean_hours * 3600)


def goodput(waiting_seconds: float, every_seconds: float, restart_seconds: float, mean_hours: float) -> float:
    """Share of the time that makes progress: 1 / (1 + C/t + (t/2 + R)/M)."""
    mean = mean_hours * 3600
    saved = waiting_seconds / every_seconds if every_seconds else 0.0
    return 1 / (1 + saved + (every_seconds / 2 + restart_seconds) / mean)
