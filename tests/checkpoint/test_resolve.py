"""Damage is found before use, named, and the one before is taken."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from dstune.checkpoint.reader import Reader
from dstune.checkpoint.resolve import choose, committed, newest_whole, verify
from dstune.errors import CheckpointError
from dstune.paths import step_directory
from dstune.protocols import Slice
from tests.checkpoint.sample import SHAPES, at, commit, steps, whole


def test_whole_checkpoints_are_whole(checkpoints: Path) -> None:
    assert steps(checkpoints) == [1, 2]
    assert newest_whole(checkpoints) == (at(checkpoints, 2), [])
    assert newest_whole(checkpoints / "nowhere") == (None, [])


@pytest.mark.parametrize("kind", ["shard-00000", "shard-00002", "state.json", "manifest.json"])
def test_every_flipped_bit_is_found_and_the_file_is_named(checkpoints: Path, kind: str) -> None:
    newest = at(checkpoints, 2)
    path = next(newest.directory.glob(f"{kind}*"))
    content = path.read_bytes()
    chooser = random.Random(kind)
    positions = {(0, 0), (len(content) - 1, 7)} | {
        (chooser.randrange(len(content)), chooser.randrange(8)) for _ in range(300)
    }
    for byte, bit in sorted(positions):
        damaged = bytearray(content)
        damaged[byte] ^= 1 << bit
        path.write_bytes(damaged)
        problems = verify(newest)
        assert problems and path.name in problems[0], (byte, bit)
    found, passed_over = newest_whole(checkpoints)
    assert found == at(checkpoints, 1)
    assert len(passed_over) == 1 and "step-00000002" in passed_over[0] and path.name in passed_over[0]


@pytest.mark.parametrize("kind", ["shard-00001", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "longer", "gone", "empty"])
def test_missing_and_cut_files_are_found(checkpoints: Path, kind: str, damage: str) -> None:
    path = next(at(checkpoints, 2).directory.glob(f"{kind}*"))
    content = path.read_bytes()
    path.write_bytes({"cut": content[:-1], "longer": content + b"\0", "gone": b"", "empty": b""}[damage])
    if damage == "gone":
        path.unlink()
    assert path.name in verify(at(checkpoints, 2))[0]
    assert newest_whole(checkpoints)[0] == at(checkpoints, 1)


@pytest.mark.parametrize("past_cache", [True, False])
def test_both_ways_of_reading_find_the_same(checkpoints: Path, past_cache: bool) -> None:
    assert verify(at(checkpoints, 2), past_cache=past_cache) == []
    path = step_directory(checkpoints, 2) / "state.json"
    path.write_bytes(path.read_bytes().replace(b"2", b"3"))
    assert verify(at(checkpoints, 2), past_cache=past_cache) == ["state.json: its SHA-256 is not the manifest's"]


def test_the_best_is_chosen_by_its_metric(tmp_path: Path) -> None:
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0)):
        commit(tmp_path, step, metrics={"loss": loss})
    assert choose(tmp_path, "best", "loss").step == 2
    assert choose(tmp_path, "best", "loss", "max").step == 1
    assert choose(tmp_path, "3", None).step == 3
    (step_directory(tmp_path, 2) / "manifest.json").unlink()
    assert choose(tmp_path, "best", "loss").step == 3, "one whose metrics are not known cannot be the best"
    with pytest.raises(CheckpointError, match=r"no committed step '7'; expected one of: 1, 2, 3"):
        choose(tmp_path, "7", None)
    with pytest.raises(CheckpointError, match="no checkpoint has a value of 'accuracy'"):
        choose(tmp_path, "best", "accuracy")


def test_a_shard_of_another_generation_is_refused(checkpoints: Path) -> None:
    name = "shard-00001-of-00003.safetensors"
    older, newer = (step_directory(checkpoints, step) / name for step in (1, 2))
    assert older.stat().st_size == newer.stat().st_size
    shutil.copy(older, newer)
    (problem,) = verify(at(checkpoints, 2))
    assert name in problem and "SHA-256" in problem


def test_a_manifest_of_another_step_is_refused(checkpoints: Path) -> None:
    shutil.copytree(step_directory(checkpoints, 1), step_directory(checkpoints, 9))
    assert "is of step 1" in verify(at(checkpoints, 9))[0]
    assert newest_whole(checkpoints)[0] == at(checkpoints, 2)


def test_a_foreign_shard_beside_the_own_ones_is_named(checkpoints: Path) -> None:
    shutil.copy(
        step_directory(checkpoints, 1) / "shard-00001-of-00003.safetensors",
        step_directory(checkpoints, 2) / "shard-00003-of-00004.safetensors",
    )
    assert "shard-00003-of-00004.safetensors: does not belong" in verify(at(checkpoints, 2))[0]


def test_a_forged_manifest_with_the_old_hash_is_found(checkpoints: Path) -> None:
    path = step_directory(checkpoints, 2) / "manifest.json"
    content = json.loads(path.read_text())
    content["metrics"] = {"loss": 0.0}
    path.write_text(json.dumps(content, indent=2) + "\n")
    assert "damaged" in verify(at(checkpoints, 2))[0]


def test_temporary_and_other_names_are_no_checkpoints(checkpoints: Path) -> None:
    for name in ("step-00000003.tmp-abcd", ".step-00000003.1.deleting", "step-3", "latest", "step-00000003.damaged-1"):
        (checkpoints / name).mkdir()
    (checkpoints / "step-00000004").write_text("a file")
    assert [checkpoint.step for checkpoint in committed(checkpoints)] == [1, 2]


def test_any_range_is_read_across_shards(checkpoints: Path) -> None:
    reader = Reader(step_directory(checkpoints, 2))
    values = whole("exp_avg", "embed.weight", 2)
    for start in range(0, 400, 37):
        for stop in range(start + 1, 401, 41):
            assert torch.equal(reader.read("exp_avg", "embed.weight", start, stop), values[start:stop])
    assert reader.tensors("fp32") == SHAPES
    assert torch.equal(reader.read("fp32", "scalar.bias"), whole("fp32", "scalar.bias", 2))


def test_a_slice_of_another_model_is_refused(checkpoints: Path) -> None:
    reader = Reader(step_directory(checkpoints, 2))
    with pytest.raises(CheckpointError, match=r"norm.weight: has shape \[7\]; expected shape \[8\]"):
        reader.fill(Slice("fp32", "norm.weight", (8,), 0, torch.empty(8)))
    with pytest.raises(CheckpointError, match=r"other\.weight: is not there"):
        reader.fill(Slice("fp32", "other.weight", (8,), 0, torch.empty(8)))
    with pytest.raises(CheckpointError, match="exp_avg_sq"):
        reader.tensors("exp_avg_sq")
    with pytest.raises(CheckpointError, match="element 7 is in no shard"):
        reader.read("fp32", "norm.weight", 0, 9)
