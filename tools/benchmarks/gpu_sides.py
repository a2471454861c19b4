"""The two sides that train in `tools/bench gpu`: dstune's engine, model and kernels, and transformers' own model in plain torch.

Both begin with the same weights, take the same batches, clip to the same norm and are measured from an idle device to an idle device.
"""

import contextlib
import inspect
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import varlen
from transformers import AutoConfig, AutoModelForCausalLM

from dstune.batch import Batch, collate
from dstune.config.schema import ModelSection
from dstune.engine.parameters import full_shape, local_piece
from dstune.engine.world import World
from dstune.engine.zero import ZeroEngine
from dstune.model.build import checkpoint_activations, construct
from dstune.model.config import load_config
from dstune.model.footprint import footprint
from dstune.model.kernels import choice
from dstune.model.per_example import PER_EXAMPLE
from dstune.planning.cost import flops
from dstune.planning.deepspeed import load_preset, merged
from dstune.planning.shapes import ModelShape
from dstune.training.phases import peak_flops
from tools.benchmarks.gpu_shapes import MadeUp, Settings, Shape
from tools.benchmarks.measures import product_rate, wait_for

LR, BETAS, EPS, WEIGHT_DECAY, NORM = 1e-5, (0.9, 0.95), 1e-8, 0.1, 1.0
_SEED = 0

BF16_STATES: Mapping[str, Any] = {
    "bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True},
    "data_types": {"grad_accum_dtype": "bf16"},
    "communication_data_type": "bf16",
}
"""DeepSpeed's settings under which weights, gradients and moments are bf16, and nothing beside them."""


def zero3(**more: Any) -> dict[str, Any]:
    """The preset zero3, with `more` over it."""
    return merged(load_preset("zero3", Path()), {"gradient_clipping": NORM, **more})


def section_of(shape: Shape, folder: Path) -> ModelSection:
    """The model section of a run with this shape, whose config.json is written into `folder`."""
    (folder / "config.json").write_text(json.dumps(shape.config()), encoding="utf-8")
    return ModelSection(path=str(folder), init="random", activation_checkpointing=False)


def sizes(shape: Shape, folder: Path) -> ModelShape:
    """What the planner counts of it."""
    return footprint(section_of(shape, folder), Path())


def started() -> World:
    """The world of this process, joined."""
    world = World.from_environment()
    world.init()
    let_kernels_group_heads()
    return world


def let_kernels_group_heads() -> None:
    """Have torch's attention over packed rows take the word for grouped heads: before 2.12 it grouped them unasked."""
    kernel = varlen.varlen_attn
    if "enable_gqa" in inspect.signature(kernel).parameters:
        return

    def asked(*args: Any, enable_gqa: bool = False, **kwargs: Any) -> Any:
        return kernel(*args, **kwargs)

    varlen.varlen_attn = asked


def batches(data: MadeUp, rows: int, device: torch.device) -> list[Batch]:
    """All rows of `data`, packed, so many a micro-batch."""
    numbers = range(data.num_rows)
    groups = [list(numbers[start : start + rows]) for start in range(0, len(numbers), rows)]
    return [collate(data, group, "packed", 0).to(device) for group in groups]


def fill(module: torch.nn.Module, device: torch.device) -> None:
    """Drawn matrices, norms of one: the same for each precision and partition, drawn on the device in bf16."""
    generator = torch.Generator(device).manual_seed(_SEED)
    for parameter in module.parameters():
        vector = len(full_shape(parameter)) < 2
        with local_piece(parameter) as piece:
            values = torch.empty(piece.tensor.shape, dtype=torch.bfloat16, device=device)
            piece.tensor.copy_(values.fill_(1.0) if vector else values.normal_(std=0.02, generator=generator))


class Dstune:
    """dstune's model with its kernels, and an engine; `step` does what a step of its loop asks of the engine."""

    name = "dstune"

    def __init__(
        self,
        shape: Shape,
        folder: Path,
        ds_config: Mapping[str, Any],
        world: World,
        engine: Callable[[Any, Mapping[str, Any], World], Any] | None = None,
        recompute: bool = False,
    ) -> None:
        section = section_of(shape, folder)
        module = construct(load_config(section, Path()), section, PER_EXAMPLE, ds_config)
        fill(module, world.device)
        if recompute:
            checkpoint_activations(module)
        kernels = choice.chosen(section, module, world.device.type)
        self._loss = choice.put_in(kernels, module, world.device.type)
        self.kernels = {one.name: one.why for one in kernels}
        self.engine = (engine or zero_engine)(module.train(), ds_config, world)

    def step(self, micro_batches: Sequence[Batch]) -> float:
        """The mean loss of the step's targets."""
        supervised = sum(batch.supervised for batch in micro_batches)
        total = torch.zeros((), device=micro_batches[0].targets.device)
        for number, batch in enumerate(micro_batches):
            loss, _ = self._loss(self.engine.module, batch)
            self.engine.backward(loss / supervised, last=number == len(micro_batches) - 1)
            total += loss.detach()
        self.engine.step(LR)
        return float(total) / supervised


def zero_engine(module: Any, ds_config: Mapping[str, Any], world: World) -> ZeroEngine:
    """The engine of a run."""
    return ZeroEngine(
        module, lr=LR, ds_config=ds_config, world=world, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY
    )  # fmt: skip


class Transformers:
    """transformers' model with Liger's kernels, compiled: `peer` says what its weights are (`gpu_shapes.Settings.peer`)."""

    name = "transformers, Liger, compile"

    def __init__(self, folder: Path, settings: Settings, device: torch.device) -> None:
        dtype = torch.float32 if settings.peer == "autocast" else torch.bfloat16
        with device:
            model = AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(folder), dtype=dtype, attn_implementation="sdpa"
            )
        fill(model, device)
        if not settings.tiny:
            from liger_kernel.transformers import apply_liger_kernel_to_llama

            apply_liger_kernel_to_llama(model=model)
        self._model: Any = torch.compile(model.train(), backend="eager" if settings.tiny else "inductor")
        self._cast = torch.autocast(device.type, torch.bfloat16) if dtype is torch.float32 else contextlib.nullcontext()
        self._parameters = list(model.parameters())
        self._adamw = torch.optim.AdamW(
            self._parameters, lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, fused=True
        )

    def step(self, micro_batches: Sequence[torch.Tensor]) -> float:
        """`micro_batches`: ids [rows, length], whole rows of one example each; the mean loss."""
        total = torch.zeros((), device=micro_batches[0].device)
        with torchs_linear():
            for ids in micro_batches:
                with self._cast:
                    loss = self._model(input_ids=ids, labels=ids, use_cache=False).loss / len(micro_batches)
                loss.backward()
                total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self._parameters, NORM)
        self._adamw.step()
        self._adamw.zero_grad()
        return float(total)


@contextlib.contextmanager
def torchs_linear() -> Iterator[None]:
    """Inside, `torch.nn.functional.linear` is torch's own.

    NOTE: zero.Init puts DeepSpeed's autograd function in its place, for good and for every model of the process: torch.compile would
    have to trace that, and autocast would not keep the weights' bf16 copies.
    """
    functional: Any = torch.nn.functional
    replaced, functional.linear = functional.linear, torch._C._nn.linear
    try:
        yield
    finally:
        functional.linear = replaced


def without_liger() -> str | None:
    """Why the plain torch side cannot be had; None: it can."""
    return None if find_spec("liger_kernel") else "liger-kernel is not installed"


def alternate(
    sides: Mapping[str, Callable[[], float]], settings: Settings, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Each side's seconds of its counted steps, the sides taking turns; and the loss of its first step.

    A counted turn of one side among several begins with a step that does not count: in it the allocator takes back what it had kept
    for the other side, where both together would not fit.
    """
    idle = torch.zeros((), device=device)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    first: dict[str, float] = {}
    for number in range(settings.warmup + settings.steps):
        for name in list(sides)[:: 1 if number % 2 else -1]:
            if number >= settings.warmup and len(sides) > 1:
                sides[name]()
            wait_for(idle)
            started = time.perf_counter()
            loss = sides[name]()
            wait_for(idle)
            taken = time.perf_counter() - started
            first.setdefault(name, loss)
            if number >= settings.warmup:
                seconds[name].append(taken)
    return seconds, first


def spread(values: Sequence[float], digits: int = 4) -> dict[str, float]:
    """The median, the least and the most."""
    found = {"median": statistics.median(values), "least": min(values), "most": max(values)}
    return {name: round(value, digits) for name, value in found.items()}


def rates(
    shape: ModelShape, tokens: int, squares: int, seconds: Sequence[float], device: torch.device
) -> dict[str, Any]:
    """Of a side's steps: tokens a second and causal FLOP utilisation, with the limits that the device's large product sets."""
    used = flops(shape, tokens, squares, recompute=False)
    peak = peak_flops(device, torch.bfloat16)
    assert peak is not None, "a GPU that dstune does not know has no peak to compare with"
    product = product_limit(device.type)
    return {
        "tokens_per_step": tokens,
        "step_seconds": spread(seconds),
        "tokens_per_second": spread([tokens / each for each in seconds], 1),
        "flop_utilisation": spread([used / each / peak for each in seconds]),
        "limit": {
            "flop_utilisation": round(product / peak, 4),
            "tokens_per_second": round(product / used * tokens, 1),
        },
    }


@lru_cache
def product_limit(device_type: str) -> float:
    """FLOP/s of this process's large bf16 product."""
    return product_rate(device_type, torch.bfloat16)


def peak_bytes() -> int | None:
    """The most that torch has allocated on the GPU since `forget_peak`; None: there is none."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def forget_peak() -> None:
    """Count `peak_bytes` from now on."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
