from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from dstune.checkpoint.layout import SliceEntry, tile
from dstune.checkpoint.shard_writer import write_shard
from dstune.checkpoint.shards import OpenShard, read_header
from dstune.errors import CheckpointError
from dstune.protocols import Slice
from tests.checkpoint.sample import slices


def test_a_shard_is_plain_safetensors_and_its_record_is_of_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    pieces = slices(1, rank=1, world_size=3)
    pieces.append(Slice("half", "x", (2, 9), 5, torch.arange(9).to(torch.bfloat16)))
    record = write_shard(path, pieces, step=4)
    assert record.bytes == path.stat().st_size
    assert record.sha256 == sha256(path.read_bytes()).hexdigest()
    with safe_open(path, "pt") as opened:
        assert set(opened.keys()) == {f"{piece.state}/{piece.name}" for piece in pieces}
        for piece in pieces:
            stored = opened.get_tensor(f"{piece.state}/{piece.name}")
            assert stored.dtype == piece.tensor.dtype and torch.equal(stored, piece.tensor)
        assert opened.metadata()["step"] == "4"


def test_header_says_where_each_slice_belongs(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    pieces = slices(1, rank=1, world_size=2)
    write_shard(path, pieces, step=1)
    stored = read_header(path)
    assert [item.entry for item in stored] == [
        SliceEntry(piece.state, piece.name, piece.shape, piece.offset, piece.tensor.numel()) for piece in pieces
    ]
    assert (stored[0].first_byte) % 8 == 0
    out = torch.empty(3, dtype=torch.float64)
    OpenShard(path).copy(stored[0], 2, out)
    assert torch.equal(out, pieces[0].tensor[2:5].double())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_state_that_is_not_finite_is_refused(tmp_path: Path, value: float) -> None:
    pieces = slices(1)
    pieces[1].tensor[3] = value
    with pytest.raises(CheckpointError, match=r"fp32/norm.weight.*NaN or infinity"):
        write_shard(tmp_path / "a", pieces, step=1)


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, b"\x02" + b"\0" * 7 + b"{}", b"\x00" * 64])
def test_what_is_no_shard_is_an_error_and_no_traceback(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(CheckpointError, match="no shard"):
        read_header(tmp_path / "a")


def test_safetensors_without_our_metadata_is_no_shard(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"fp32/a": torch.zeros(3)}, tmp_path / "a")
    with pytest.raises(CheckpointError, match="no shard"):
        read_header(tmp_path / "a")


@pytest.mark.parametrize(
    ("cuts", "problem"),
    [
        ([(0, 4), (4, 6)], None),
        ([(4, 6), (0, 4)], None),
        ([(0, 4), (5, 5)], "element 4 is missing"),
        ([(0, 5), (4, 6)], "element 4 is there twice"),
        ([(0, 4)], "4 of 10 elements"),
        ([(0, 10), (0, 10)], "element 0 is there twice"),
        ([(1, 9)], "element 0 is missing"),
    ],
)
def test_slices_tile_a_parameter_or_it_is_said_why_not(cuts: list[tuple[int, int]], problem: str | None) -> None:
    shapes, problems = tile([SliceEntry("fp32", "a", (5, 2), offset, length) for offset, length in cuts])
    assert shapes == {"fp32": {"a": (5, 2)}}
    assert problems == [] if problem is None else problem in problems[0]


def test_shards_that_disagree_about_a_shape_are_found() -> None:
    _, problems = tile([SliceEntry("fp32", "a", (4,), 0, 2), SliceEntry("fp32", "a", (2, 2), 2, 2)])
    assert "disagree" in problems[0]
