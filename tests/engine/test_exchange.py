"""Collectives by direct exchange, beside gloo's own: the same tensors on every worker."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dstune.engine import exchange
from dstune.engine.exchange import DirectBackend
from tests.spawn import run_workers

SIZES = [1, 7, 5000]
DTYPES = [torch.float32, torch.bfloat16, torch.int8]


def _values(rank: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """Small whole numbers, other ones on each rank: sums are exact in every dtype and order."""
    return ((torch.arange(count) * 7 + rank * 3) % 11 - 5).to(dtype)


def _compare() -> None:
    dist.init_process_group("gloo")
    exchange._MESSAGE_BYTES = exchange._SMALL_BYTES = 2048
    exchange._IN_CACHE = 100
    backend, rank = DirectBackend(None), dist.get_rank()
    first_two = dist.new_group([0, 1])
    for group in [None, first_two] if rank < 2 else [None]:
        world_size = dist.get_world_size(group)
        for size in SIZES:
            for dtype in DTYPES:
                _gathers(backend, group, rank, world_size, size, dtype)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            _means(backend, group, rank, world_size, dtype)


def _gathers(backend: Any, group: Any, rank: int, world_size: int, size: int, dtype: torch.dtype) -> None:
    expected = torch.cat([_values(peer, size, dtype) for peer in range(world_size)])
    apart, inside = torch.empty_like(expected), torch.empty_like(expected)
    own = inside.narrow(0, rank * size, size).copy_(_values(rank, size, dtype))
    # Two under way, waited for in the other order.
    one = backend.all_gather_into_tensor(apart, _values(rank, size, dtype), group=group, async_op=True)
    two = backend.all_gather_into_tensor(inside, own, group=group, async_op=True)
    two.wait()
    assert torch.equal(inside, expected)
    one.wait()
    assert torch.equal(apart, expected) and one.is_completed()


def _means(backend: Any, group: Any, rank: int, world_size: int, dtype: torch.dtype) -> None:
    """Of tensors that travel together and alone, in one message and in several, cut evenly and not, and that lie crosswise."""
    counts = [1, 7, 600, 5000, 1537, 2]
    shapes = [(count,) for count in counts] + [(40, 30)]
    tensors = [_values(rank, math.prod(shape), dtype).view(shape) for shape in shapes]
    tensors[-1] = tensors[-1].t()
    kept = [tensor.clone() for tensor in tensors]
    everyone = [[_values(peer, math.prod(shape), dtype).view(shape) for shape in shapes] for peer in range(world_size)]
    wanted = []
    for number in range(len(shapes)):
        whole = torch.stack([own[number] for own in everyone]).float().mean(0)
        flat = (whole.t() if number == len(shapes) - 1 else whole).reshape(-1)
        size = -(-len(flat) // world_size)
        wanted.append(flat[rank * size : (rank + 1) * size])
    means = [torch.full_like(piece, torch.nan) for piece in wanted]
    backend.mean_of_pieces(tensors, means, group)
    for mean, piece in zip(means, wanted, strict=True):
        torch.testing.assert_close(mean, piece, rtol=1e-6, atol=1e-7)
    assert all(torch.equal(one, other) for one, other in zip(tensors, kept, strict=True))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_they_are_gloos_collectives(world_size: int) -> None:
    run_workers(_compare_alone if world_size == 1 else _compare, world_size)


def _compare_alone() -> None:
    dist.init_process_group("gloo")
    backend = DirectBackend(None)
    _gathers(backend, None, 0, 1, 5, torch.float32)
    _means(backend, None, 0, 1, torch.bfloat16)


def _sums_in_fp32() -> float:
    """256 and 1 in bf16, whose sum bf16 does not have."""
    dist.init_process_group("gloo")
    mean = torch.empty(1)
    mine = torch.full((2,), 256.0 if dist.get_rank() == 0 else 1.0, dtype=torch.bfloat16)
    DirectBackend(None).mean_of_pieces([mine], [mean])
    return mean.item()


def test_gradients_in_16_bits_are_summed_in_fp32() -> None:
    assert run_workers(_sums_in_fp32, 2) == [128.5, 128.5]


def _lose_the_other() -> str:
    dist.init_process_group("gloo")
    backend, rank = DirectBackend(None), dist.get_rank()
    values, means = [torch.ones(200_000)], [torch.empty(100_000)]
    backend.mean_of_pieces(values, means)
    if rank == 1:
        return ""
    try:
        for _ in range(2):  # the other's end may be behind what it had sent
            backend.mean_of_pieces(values, means)
    except RuntimeError as error:
        return str(error)
    return "nothing"


def test_a_worker_that_is_gone_is_an_error_and_no_wait() -> None:
    said, _ = run_workers(_lose_the_other, 2, seconds=60)
    assert "onnection" in said or "losed" in said
