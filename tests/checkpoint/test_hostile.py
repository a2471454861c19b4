"""Checkpoints of which every hash is right and that dstune never wrote, and strange things where its files should be.

They are found, named and passed over like any damage: no traceback, no waiting, nothing outside the directory is read.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from dstune.atomic import remove_directory
from dstune.checkpoint.layout import FORMAT, VERSION, load_manifest
from dstune.checkpoint.resolve import newest_whole
from dstune.errors import CheckpointError
from tests.checkpoint.sample import at, commit, steps

Content = dict[str, Any]
SHARD = "shard-00000-of-00001.safetensors"


@pytest.fixture
def newest(tmp_path: Path) -> Path:
    """Step 2, behind which step 1 stands."""
    commit(tmp_path, 1)
    return commit(tmp_path, 2).directory


def reseal(directory: Path, edit: Callable[[Content], object]) -> None:
    """Change the manifest and give it the hash that it then has to have."""
    content: Content = {"format": FORMAT, "version": VERSION} | asdict(load_manifest(directory))
    edit(content)
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    text = json.dumps(content | {"sha256": digest}, indent=2, ensure_ascii=False) + "\n"
    (directory / "manifest.json").write_text(text)


def reseal_shard(directory: Path, edit: Callable[[Content, Content], object]) -> None:
    """Change a shard's header, the part in safetensors' words and the slices, and seal what comes of it."""
    shard = directory / SHARD
    written = shard.read_bytes()
    end = 8 + int.from_bytes(written[:8], "little")
    header = json.loads(written[8:end])
    slices = json.loads(header["__metadata__"]["slices"])
    edit(header, slices)
    if isinstance(header.get("__metadata__"), dict):
        header["__metadata__"]["slices"] = json.dumps(slices)
    shard.write_bytes(written[:8] + json.dumps(header).encode().ljust(end - 8) + written[end:])
    record = {"bytes": shard.stat().st_size, "sha256": hashlib.sha256(shard.read_bytes()).hexdigest()}
    reseal(directory, lambda content: content["files"].update({SHARD: record}))


def assert_passed_over(newest: Path, name: str) -> None:
    found, passed_over = newest_whole(newest.parent)
    assert found is not None and found.step == 1
    assert len(passed_over) == 1 and name in passed_over[0]


def test_a_resealed_one_that_is_as_dstune_writes_it_is_taken(newest: Path) -> None:
    reseal(newest, lambda content: None)
    reseal_shard(newest, lambda header, slices: None)
    assert newest_whole(newest.parent) == (at(newest.parent, 2), [])


STRANGE = [None, "x", -1, 1.5, True, [1], 10**12, float("nan"), float("inf")]


@pytest.mark.parametrize("value", STRANGE, ids=repr)
@pytest.mark.parametrize("key", ["step", "world_size", "files", "tensors"])
def test_values_of_another_kind(newest: Path, key: str, value: Any) -> None:
    reseal(newest, lambda content: content.update({key: value}))
    assert_passed_over(newest, "manifest.json")


@pytest.mark.parametrize("key", ["step", "world_size", "time", "files", "tensors", "fingerprints", "metrics"])
def test_a_key_that_is_not_there(newest: Path, key: str) -> None:
    reseal(newest, lambda content: content.pop(key))
    assert_passed_over(newest, "manifest.json")


EDITS: dict[str, Callable[[Content], object]] = {
    "a number as time": lambda content: content.update(time=1),
    "a metric of words": lambda content: content.update(metrics={"loss": "low"}),
    "an endless metric": lambda content: content.update(metrics={"loss": 10**400}),
    "a negative size": lambda content: content["files"][SHARD].update(bytes=-1),
    "a size of words": lambda content: content["files"][SHARD].update(bytes="1"),
    "a negative shape": lambda content: content["tensors"]["fp32"].update({"norm.weight": [-7]}),
    "a fractional shape": lambda content: content["tensors"]["fp32"].update({"norm.weight": [7.0]}),
    "no shape": lambda content: content["tensors"]["fp32"].update({"norm.weight": None}),
    "a way up": lambda content: content["files"].update({"../x": {"bytes": 0, "sha256": ""}}),
    "the way up itself": lambda content: content["files"].update({"..": {"bytes": 0, "sha256": ""}}),
    "no name": lambda content: content["files"].update({"": {"bytes": 0, "sha256": ""}}),
    "an absolute path": lambda content: content["files"].update({"/dev/zero": {"bytes": 0, "sha256": ""}}),
    "a name with a zero": lambda content: content["files"].update({"a\0b": {"bytes": 0, "sha256": ""}}),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_a_manifest_that_dstune_does_not_write(newest: Path, edit: Callable[[Content], object]) -> None:
    reseal(newest, edit)
    assert_passed_over(newest, "manifest.json: cannot be read")


@pytest.mark.parametrize(
    "written", [b"[" * 200_000, b'{"a":' * 200_000, b"[]", b"", b"\xff"], ids=lambda text: text[:5]
)
def test_a_manifest_that_is_none(newest: Path, written: bytes) -> None:
    (newest / "manifest.json").write_bytes(written)
    assert_passed_over(newest, "manifest.json")


PIECE = "fp32/norm.weight"
SHARD_EDITS: dict[str, Callable[[Content, Content], object]] = {
    "of another step": lambda header, slices: header["__metadata__"].update(step="1"),
    "a step of words": lambda header, slices: header["__metadata__"].update(step="x"),
    "a negative offset": lambda header, slices: slices[PIECE].update(offset=-1),
    "a fractional offset": lambda header, slices: slices[PIECE].update(offset=0.5),
    "an offset behind the end": lambda header, slices: slices[PIECE].update(offset=1 << 70),
    "a shape of words": lambda header, slices: slices[PIECE].update(shape=["a"]),
    "a negative shape": lambda header, slices: slices[PIECE].update(shape=[-7, -1]),
    "no name": lambda header, slices: slices[PIECE].update(name=None),
    "a name twice": lambda header, slices: slices[PIECE].update(name="scalar.bias"),
    "bytes before the file": lambda header, slices: header[PIECE].update(data_offsets=[-28, 0]),
    "bytes of another tensor": lambda header, slices: header[PIECE].update(data_offsets=[0, 28]),
    "bytes behind the file": lambda header, slices: header[PIECE].update(data_offsets=[1 << 40, (1 << 40) + 28]),
    "an unknown dtype": lambda header, slices: header[PIECE].update(dtype="F8_E4M3"),
    "no metadata": lambda header, slices: header.update(__metadata__=[]),
}


@pytest.mark.parametrize("edit", SHARD_EDITS.values(), ids=SHARD_EDITS)
def test_a_shard_that_dstune_does_not_write(newest: Path, edit: Callable[[Content, Content], object]) -> None:
    reseal_shard(newest, edit)
    assert_passed_over(newest, ": ")


@pytest.mark.parametrize("name", ["manifest.json", SHARD, "state.json"])
def test_no_file_where_a_file_should_be(newest: Path, name: str) -> None:
    """A pipe would keep its reader waiting for ever; a device has no end."""
    for put in (os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to(path)):
        path = newest / name
        path.rename(newest.parent / "kept")
        put(path)
        assert_passed_over(newest, name)
        path.rmdir() if path.is_dir() else path.unlink()
        (newest.parent / "kept").rename(path)
    assert newest_whole(newest.parent)[0] == at(newest.parent, 2)


@pytest.mark.parametrize("name", ["step-000000002", "step-0000000\N{ARABIC-INDIC DIGIT TWO}", "step-2"])
def test_a_step_has_one_name(newest: Path, name: str) -> None:
    newest.rename(newest.with_name(name))
    assert steps(newest.parent) == [1]


def test_a_save_goes_past_strange_things_in_its_place(tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    target.mkdir()
    (target / "mine").write_text("")
    (tmp_path / "step-00000001.tmp-ab").write_text("a file")
    (tmp_path / "step-00000002.tmp-ab").symlink_to(target)
    (tmp_path / ".step-00000001.7.deleting").symlink_to(target)
    (tmp_path / "step-00000003").symlink_to(tmp_path / "nowhere")
    commit(tmp_path, 3)
    assert steps(tmp_path) == [3] and (target / "mine").exists()
    assert not list(tmp_path.glob("*.tmp-*")) and not list(tmp_path.glob(".step-*"))


def test_a_linked_checkpoint_is_removed_as_a_link(newest: Path) -> None:
    moved = newest.rename(newest.parent / "elsewhere")
    newest.symlink_to(moved)
    remove_directory(newest)
    assert steps(newest.parent) == [1] and load_manifest(moved).step == 2
    assert {path.name for path in newest.parent.iterdir()} == {"elsewhere", "step-00000001"}


def test_a_manifest_that_is_missing_is_said_to_be(newest: Path) -> None:
    (newest / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        load_manifest(newest)
