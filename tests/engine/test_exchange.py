"""Collectives by direct exchange, beside gloo's own: the same tensors on every worker."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from dstune.engine import exchange
from dstune.engine.exchange import DirectBackend
from tests.spawn import run_workers

SIZES = [1, 7, 5000]
DTYPES = [torch.float32, torch.bfloat16, torch.int8]


class Gloo:
    """What is not replaced."""

    def reduce_scatter_tensor(
        self, output: Any, values: Any, op: Any, group: Any = None, async_op: bool = False
    ) -> Any:
        return dist.reduce_scatter_single(output, values, op=op, group=group, async_op=async_op)


def _values(rank: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """Small whole numbers, other ones on each rank: sums are exact in every dtype and order."""
    return ((torch.arange(count) * 7 + rank * 3) % 11 - 5).to(dtype)


def _compare() -> None:
    dist.init_process_group("gloo")
    exchange._PIECE_BYTES = 4096  # many pieces, the last one shorter
    backend, rank = DirectBackend(Gloo()), dist.get_rank()
    first_two = dist.new_group([0, 1])
    for group in [None, first_two] if rank < 2 else [None]:
        world_size = dist.get_world_size(group)
        for size in SIZES:
            for dtype in DTYPES:
                _gathers(backend, group, rank, world_size, size, dtype)
                _reduces(backend, group, rank, world_size, size, dtype)


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


def _reduces(backend: Any, group: Any, rank: int, world_size: int, size: int, dtype: torch.dtype) -> None:
    count = size * world_size
    mine = slice(rank * size, (rank + 1) * size)
    everything = torch.stack([_values(peer, count, dtype) for peer in range(world_size)])
    values = everything[rank].clone()
    apart = torch.empty(size, dtype=dtype)
    backend.reduce_scatter_tensor(apart, values, group=group)
    assert torch.equal(apart, everything.sum(0, dtype=dtype)[mine])
    assert torch.equal(values, everything[rank])
    backend.reduce_scatter_tensor(apart, values, op=dist.ReduceOp.MAX, group=group)
    assert torch.equal(apart, everything.amax(0)[mine])
    backend.reduce_scatter_tensor(values[mine], values, group=group)
    assert torch.equal(values[mine], everything.sum(0, dtype=dtype)[mine])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_they_are_gloos_collectives(world_size: int) -> None:
    run_workers(_compare_alone if world_size == 1 else _compare, world_size)


def _compare_alone() -> None:
    dist.init_process_group("gloo")
    backend = DirectBackend(Gloo())
    _gathers(backend, None, 0, 1, 5, torch.float32)
    _reduces(backend, None, 0, 1, 5, torch.float32)


def _lose_the_other() -> str:
    dist.init_process_group("gloo")
    backend, rank = DirectBackend(Gloo()), dist.get_rank()
    values = torch.ones(200_000)
    backend.reduce_scatter_tensor(torch.empty(100_000), values)
    if rank == 1:
        return ""
    try:
        for _ in range(2):  # the other's end may be behind what it had sent
            backend.reduce_scatter_tensor(torch.empty(100_000), values)
    except RuntimeError as error:
        return str(error)
    return "nothing"


def test_a_worker_that_is_gone_is_an_error_and_no_wait() -> None:
    said, _ = run_workers(_lose_the_other, 2, seconds=60)
    assert "onnection" in said or "losed" in said
