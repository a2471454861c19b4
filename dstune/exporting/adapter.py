"""An adapter's checkpoint as peft's own two files; what is asked of it before it goes anywhere."""

import json
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from dstune.atomic import dump_json, write_text
from dstune.checkpoint.reader import Reader
from dstune.config.load import resolve
from dstune.config.schema import ModelSection, RunConfig
from dstune.engine.construction import DTYPES
from dstune.errors import CheckpointError, Problem, UsageError
from dstune.exporting import files
from dstune.exporting.tensors import Caster
from dstune.model import adapters
from dstune.model.adapter_files import CONFIG_FILE, REFERENCE_KEY, WEIGHTS_FILE
from dstune.model.build import adapted_skeleton
from dstune.model.config import is_builtin
from dstune.model.reference import base_reference, require_same


def write(directory: Path, reader: Reader, config: RunConfig, base: Path, dtype: str) -> int:
    """Write peft's adapter_config.json and adapter_model.safetensors; the number of parameters in them.

    Raises UsageError for a random base model, which is in no file, CheckpointError where the checkpoint does not hold the
    adapter whole, ConfigError where the base model has changed since.
    """
    assert config.model.adapter is not None
    if is_random(config.model):
        came = f"an adapter of {config.model.path}, whose random weights are in no file that it could go with"
        raise UsageError(Problem("dstune export", came, do="Export the whole model: dstune export RUN OUT --merged"))
    reference = checked_reference(reader, config, base)
    adapted = adapted_skeleton(config.model, base)
    wanted = shapes(adapted)
    require_whole(reader, wanted)
    caster = Caster(reader)
    parts = [_Parameter(caster, name, shape, DTYPES[dtype]) for name, shape in wanted.items()]
    metadata = {REFERENCE_KEY: json.dumps(reference)}
    # One file, however large: peft knows no other.
    files.write(parts, directory, sys.maxsize, stem=Path(WEIGHTS_FILE).stem, metadata=metadata)
    write_text(directory / CONFIG_FILE, _peft_config(config.model, base, adapted))
    return sum(map(math.prod, wanted.values()))


@dataclass(frozen=True)
class _Parameter:
    """`files.Part`: one trained parameter, which has the same name in the checkpoint and in peft's file."""

    caster: Caster
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def outlines(self) -> Mapping[str, torch.Tensor]:
        return {self.name: torch.empty(self.shape, dtype=self.dtype, device="meta")}

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        return self.caster.pieces(name, math.prod(self.shape), self.dtype)


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


def is_random(model: ModelSection) -> bool:
    """Whether the base model's weights are in no file."""
    return is_builtin(model) or model.init == "random"


def checked_reference(reader: Reader, config: RunConfig, base: Path) -> Mapping[str, Any]:
    """The base model by name and hash. Raises ConfigError where it is not the one that the checkpoint was trained on."""
    reference = base_reference(config.model, base, config.train.seed)
    require_same(reader.manifest.fingerprints.get("base"), reference, str(reader.directory))
    return reference


def shapes(adapted: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Every trained parameter's whole shape, by its name in peft's files."""
    parameters = dict(adapted.named_parameters())
    return {stored: tuple(parameters[name].shape) for name, stored in adapters.saved_names(adapted).items()}


def require_whole(reader: Reader, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """An adapter that was saved empty, or in pieces, is found here and not by whoever loads it. Raises CheckpointError."""
    found = reader.tensors("fp32")
    for name in sorted(wanted.keys() | found.keys()):
        if found.get(name) != wanted.get(name):
            came = f"has {name} of shape {list(found[name])}" if name in found else f"has no {name}"
            expected = (
                f"shape {list(wanted[name])}, as the adapter has" if name in wanted else "a checkpoint of this run"
            )
            raise CheckpointError(Problem(str(reader.directory), came, expected))
