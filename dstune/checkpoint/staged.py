"""A save from disks that the nodes do not share: each shard goes over its node's own disk into the store, where alone it is committed."""

import secrets
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dstune.atomic import durable_file, remove_directory
from dstune.checkpoint.agreement import agreed
from dstune.checkpoint.commit import CommitRecord, Intent, WriteShard, seal
from dstune.checkpoint.layout import FileRecord, SliceEntry
from dstune.checkpoint.remote import Store
from dstune.checkpoint.resolve import committed
from dstune.checkpoint.shards import entries, read_header
from dstune.paths import CheckpointPaths, step_directory
from dstune.protocols import Control


def commit(
    staging: Path, store: Store, leader: int, intent: Intent, write: WriteShard, control: Control
) -> CommitRecord:
    """`commit.commit` for workers whose directory `staging` is not one: `leader` is the lowest rank that shares this worker's.

    The record's directory is gone when this returns: the checkpoint is in the store alone. Raises CheckpointError on every worker
    where the save fails on any; what was in the store before is untouched.
    """
    began = time.monotonic()
    step = intent.step
    token = control.broadcast(secrets.token_hex(4))
    directory = step_directory(staging, step).with_name(f"{step_directory(staging, step).name}.tmp-{token}")
    leads = control.rank == leader
    try:
        agreed(control, "prepare", lambda: _prepare(directory) if leads else None)
        written = agreed(control, "write", lambda: _write(directory, step, write, control))
        manifest = agreed(control, "commit", lambda: _seal(directory, intent, written), only_first=True)[0]
        agreed(control, "commit", lambda: _keep(directory, manifest) if leads and control.rank != 0 else None)
        store.publish(directory, control)
        agreed(control, "clear the staging directory", lambda: _release(staging, store) if leads else None)
    finally:
        # Every worker has left the directory: all errors were agreed by all.
        if leads:
            shutil.rmtree(directory, ignore_errors=True)
    size = sum(FileRecord(**one["record"]).bytes for one in written)
    return CommitRecord(step, directory, size, time.monotonic() - began)


def _prepare(directory: Path) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    for leftover in directory.parent.glob("step-*.tmp-*"):
        shutil.rmtree(leftover)
    directory.mkdir()


def _write(directory: Path, step: int, write: WriteShard, control: Control) -> dict[str, Any]:
    """This worker's shard, and what worker 0 has to know of it, which cannot look."""
    shard = CheckpointPaths(directory).shard(control.rank, control.world_size)
    record = write(shard, step)
    return {"record": asdict(record), "slices": [asdict(entry) for entry in entries([read_header(shard)])]}


def _seal(directory: Path, intent: Intent, written: Sequence[Mapping[str, Any]]) -> str:
    records = [FileRecord(**one["record"]) for one in written]
    held = [SliceEntry(**entry | {"shape": tuple(entry["shape"])}) for one in written for entry in one["slices"]]
    return seal(directory, intent, records, held).dump()


def _keep(directory: Path, manifest: str) -> None:
    with durable_file(CheckpointPaths(directory).manifest) as file:
        file.write(manifest.encode("utf-8"))


def _release(staging: Path, store: Store) -> None:
    """Delete what was fetched for a resume: the store has it."""
    there = store.committed()
    for one in committed(staging):
        if one.step in there:
            remove_directory(one.directory)
