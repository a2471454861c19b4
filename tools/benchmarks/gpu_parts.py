"""The parts of `tools/bench gpu` whose sides fit the device together: each function is called in a process of its own."""

import statistics
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from dstune.batch import collate
from dstune.engine.world import World
from dstune.model.kernels import liger
from dstune.model.kernels.linear_cross_entropy import Logits, summed_linear_cross_entropy
from dstune.model.loss import IGNORED
from dstune.planning.shapes import ModelShape
from tools.benchmarks import loss as loss_benchmark
from tools.benchmarks.gpu_fit import BF16, most_rows, needed, room, too_large
from tools.benchmarks.gpu_shapes import ANSWERED, MadeUp, Settings, chat_lengths, chats_of
from tools.benchmarks.gpu_sides import (
    BF16_STATES,
    Dstune,
    Transformers,
    alternate,
    batches,
    forget_peak,
    peak_bytes,
    product_limit,
    rates,
    sizes,
    spread,
    started,
    without_liger,
    zero3,
)
from tools.benchmarks.measures import ratios

TARGETS = {"3b": 0.55, "1.2b": 0.50}
"""Causal FLOP utilisation."""
TARGET_PEER, TARGET_8B, TARGET_PACKED, TARGET_LOSS_TIME, TARGET_LOSS_MEMORY = 1.1, 10_500, 2.0, 1.05, 1.0
_ROWS = (4, 2, 1)
"""A micro-batch's, the first that fits."""
_PEER_BYTES = {"autocast": 18, "bf16": 8}
"""A parameter: weight, gradient and two moments, and autocast's copy. Its activations take the place of the other side's."""
_TRIED = 1.05
"""Of `room`: so much the planner is off, and who runs out of memory here loses nothing else."""
_CHATS_PER_BATCH = 8
"""A padded micro-batch, as TRL's trainer has it by default."""
_COPIED = 1 << 31
"""Bytes that are copied to find a link's rate."""


def matmul(settings: Settings) -> dict[str, Any]:
    """The rates that limit everything else: large products, copies within the device, and to and from main memory."""
    device = World.from_environment().device
    found: dict[str, Any] = {"product_tflops": round(product_limit(device.type) / 1e12, 2)}
    size = 1 << 20 if settings.tiny else _COPIED
    here = torch.empty(size, dtype=torch.uint8, device=device)
    host = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    pairs = {
        "device_read_and_write": (torch.empty_like(here), here, 2),
        "to_device": (here, host, 1),
        "from_device": (host, here, 1),
    }
    found["gigabytes_per_second"] = {
        name: round(factor * size / _copy_seconds(into, source) / 1e9, 1)
        for name, (into, source, factor) in pairs.items()
    }
    return found


def _copy_seconds(into: torch.Tensor, source: torch.Tensor) -> float:
    """The best of five."""
    idle = source if source.is_cuda else into

    def once() -> float:
        into.copy_(source, non_blocking=True)
        return 0.0

    seconds, _ = alternate({"copy": once}, Settings(steps=5, warmup=1), idle.device)
    return min(seconds["copy"])


def alone(settings: Settings, name: str) -> dict[str, Any]:
    """One shape with the device to itself, in micro-batches as large as it holds: rows of one example each, and of packed chats."""
    world, shape, config = started(), settings.shape(name), zero3()
    with tempfile.TemporaryDirectory() as place:
        counted = sizes(shape, Path(place))
        rows = most_rows(_ROWS, lambda rows: _bytes(counted, config, rows * settings.max_length))
        if rows is None:
            return {"cannot": too_large(name, _bytes(counted, config, settings.max_length))}
        ours = Dstune(shape, Path(place), config, world)
    return {
        "parameters": counted.parameters,
        "rows_per_micro_batch": rows,
        "kernels": ours.kernels,
        "target_flop_utilisation": TARGETS[name],
        "whole rows": _whole_rows(settings, counted, rows, ours, None, world.device),
        "packed chats": _packed_chats(settings, counted, rows, ours, world.device),
    }


def train(settings: Settings, name: str) -> dict[str, Any]:
    """One shape by turns with transformers, Liger and compile in plain torch, in micro-batches for which the device holds both."""
    world, shape = started(), settings.shape(name)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        counted, config = sizes(shape, folder), zero3()
        missing = None if settings.tiny else without_liger()
        if missing is not None:
            return {"cannot": f"against transformers, Liger and compile: {missing}"}
        beside = _PEER_BYTES[settings.peer] * counted.parameters
        rows = most_rows(_ROWS, lambda rows: beside + _bytes(counted, config, rows * settings.max_length))
        wanted = beside + _bytes(counted, config, settings.max_length)
        if rows is None and wanted > _TRIED * room():
            return {"cannot": too_large(f"{name} beside transformers, Liger and compile", wanted)}
        rows = rows or 1
        ours = Dstune(shape, folder, config, world)
        theirs = Transformers(folder, settings, world.device)
        return {
            "rows_per_micro_batch": rows,
            "whole rows": _whole_rows(settings, counted, rows, ours, theirs, world.device),
        }


def _bytes(shape: ModelShape, config: dict[str, Any], tokens: int) -> int:
    return sum(needed(shape, config, tokens).values())


def _whole_rows(
    settings: Settings, shape: ModelShape, rows: int, ours: Dstune, theirs: Transformers | None, device: torch.device
) -> dict[str, Any]:
    count = _rows_of_step(settings, rows)
    data = MadeUp([settings.max_length] * count, shape.vocabulary, settings.max_length)
    packed = batches(data, rows, device)
    sides = {"dstune": lambda: ours.step(packed)}
    if theirs is not None:
        plain = [batch.inputs["input_ids"].view(-1, settings.max_length) for batch in packed]
        sides[theirs.name] = lambda: theirs.step(plain)
    seconds, losses = alternate(sides, settings, device)
    tokens, squares = count * settings.max_length, data.squares()
    found: dict[str, Any] = {name: rates(shape, tokens, squares, each, device) for name, each in seconds.items()}
    if theirs is not None:
        found["times the speed"] = ratios(seconds[theirs.name], seconds["dstune"])
        found["target_times_the_speed"] = TARGET_PEER
        found["weights of the other side"] = settings.peer
    return found | {"loss_of_the_first_step": losses}


def _packed_chats(
    settings: Settings, shape: ModelShape, rows: int, ours: Dstune, device: torch.device
) -> dict[str, Any]:
    lengths = chats_of(_rows_of_step(settings, rows) * settings.max_length, settings.max_length)
    data = MadeUp(lengths, shape.vocabulary, settings.max_length)
    packed = batches(data, rows, device)
    forget_peak()
    seconds, _ = alternate({"dstune": lambda: ours.step(packed)}, settings, device)
    found = rates(shape, sum(lengths), data.squares(), seconds["dstune"], device)
    predicted = sum(needed(shape, zero3(), rows * settings.max_length).values())
    return found | {"examples": len(lengths), "peak_bytes": peak_bytes(), "predicted_bytes": predicted}


def _rows_of_step(settings: Settings, rows: int) -> int:
    """Whole micro-batches."""
    return -(-settings.step_tokens // (rows * settings.max_length)) * rows


def states8b(settings: Settings) -> dict[str, Any]:
    """8 B parameters whose weights, gradients and moments are bf16, on rows of one example each.

    By DeepSpeed's own settings under dstune's engine; `train.states` of a run file does not offer them.
    """
    world, shape, config = started(), settings.shape("8b"), zero3(**BF16_STATES)
    with tempfile.TemporaryDirectory() as place:
        counted = sizes(shape, Path(place))
        sums = {rows: sum(needed(counted, config, rows * settings.max_length, BF16).values()) for rows in _ROWS}
        rows = most_rows(_ROWS, sums.__getitem__)
        if rows is None:
            return {"cannot": too_large("8 B with bf16 states", sums[1])}
        ours = Dstune(shape, Path(place), config, world)
    data = MadeUp([settings.max_length] * _rows_of_step(settings, rows), shape.vocabulary, settings.max_length)
    packed = batches(data, rows, world.device)
    forget_peak()
    seconds, _ = alternate({"dstune": lambda: ours.step(packed)}, settings, world.device)
    found = rates(counted, int(data.lengths.sum()), data.squares(), seconds["dstune"], world.device)
    return found | {
        "parameters": counted.parameters,
        "rows_per_micro_batch": rows,
        "kernels": ours.kernels,
        "target_tokens_per_second": TARGET_8B,
        "peak_bytes": peak_bytes(),
        "predicted_bytes": sums[rows],
    }


def loss(settings: Settings) -> dict[str, Any]:
    """Head and loss over 128,256 words: plain, Liger's as its users call it, dstune's of torch alone, and the one that dstune takes."""
    device = World.from_environment().device
    hidden, vocabulary = (32, 96) if settings.tiny else (4096, 128_256)
    lines: list[dict[str, Any]] = []
    for tokens in (16, 32) if settings.tiny else (4096, 8192, 16_384, 32_768):
        wanted = 16 * tokens * vocabulary  # plain: logits and their gradient in 16 and 32 bits, and what softmax keeps
        if wanted > room():
            lines.append({"tokens": tokens, "cannot": too_large("the plain side", wanted)})
        else:
            lines.append(_one_loss(settings, device, tokens, hidden, vocabulary))
    found = {"rows": lines, "target_time_over_plain": TARGET_LOSS_TIME, "target_memory_over_liger": TARGET_LOSS_MEMORY}
    return found if device.type == "cpu" or not liger.missing() else found | {"cannot": f"Liger: {liger.missing()}"}


def _one_loss(settings: Settings, device: torch.device, tokens: int, hidden: int, vocabulary: int) -> dict[str, Any]:
    torch.manual_seed(0)
    given = loss_benchmark.inputs(
        SimpleNamespace(  # type: ignore[arg-type]
            tokens=tokens, hidden=hidden, vocabulary=vocabulary, supervised=1.0, dtype="bfloat16", device=device.type
        )
    )
    sides: dict[str, loss_benchmark.Side] = {"plain": loss_benchmark.plain, "dstune": loss_benchmark.dstune}
    sides["dstune, torch"] = _torch_alone
    if device.type == "cuda" and liger.missing() is None:
        sides["liger"] = _liger
        sides["liger, fp32 sums"] = _liger_fp32
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    losses: dict[str, float] = {}
    for number in range(settings.warmup + settings.steps):
        for name in list(sides)[:: 1 if number % 2 else -1]:
            taken, losses[name] = loss_benchmark.once(sides[name], *given)
            if number >= settings.warmup:
                seconds[name].append(taken)
    peaks: dict[str, int] = {}
    for name, side in sides.items():
        given[0].grad = given[1].grad = None  # of the call before: not there when a peak begins
        peaks[name] = loss_benchmark.peak_bytes(side, *given, device.type)
    other = peaks.get("liger")
    return {
        "tokens": tokens,
        "milliseconds": {name: round(1e3 * statistics.median(each), 3) for name, each in seconds.items()},
        "time_over_plain": {name: ratios(each, seconds["plain"]) for name, each in seconds.items()},
        "peak_bytes": peaks,
        "memory_over_liger": {name: round(one / other, 4) for name, one in peaks.items()} if other else None,
        "limit_milliseconds": round(6e3 * tokens * hidden * vocabulary / product_limit(device.type), 3),
        "loss": losses,
    }


def _liger(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED)(weight, hidden, targets)


def _liger_fp32(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The weight's gradient summed in fp32, as dstune has it: the other sums its chunks in bf16."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED, accum_dtype=torch.float32)(weight, hidden, targets)


def _torch_alone(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    mask = targets != IGNORED
    return summed_linear_cross_entropy(hidden[mask], weight, None, targets[mask], Logits()) / mask.sum()


def packed(settings: Settings) -> dict[str, Any]:
    """The same chats packed and padded, through one engine, by turns: a step takes the same examples, so its losses are the same."""
    world, shape, config = started(), settings.shape("1.2b"), zero3()
    with tempfile.TemporaryDirectory() as place:
        counted = sizes(shape, Path(place))
        lengths = chat_lengths(_CHATS_PER_BATCH * (1 if settings.tiny else 8), settings.max_length)
        wanted = _bytes(counted, config, _CHATS_PER_BATCH * settings.max_length)
        if wanted > room():
            return {"cannot": too_large("1.2 B with padded micro-batches", wanted)}
        ours = Dstune(shape, Path(place), config, world)
    data = MadeUp(lengths, shape.vocabulary, settings.max_length, ANSWERED)
    alone = MadeUp(lengths, shape.vocabulary, None, ANSWERED)
    groups = [list(range(at, at + _CHATS_PER_BATCH)) for at in range(0, len(lengths), _CHATS_PER_BATCH)]
    padded = [collate(alone, group, "padded", 0).to(world.device) for group in groups]
    rows = batches(data, 2, world.device)
    seconds, losses = alternate(
        {"packed": lambda: ours.step(rows), "padded": lambda: ours.step(padded)}, settings, world.device
    )
    computed = sum(batch.targets.numel() for batch in padded)
    return {
        "chats_per_step": len(lengths),
        "useful_tokens_per_second": {
            name: spread([sum(lengths) / one for one in each], 1) for name, each in seconds.items()
        },
        "times_padded": ratios(seconds["padded"], seconds["packed"]),
        "target_times_padded": TARGET_PACKED,
        "limit_times_padded": round(computed / sum(lengths), 4),
        "limit_means": "positions computed over tokens: what the padding costs where each position costs the same",
        "loss_of_the_first_step": losses,
    }
