"""Agreement among workers on small JSON-like values, apart from the training's own collectives."""

import json
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


class ControlGroup:
    """`protocols.Control` over a gloo group on the CPU. Values travel as JSON: no pickle, tuples arrive as lists."""

    def __init__(self, timeout: timedelta) -> None:
        self._group: Any = dist.new_group(backend="gloo", timeout=timeout)
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()

    def barrier(self) -> None:
        """Return when every worker has called it."""
        dist.barrier(group=self._group)

    def gather(self, value: T) -> list[T]:
        """Every worker's value, in rank order, on every worker."""
        mine = _encode(value)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([mine.numel()], dtype=torch.int64), group=self._group)
        lengths = [int(size) for size in sizes]
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[: mine.numel()] = mine
        parts = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(parts, padded, group=self._group)
        return [_decode(part[:length]) for part, length in zip(parts, lengths, strict=True)]

    def broadcast(self, value: T) -> T:
        """Worker 0's value on every worker."""
        content = _encode(value if self.rank == 0 else None)
        size = torch.tensor([content.numel()], dtype=torch.int64)
        dist.broadcast(size, src=0, group=self._group)
        if self.rank != 0:
            content = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(content, src=0, group=self._group)
        return _decode(content)


def _encode(value: object) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode("utf-8")), dtype=torch.uint8)


def _decode(content: torch.Tensor) -> Any:
    return json.loads(content.numpy().tobytes())
