"""The whole model of a run that trained an adapter, read like a checkpoint of it: base weights with the adapter added in fp32.

Of a weight a few rows are made at a time, whatever is asked for: memory does not grow with the model.
"""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from threading import local
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from dstune.checkpoint.reader import Reader
from dstune.config.adapter import AdapterSection
from dstune.config.schema import RunConfig
from dstune.errors import CheckpointError, Problem
from dstune.exporting import adapter
from dstune.exporting.initial import commit_initial
from dstune.exporting.tensors import Masters
from dstune.model import adapters, names
from dstune.model.build import adapted_skeleton, skeleton
from dstune.model.config import load_config, model_directory
from dstune.model.names import Conversion
from dstune.model.weights import WeightFiles

_BLOCK_ELEMENTS = 8 << 20
"""Of a weight at a time: 32 MB of fp32, and a row at least."""


@contextlib.contextmanager
def whole_model(reader: Reader, config: RunConfig, base: Path) -> Iterator[Masters]:
    """The masters of all weights: `reader` itself, or what the adapter in it makes of the base model.

    The adapter is `config`'s, or where it has none that of the run which wrote the checkpoint. Raises as `adapter.write`, but for
    random base models, which are made again for the while.
    """
    config = _with_its_adapter(config, reader)
    if config.model.adapter is None:
        yield reader
        return
    adapter.checked_reference(reader, config, base)
    plain = config.model.model_copy(update={"adapter": None})
    outline = skeleton(load_config(plain, base), plain)
    adapted = adapted_skeleton(config.model, base)
    if not adapter.is_random(plain):
        yield _Merged(reader, outline, adapted, _Files(outline, WeightFiles(model_directory(plain, base))))
        return
    with tempfile.TemporaryDirectory(prefix="dstune-") as scratch:
        initial = commit_initial(Path(scratch), config.model_copy(update={"model": plain}), base)
        yield _Merged(reader, outline, adapted, Reader(initial))


def _with_its_adapter(config: RunConfig, reader: Reader) -> RunConfig:
    recorded: Mapping[str, Any] = reader.manifest.fingerprints.get("config") or {}
    theirs = recorded.get("model", {}).get("adapter")
    if config.model.adapter is not None or theirs is None:
        return config
    model = config.model.model_copy(update={"adapter": AdapterSection.model_validate(theirs)})
    return config.model_copy(update={"model": model})


class _Base(Protocol):
    """The base model's weights by their checkpoint names; as `Masters`."""

    def read(self, state: str, name: str) -> torch.Tensor: ...
    def read_into(self, state: str, name: str, start: int, out: torch.Tensor) -> None: ...


class _Merged:
    """`Masters` of a base model and an adapter for it."""

    def __init__(self, reader: Reader, outline: PreTrainedModel, adapted: PreTrainedModel, weights: _Base) -> None:
        """`outline` and `adapted`: the model without and with its adapter, without storage."""
        adapter.require_whole(reader, adapter.shapes(adapted))
        self.directory, self.step, self.state = reader.directory, reader.step, reader.state
        self._reader, self._weights = reader, weights
        stored = _stored_names(outline)
        parameters = dict(outline.named_parameters())
        self._shapes = {stored[name]: tuple(parameter.shape) for name, parameter in parameters.items()}
        own = adapters.saved_names(adapted)
        self._replaced = {stored[name]: kept for name, kept in own.items() if name in parameters}
        self._layers: dict[str, _Layer] = {}
        for name, layer in adapters.layers(adapted):
            weight = stored[f"{name}.weight"]
            self._layers[weight] = _Layer(layer, name, own, reader, weights, weight, self._shapes[weight])

    def tensors(self, state: str) -> Mapping[str, tuple[int, ...]]:
        """Every parameter's name and whole shape. Only `fp32` is there."""
        assert state == "fp32"
        return self._shapes

    def read(self, state: str, name: str) -> torch.Tensor:
        """A flattened parameter, fp32."""
        assert state == "fp32"
        if name in self._replaced:
            return self._reader.read("fp32", self._replaced[name])
        if name not in self._layers:
            return self._weights.read("fp32", name)
        out = torch.empty(self._layers[name].num_elements)
        self._layers[name].read_into(0, out)
        return out

    def read_into(self, state: str, name: str, start: int, out: torch.Tensor) -> None:
        """Fill the 1-D tensor `out` from element `start` of the flattened parameter on."""
        assert state == "fp32"
        if name in self._replaced:
            self._reader.read_into("fp32", self._replaced[name], start, out)
        elif name in self._layers:
            self._layers[name].read_into(start, out)
        else:
            self._weights.read_into("fp32", name, start, out)


class _Layer:
    """One linear layer: W + scale B A; DoRA's outputs stretched to their trained lengths. W is [out, in], GPT-2's [in, out]."""

    def __init__(
        self,
        layer: Any,
        name: str,
        own: Mapping[str, str],
        reader: Reader,
        weights: _Base,
        weight: str,
        shape: tuple[int, ...],
    ) -> None:
        """`own`: the run-time names of trained parameters and those in the checkpoint; `weight` and `shape`: of W in `weights`."""
        self._scale: float = layer.scaling[adapters.ADAPTER]
        self._transposed: bool = layer.fan_in_fan_out
        self._reader, self._weights, self._weight = reader, weights, weight
        self._rows, self._columns = shape
        self._first = own[f"{name}.lora_A.{adapters.ADAPTER}.weight"]
        self._second = own[f"{name}.lora_B.{adapters.ADAPTER}.weight"]
        self._lengths = own.get(f"{name}.lora_magnitude_vector.{adapters.ADAPTER}.weight")

    @property
    def num_elements(self) -> int:
        return self._rows * self._columns

    def read_into(self, start: int, out: torch.Tensor) -> None:
        """Fill the 1-D tensor `out` from element `start` of the flattened weight on."""
        stop = start + out.numel()
        for row, block in self._sums(start // self._columns, -(-stop // self._columns)):
            offset = row * self._columns
            first, last = max(start, offset), min(stop, offset + block.numel())
            made = self._stretched(row, block).view(-1)
            out[first - start : last - start] = made[first - offset : last - offset]

    def _sums(self, start: int, stop: int) -> Iterator[tuple[int, torch.Tensor]]:
        """W + scale B A from row `start` to `stop`, in blocks, each with its first row."""
        first, second = self._matrix(self._first), self._matrix(self._second)
        left, right = (first.T, second.T) if self._transposed else (second, first)
        step = max(1, _BLOCK_ELEMENTS // self._columns)
        for row in range(start, stop, step):
            block = torch.empty(min(step, stop - row), self._columns)
            self._weights.read_into("fp32", self._weight, row * self._columns, block.view(-1))
            yield row, block.addmm_(left[row : row + len(block)], right, alpha=self._scale)

    def _stretched(self, row: int, block: torch.Tensor) -> torch.Tensor:
        if self._lengths is None:
            return block
        lengths = self._matrix(self._lengths)
        if self._transposed:
            return block.mul_(lengths / self._column_norms)
        ours = lengths[row : row + len(block)]
        return block.mul_((ours / torch.linalg.vector_norm(block, dim=1))[:, None])

    @cached_property
    def _column_norms(self) -> torch.Tensor:
        """Of W + scale B A, which takes reading all of it once."""
        squares = torch.zeros(self._columns, dtype=torch.float64)
        for _, block in self._sums(0, self._rows):
            squares += block.double().square_().sum(0)
        return squares.sqrt_().float()

    def _matrix(self, name: str) -> torch.Tensor:
        return self._reader.read("fp32", name).view(self._reader.tensors("fp32")[name])


class _Last(local):
    """What a thread's last conversion made: its tensors are asked for piece by piece."""

    conversion: Conversion | None = None
    made: Mapping[str, torch.Tensor]


class _Files:
    """`_Base` of a model that was never trained here: its files' tensors under their checkpoint names, in fp32."""

    def __init__(self, outline: PreTrainedModel, files: WeightFiles) -> None:
        self._outline, self._files, self._last = outline, files, _Last()
        stored, canonical = _stored_names(outline), names.canonical_names(outline)
        self._source: dict[str, tuple[Conversion, str]] = {}
        for conversion in names.loading_plan(outline, files.names()):
            for target in _targets(conversion, files, outline):
                if target in stored and (stored[target] not in self._source or canonical[target] == target):
                    self._source[stored[target]] = conversion, target

    def read(self, state: str, name: str) -> torch.Tensor:
        conversion, target = self._found(name)
        return conversion.run(self._files.read, self._outline)[target].float().reshape(-1)

    def read_into(self, state: str, name: str, start: int, out: torch.Tensor) -> None:
        conversion, target = self._found(name)
        stop = start + out.numel()
        if conversion.is_renaming:
            out.copy_(self._files.read_range(conversion.sources[0], start, stop))
            return
        if self._last.conversion is not conversion:
            self._last.made = conversion.run(self._files.read, self._outline)
            self._last.conversion = conversion
        out.copy_(self._last.made[target].reshape(-1)[start:stop])

    def _found(self, name: str) -> tuple[Conversion, str]:
        if name not in self._source:
            raise CheckpointError(Problem(str(self._files.directory), f"has no weights for {name}"))
        return self._source[name]


def _targets(conversion: Conversion, files: WeightFiles, outline: PreTrainedModel) -> list[str]:
    """The run-time names of what a conversion makes."""
    if conversion.is_renaming:
        return [conversion.target]
    return list(conversion.run(lambda name: torch.empty(files.shape(name), device="meta"), outline))


def _stored_names(outline: PreTrainedModel) -> dict[str, str]:
    """For every run-time name the name in a checkpoint of the whole model."""
    renamed = names.saved_names(outline)
    return {name: renamed.get(first, first) for name, first in names.canonical_names(outline).items()}
