"""Pickles from elsewhere: what a file wants to run never runs, however it is wrapped; what is no tensor is named."""

import argparse
import builtins
import os
import pickle
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dstune.checkpoint.deepspeed_files import DeepSpeedCheckpoint
from dstune.checkpoint.restricted import load, require_checksums
from dstune.errors import CheckpointError


class _Call:
    """Pickled, it is a call of `function` with `arguments`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


class _Later(dict[str, Any]):
    """Set from its state, as DeepSpeed's own records are."""

    def __reduce__(self) -> Any:
        return _Later, (), {"x": _Call(os.system, self["command"])}


@pytest.mark.parametrize("skip_objects", [False, True])
@pytest.mark.parametrize("wrapped", ["zip", "legacy", "bare pickle"])
@pytest.mark.parametrize("way", ["os.system", "eval", "Popen", "getattr", "nested"])
def test_a_planted_call_does_not_run(tmp_path: Path, way: str, wrapped: str, skip_objects: bool) -> None:
    marker = tmp_path / "marker"
    command = f"touch {marker}"
    payload = {
        "os.system": _Call(os.system, command),
        "eval": _Call(builtins.eval, f"open({str(marker)!r}, 'w')"),
        "Popen": _Call(subprocess.Popen, ["touch", str(marker)]),
        "getattr": _Call(getattr, _Call(__import__, "os"), "system"),
        "nested": _Later(command=command),
    }[way]
    content = {"optimizer_state_dict": {"zero_stage": 3, "loss_scaler": payload, "flat": torch.ones(3)}}
    file = tmp_path / "rank.pt"
    if wrapped == "bare pickle":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=wrapped == "zip")
    try:
        load(file, skip_objects)
        assert skip_objects and wrapped == "zip"  # stood in for by something that does nothing
    except CheckpointError as error:
        assert "rank.pt" in str(error)
    assert not marker.exists()


def test_what_a_trainer_added_is_named_and_can_be_read_past(tmp_path: Path) -> None:
    file = tmp_path / "rank.pt"
    torch.save({"args": argparse.Namespace(lr=1.0), "flat": torch.arange(3)}, file)
    with pytest.raises(CheckpointError, match=r"argparse\.Namespace.*\n.*--skip-objects"):
        load(file)
    assert torch.equal(load(file, skip_objects=True)["flat"], torch.arange(3))


def test_how_to_run_it_all_the_same_is_not_said(tmp_path: Path) -> None:
    file = tmp_path / "rank.pt"
    torch.save({"x": _Call(os.system, "true")}, file)
    with pytest.raises(CheckpointError) as caught:
        load(file, skip_objects=True)
    assert "os" in str(caught.value) and "weights_only" not in str(caught.value)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rank.pt")
    os.mkfifo(tmp_path / "latest")
    with pytest.raises(CheckpointError, match="is no file"):
        load(tmp_path / "rank.pt")
    with pytest.raises(CheckpointError, match="no `latest`"):
        DeepSpeedCheckpoint(tmp_path)
    with pytest.raises(CheckpointError, match="no directory for the tag"):
        DeepSpeedCheckpoint(tmp_path, "..")


def test_tensors_are_mapped_not_read(tmp_path: Path) -> None:
    file = tmp_path / "rank.pt"
    torch.save({"flat": torch.zeros(1 << 20)}, file)
    flat = load(file)["flat"]
    with file.open("r+b") as changed:  # a private map of the file: what is on the disk shows where nobody wrote
        content = bytearray(file.read_bytes())
        at = content.index(bytes(4096), 4096)
        changed.seek(at)
        changed.write(b"\x00\x00\x80?" * 1024)
    assert flat.max() == 1


def test_a_flipped_bit_and_a_cut_file_are_named(tmp_path: Path) -> None:
    file = tmp_path / "rank.pt"
    torch.save({"flat": torch.ones(1000)}, file)
    require_checksums(file)
    content = bytearray(file.read_bytes())
    content[content.index(b"\x00\x00\x80?" * 8) + 100] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"rank\.pt: is damaged"):
        require_checksums(file)
    file.write_bytes(content[:2000])
    with pytest.raises(CheckpointError, match=r"rank\.pt"):
        load(file)
