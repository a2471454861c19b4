"""What an adapter's checkpoint becomes: peft's own two files, or (merged) the masters of the whole model, tensor by tensor."""

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from threading import local
from typing import Any

import torch
from safetensors.torch import save
from transformers import PreTrainedModel

from dstune.atomic import dump_json
from dstune.checkpoint.reader import Reader
from dstune.config.load import resolve
from dstune.config.schema import ModelSection, RunConfig
from dstune.engine.construction import DTYPES
from dstune.errors import CheckpointError, Problem, UsageError
from dstune.exporting.initial import commit_initial
from dstune.exporting.tensors import Masters
from dstune.model import adapters, names
from dstune.model.adapter_files import CONFIG_FILE, REFERENCE_KEY, WEIGHTS_FILE
from dstune.model.build import adapted_skeleton, skeleton
from dstune.model.config import is_builtin, load_config, model_directory
from dstune.model.names import Conversion
from dstune.model.reference import base_reference, require_same
from dstune.model.weights import WeightFiles


def write(directory: Path, reader: Reader, config: RunConfig, base: Path, dtype: str) -> int:
    """Write peft's adapter_config.json and adapter_model.safetensors; the number of parameters in them.

    Raises UsageError for a random base model, which is in no file, CheckpointError where the checkpoint does not hold the
    adapter whole, ConfigError where the base model has changed since.
    """
    assert config.model.adapter is not None
    if _is_random(config.model):
        came = f"an adapter of {config.model.path}, whose random weights are in no file that it could go with"
        raise UsageError(Problem("dstune export", came, do="Export the whole model: dstune export RUN OUT --merged"))
    reference = _checked_reference(reader, config, base)
    adapted = adapted_skeleton(config.model, base)
    shapes = _shapes(adapted)
    _require_whole(reader, shapes)
    tensors = {
        name: reader.read("fp32", name).view(shape).to(DTYPES[dtype]).contiguous() for name, shape in shapes.items()
    }
    metadata = {"format": "pt", REFERENCE_KEY: json.dumps(reference)}
    (directory / WEIGHTS_FILE).write_bytes(save(tensors, metadata))
    (directory / CONFIG_FILE).write_text(_peft_config(config.model, base, adapted), encoding="utf-8")
    return sum(tensor.numel() for tensor in tensors.values())


def _peft_config(model: ModelSection, base: Path, adapted: PreTrainedModel) -> str:
    """adapter_config.json as peft writes it: the base model by its hub id, or by its directory here."""
    written: Any = adapted.peft_config
    values = written[adapters.ADAPTER]
    directory = resolve(model.path, base)
    values.base_model_name_or_path = str(directory) if directory.is_dir() else model.path
    values.revision = None if directory.is_dir() else model.revision
    values.inference_mode = True
    with tempfile.TemporaryDirectory(prefix="dstune-") as scratch:
        values.save_pretrained(scratch)
        content = json.loads((Path(scratch) / CONFIG_FILE).read_text(encoding="utf-8"))
    # A set, which peft writes in any order.
    return dump_json(content | {"target_modules": sorted(content["target_modules"])})


def _is_random(model: ModelSection) -> bool:
    return is_builtin(model) or model.init == "random"


def _checked_reference(reader: Reader, config: RunConfig, base: Path) -> Mapping[str, Any]:
    reference = base_reference(config.model, base, config.train.seed)
    require_same(reader.manifest.fingerprints.get("base"), reference, str(reader.directory))
    return reference


def _shapes(adapted: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Every trained parameter's whole shape, by its name in peft's files."""
    parameters = dict(adapted.named_parameters())
    return {stored: tuple(parameters[name].shape) for name, stored in adapters.saved_names(adapted).items()}


def _require_whole(reader: Reader, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """An adapter that was saved empty, or in pieces, is found here and not by whoever loads it."""
    found = reader.tensors("fp32")
    for name in sorted(shapes.keys() | found.keys()):
        if found.get(name) != shapes.get(name):
            came = f"has {name} of shape {list(found[name])}" if name in found else f"has no {name}"
            expected = (
                f"shape {list(shapes[name])}, as the adapter has" if name in shapes else "a checkpoint of this run"
            )
            raise CheckpointError(Problem(str(reader.directory), came, expected))


@contextlib.contextmanager
def whole(reader: Reader, config: RunConfig, base: Path) -> Iterator[Masters]:
    """The masters of the whole model: the checkpoint's own, or with an adapter those of the base model with it added.

    Raises as `write`, but for random base models, which are made again for the while.
    """
    if config.model.adapter is None:
        yield reader
        return
    _checked_reference(reader, config, base)
    plain = config.model.model_copy(update={"adapter": None})
    outline = skeleton(load_config(plain, base), plain)
    with tempfile.TemporaryDirectory(prefix="dstune-") as scratch:
        if _is_random(plain):
            initial = commit_initial(Path(scratch), config.model_copy(update={"model": plain}), base)
            weights: Any = Reader(initial)
        else:
            weights = _Files(outline, WeightFiles(model_directory(plain, base)))
        yield Merged(reader, outline, adapted_skeleton(config.model, base), weights)


class Merged:
    """`tensors.Masters`: base weights with the adapter added in fp32. A thread holds one matrix that an adapter changes at a time."""

    def __init__(self, reader: Reader, outline: PreTrainedModel, adapted: PreTrainedModel, weights: Any) -> None:
        """`outline` and `adapted`: the model without and with its adapter, without storage; `weights` reads the base model."""
        shapes = _shapes(adapted)
        _require_whole(reader, shapes)
        self.directory, self.step, self.state = reader.directory, reader.step, reader.state
        self._reader, self._weights = reader, weights
        self._in_pieces: frozenset[str] = weights.in_pieces if isinstance(weights, _Files) else frozenset()
        self._last = _Last()
        stored = _stored_names(outline)
        parameters = dict(outline.named_parameters())
        self._shapes = {stored[name]: tuple(parameter.shape) for name, parameter in parameters.items()}
        own = adapters.saved_names(adapted)
        self._replaced = {stored[name]: kept for name, kept in own.items() if name in parameters}
        self._layers = {
            stored[f"{name}.weight"]: _Layer(layer, own, f"{name}.") for name, layer in adapters.layers(adapted)
        }

    def tensors(self, state: str) -> Mapping[str, tuple[int, ...]]:
        """Every parameter's name and whole shape. Only `fp32` is there."""
        assert state == "fp32"
        return self._shapes

    def read(self, state: str, name: str) -> torch.Tensor:
        """A flattened parameter, fp32."""
        assert state == "fp32"
        if name in self._replaced:
            return self._reader.read("fp32", self._replaced[name])
        weight = self._weights.read("fp32", name)
        if name not in self._layers:
            return weight
        return self._layers[name].merged(weight.view(self._shapes[name]), self._matrix).reshape(-1)

    def read_into(self, state: str, name: str, start: int, out: torch.Tensor) -> None:
        """Fill the 1-D tensor `out` from element `start` of the flattened parameter on."""
        if name in self._replaced:
            self._reader.read_into("fp32", self._replaced[name], start, out)
        elif name in self._in_pieces and name not in self._layers:
            self._weights.read_into("fp32", name, start, out)
        else:
            out.copy_(self._last.of(name, self)[start : start + out.numel()])

    def _matrix(self, name: str) -> torch.Tensor:
        return self._reader.read("fp32", name).view(self._reader.tensors("fp32")[name])


class _Last(local):
    """The tensor that a thread is writing piece by piece."""

    name: str = ""
    tensor: torch.Tensor

    def of(self, name: str, merged: Merged) -> torch.Tensor:
        if name != self.name:
            self.name, self.tensor = "", torch.empty(0)  # the one before it goes first
            self.name, self.tensor = name, merged.read("fp32", name)
        return self.tensor


class _Layer:
    """One linear layer's part of an adapter."""

    def __init__(self, layer: Any, own: Mapping[str, str], prefix: str) -> None:
        """`own`: the run-time names of trained parameters and those in the checkpoint."""
        self._scale: float = layer.scaling[adapters.ADAPTER]
        self._transposed: bool = layer.fan_in_fan_out
        self._first = own[f"{prefix}lora_A.{adapters.ADAPTER}.weight"]
        self._second = own[f"{prefix}lora_B.{adapters.ADAPTER}.weight"]
        self._lengths = own.get(f"{prefix}lora_magnitude_vector.{adapters.ADAPTER}.weight")

    def merged(self, weight: torch.Tensor, read: Any) -> torch.Tensor:
        """W + scale B A; DoRA's rows (an output each) stretched to their trained lengths. `weight` [out, in], GPT-2's [in, out]."""
        result = weight.T if self._transposed else weight
        result = torch.addmm(result, read(self._second), read(self._first), alpha=self._scale)
        if self._lengths is not None:
            result *= (read(self._lengths) / torch.linalg.vector_norm(result, dim=1))[:, None]
        return result.T if self._transposed else result


class _Files:
    """Reads like a `Reader` of a model that was never trained here: its files' tensors under their checkpoint names, in fp32.

    `in_pieces`: the names of those that a file holds as they are.
    """

    def __init__(self, outline: PreTrainedModel, files: WeightFiles) -> None:
        self._outline, self._files = outline, files
        stored, canonical = _stored_names(outline), names.canonical_names(outline)
        self._made: dict[str, tuple[Conversion, str]] = {}
        for conversion in names.loading_plan(outline, files.names()):
            for target in _targets(conversion, files, outline):
                if target in stored and (stored[target] not in self._made or canonical[target] == target):
                    self._made[stored[target]] = conversion, target
        self.in_pieces = frozenset(name for name, (conversion, _) in self._made.items() if conversion.is_renaming)

    def read(self, state: str, name: str) -> torch.Tensor:
        if name not in self._made:
            raise CheckpointError(Problem(str(self._files.directory), f"has no weights for {name}"))
        conversion, target = self._made[name]
        return conversion.run(self._files.read, self._outline)[target].float().reshape(-1)

    def read_into(self, state: str, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` from element `start` of a flattened tensor of `in_pieces` on."""
        conversion, _ = self._made[name]
        out.copy_(self._files.read_range(conversion.sources[0], start, start + out.numel()))


def _targets(conversion: Conversion, files: WeightFiles, outline: PreTrainedModel) -> list[str]:
    """The run-time names of what a conversion makes."""
    if conversion.is_renaming:
        return [conversion.target]
    return list(conversion.run(lambda name: torch.empty(files.shape(name), device="meta"), outline))


def _stored_names(outline: PreTrainedModel) -> dict[str, str]:
    """For every run-time name the name in a checkpoint of the whole model."""
    renamed = names.saved_names(outline)
    return {name: renamed.get(first, first) for name, first in names.canonical_names(outline).items()}
