"""All workers hear of what one of them could not read, and nobody goes on with it."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from dstune.checkpoint import shards
from dstune.checkpoint.loading import Loading
from dstune.checkpoint.reader import Reader
from dstune.errors import CheckpointError, DamagedCheckpoint
from dstune.paths import step_directory
from dstune.protocols import Control, Slice
from tests.checkpoint.sample import Alone, slices, whole
from tools.rungs.damage import flip
from tools.rungs.processes import done


def _load(directory: Path, control: Control) -> Any:
    """What became of a load into empty slices: the error's kind and words."""
    pieces = [
        Slice(piece.state, piece.name, piece.shape, piece.offset, torch.empty_like(piece.tensor))
        for piece in slices(0, control.rank, control.world_size)
    ]
    try:
        loading = Loading(directory, control)
        for piece in pieces:
            loading.fill(piece)
        loading.settle()
    except CheckpointError as error:
        return [type(error).__name__, str(error)]
    for piece in pieces:
        stop = piece.offset + piece.tensor.numel()
        assert torch.equal(piece.tensor, whole(piece.state, piece.name, 2)[piece.offset : stop])
    return None


def test_what_one_worker_cannot_read_all_hear(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = step_directory(checkpoints, 2)
    assert done(lambda control: _load(directory, control)) == [None, None]
    # The header is whole for all, and only worker 1 comes to the damage behind it.
    monkeypatch.setattr(shards.OpenShard, "check_header", lambda self: None)
    monkeypatch.setattr(Reader, "fill", _only_last_worker_fails(Reader.fill))
    path = directory / "shard-00002-of-00003.safetensors"
    flip(path, path.stat().st_size * 8 - 1)
    first, second = done(lambda control: _load(directory, control))
    assert first == second
    assert first[0] == "DamagedCheckpoint" and "worker 1: " in first[1] and f"{path}: is damaged" in first[1]


def _only_last_worker_fails(fill: Any) -> Any:
    def filled(reader: Reader, piece: Slice) -> None:
        if piece.offset:  # worker 1's pieces begin behind worker 0's
            fill(reader, piece)
        else:
            piece.tensor.fill_(0)

    return filled


def test_an_unreadable_disk_is_damage_and_another_model_is_not(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = step_directory(checkpoints, 2)
    loading = Loading(directory, Alone())
    loading.fill(Slice("fp32", "norm.weight", (8,), 0, torch.empty(8)))
    loading.fill(Slice("fp32", "norm.weight", (7,), 0, torch.empty(7)))
    with pytest.raises(CheckpointError, match=r"worker 0: .*norm.weight: has shape") as caught:
        loading.settle()
    assert not isinstance(caught.value, DamagedCheckpoint)

    def broken(*_: Any) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(DamagedCheckpoint, match="cannot be read: Input/output error"):
        Loading(directory, Alone())
