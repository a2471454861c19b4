"""An export's weights: from a checkpoint's fp32 masters straight into safetensors files, one tensor (or joined group) at a time."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from dstune.atomic import dump_json, durable_file
from dstune.errors import CheckpointError, Problem
from dstune.model import names
from dstune.model.names import Conversion
from dstune.model.weights import INDEX_FILE, SINGLE_FILE, WeightFiles

_DTYPE_NAMES: Mapping[torch.dtype, str] = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Masters(Protocol):
    """What an export reads: a checkpoint of the whole model, or what reads like one."""

    @property
    def directory(self) -> Path: ...
    @property
    def step(self) -> int: ...
    @property
    def state(self) -> Mapping[str, Any]: ...
    def tensors(self, state: str) -> Mapping[str, tuple[int, ...]]:
        """Every parameter's name and whole shape."""
        ...

    def read(self, state: str, name: str) -> torch.Tensor:
        """A whole parameter, flattened."""
        ...


@dataclass(frozen=True)
class _Step:
    """One conversion, and what it will write (tensors without storage)."""

    conversion: Conversion
    outlines: Mapping[str, torch.Tensor]

    @property
    def bytes(self) -> int:
        return sum(_bytes(tensor) for tensor in self.outlines.values())


class Weights:
    """The tensors to export: masters of a checkpoint, cast; what was not trained (buffers), from the pretrained files."""

    def __init__(self, outline: PreTrainedModel, reader: Masters, pretrained: WeightFiles | None) -> None:
        """`outline`: the model without storage, its types those of the export.

        Raises CheckpointError where the checkpoint is not of this model, ConfigError where transformers cannot save it.
        """
        self._outline = outline
        self._reader = reader
        self._pretrained = pretrained
        self._tensors = names.all_tensors(outline)
        self._canonical = names.canonical_names(outline)
        self._stored = names.saved_names(outline)
        self._file_names: dict[str, str] = {}
        if pretrained is not None:
            plan = names.loading_plan(outline, pretrained.names())
            self._file_names = {one.target: one.sources[0] for one in plan if one.is_renaming}
        self._check()

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self._outline.parameters())

    def steps(self) -> list[_Step]:
        """Everything to write, in order, with shapes and types."""
        return [
            _Step(conversion, names.saved_outlines(conversion, self._tensors, self._outline))
            for conversion in names.saving_plan(self._outline)
        ]

    def make(self, step: _Step) -> dict[str, torch.Tensor]:
        """The tensors of one step, cast."""
        return step.conversion.run(self._read, self._outline)

    def _read(self, name: str) -> torch.Tensor:
        wanted = self._tensors[name]
        stored = self._stored_name(name)
        if stored in self._reader.tensors("fp32"):
            return self._reader.read("fp32", stored).view(wanted.shape).to(wanted.dtype)
        if self._pretrained is not None and name in self._file_names:
            return self._pretrained.read(self._file_names[name]).to(wanted.dtype)
        return _initial(self._outline, name).to(wanted.dtype)

    def _stored_name(self, name: str) -> str:
        canonical = self._canonical[name]
        return self._stored.get(canonical, canonical)

    def _check(self) -> None:
        found = dict(self._reader.tensors("fp32"))
        for name, parameter in self._outline.named_parameters():
            shape = found.pop(self._stored_name(name), None)
            if shape is None and (not parameter.requires_grad or name in self._file_names):
                continue
            if shape != tuple(parameter.shape):
                came = f"has no {name}" if shape is None else f"has {name} of shape {list(shape)}"
                raise self._foreign(came, f"shape {list(parameter.shape)}, as the model has")
        if found:
            raise self._foreign(f"has {next(iter(found))}, which the model has not", "a checkpoint of this run's model")

    def _foreign(self, came: str, expected: str) -> CheckpointError:
        return CheckpointError(Problem(str(self._reader.directory), came, expected))


def write(weights: Weights, directory: Path, max_file_bytes: int) -> None:
    """Write the safetensors files, and their index where they are several. At most `max_file_bytes` each, a larger tensor alone."""
    files = list(_divided(weights.steps(), max_file_bytes))
    file_of: dict[str, str] = {}
    for number, steps in enumerate(files, 1):
        file = SINGLE_FILE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        _write_file(directory / file, steps, weights)
        file_of |= {name: file for step in steps for name in step.outlines}
    if len(files) > 1:
        total = sum(step.bytes for steps in files for step in steps)
        index = {
            "metadata": {"total_size": total, "total_parameters": weights.num_parameters},
            "weight_map": dict(sorted(file_of.items())),
        }
        with durable_file(directory / INDEX_FILE) as out:
            out.write(dump_json(index).encode("utf-8"))


def _divided(steps: list[_Step], max_bytes: int) -> Iterator[list[_Step]]:
    """Steps in runs of at most `max_bytes`; a larger step alone."""
    run: list[_Step] = []
    size = 0
    for step in steps:
        if run and size + step.bytes > max_bytes:
            yield run
            run, size = [], 0
        run.append(step)
        size += step.bytes
    if run:
        yield run


def _write_file(path: Path, steps: list[_Step], weights: Weights) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for step in steps:
        for name, tensor in step.outlines.items():
            begin, end = end, end + _bytes(tensor)
            entry = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
            header[name] = entry
    text = json.dumps(header).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with durable_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for step in steps:
            made = weights.make(step)
            for name, outline in step.outlines.items():
                tensor = made[name]
                assert (tensor.shape, tensor.dtype) == (outline.shape, outline.dtype), name
                data: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
                file.write(memoryview(data))


def _bytes(tensor: torch.Tensor) -> int:
    return math.prod(tensor.shape) * tensor.element_size()


def _initial(outline: PreTrainedModel, name: str) -> torch.Tensor:
    """A buffer that neither checkpoint nor files hold: as the architecture initialises it (a bias of zeros, mostly)."""
    path, _, own = name.rpartition(".")
    owner: Any = outline.get_submodule(path)
    model: Any = outline
    before = owner._buffers.get(own)
    if before is None:
        raise CheckpointError(Problem(name, "is neither in the checkpoint nor in the model's own files"))
    value = torch.zeros(before.shape, dtype=before.dtype)
    owner._buffers[own] = value
    try:
        with torch.no_grad():
            model._init_weights(owner)
    finally:
        owner._buffers[own] = before
    return value
