"""An export's weights: from a checkpoint's fp32 masters, cast piece by piece; joined tensors group by group."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock, local
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from dstune.errors import CheckpointError, Problem
from dstune.model import names, text_side
from dstune.model.names import Conversion
from dstune.model.weights import WeightFiles

_PIECE_ELEMENTS = 8 << 20
"""32 MB of fp32 at a time."""


class Masters(Protocol):
    """What an export reads: a checkpoint of the whole model (`checkpoint.Reader`), or what reads like one. Several threads do."""

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

    def read_into(self, state: str, name: str, start: int, out: torch.Tensor) -> None:
        """Fill the 1-D tensor `out` from element `start` of the flattened parameter on."""
        ...


class Caster:
    """Reads masters and casts them, piece by piece, in buffers that are used again: fresh memory is slower than the disk."""

    def __init__(self, masters: Masters) -> None:
        self._masters = masters
        self._buffers = _Buffers()

    def pieces(self, stored: str, num_elements: int, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """The parameter `stored`, flattened, in consecutive pieces of which only one is in memory at a time: use it up."""
        for start in range(0, num_elements, _PIECE_ELEMENTS):
            length = min(_PIECE_ELEMENTS, num_elements - start)
            master = self._buffers.of(torch.float32)[:length]
            self._masters.read_into("fp32", stored, start, master)
            yield master if dtype is torch.float32 else self._buffers.of(dtype)[:length].copy_(master)


class _Buffers(local):
    """One piece of each type for each thread."""

    def __init__(self) -> None:
        self._of: dict[torch.dtype, torch.Tensor] = {}

    def of(self, dtype: torch.dtype) -> torch.Tensor:
        if dtype not in self._of:
            self._of[dtype] = torch.empty(_PIECE_ELEMENTS, dtype=dtype)
        return self._of[dtype]


class Weights:
    """The tensors to export: masters of a checkpoint, cast; what was not trained (buffers), from the pretrained files."""

    def __init__(self, outline: PreTrainedModel, reader: Masters, pretrained: WeightFiles | None) -> None:
        """`outline`: the model without storage, its types those of the export.

        Raises CheckpointError where the checkpoint is not of this model, ConfigError where transformers cannot save it.
        """
        self.outline = outline
        self._reader = reader
        self._caster = Caster(reader)
        self._initialising = Lock()
        self._pretrained = pretrained
        self.tensors = names.all_tensors(outline)
        self._canonical = names.canonical_names(outline)
        self._stored = names.saved_names(outline)
        self._in_files: dict[str, Conversion] = {}
        if pretrained is not None:
            plan = names.loading_plan(outline, pretrained.names())
            self._in_files = {self._canonical.get(one.target, one.target): one for one in plan}
        # What no text passes goes through as it was, whatever else a checkpoint or a base model says of it.
        self._untouched = {name for name in text_side.beside(outline) if self._canonical[name] in self._in_files}
        self._check()

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.outline.parameters())

    def as_saved(self) -> list["Converted"]:
        """Everything that `save_pretrained` would write, under its names; what was not touched in the type that it had."""
        self.tensors |= self._own_types()
        return [
            Converted(self, conversion, names.saved_outlines(conversion, self.tensors, self.outline))
            for conversion in names.saving_plan(self.outline)
        ]

    def as_state_dict(self) -> list["Converted"]:
        """Everything that the module's `state_dict` has, under its names; a tied tensor once, under its first."""
        kept = [name for name, first in self._canonical.items() if name == first]
        return [Converted(self, Conversion((name,), name), {name: self.tensors[name]}) for name in kept]

    @property
    def tied(self) -> Mapping[str, str]:
        """The other names of tied tensors, each with the first."""
        return {name: first for name, first in self._canonical.items() if name != first}

    def read(self, name: str) -> torch.Tensor:
        """A tensor of the model, whole, cast."""
        wanted = self.tensors[name]
        if self._is_stored(name):
            return self._reader.read("fp32", self._stored_name(name)).view(wanted.shape).to(wanted.dtype)
        conversion = self._in_files.get(self._canonical[name])
        if self._pretrained is not None and conversion is not None:
            made = conversion.run(self._pretrained.read, self.outline)
            return made[conversion.target].to(wanted.dtype)
        with self._initialising:
            return _initial(self.outline, name).to(wanted.dtype)

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """The same, flattened, in consecutive pieces. Of what the checkpoint holds only one is in memory at a time: use it up."""
        if not self._is_stored(name):
            yield self.read(name).flatten()
            return
        wanted = self.tensors[name]
        yield from self._caster.pieces(self._stored_name(name), wanted.numel(), wanted.dtype)

    def _own_types(self) -> dict[str, torch.Tensor]:
        """Outlines of what is not touched, in the types that it has in the files."""
        return {
            name: torch.empty_like(self.tensors[name], dtype=self._pretrained.dtype(conversion.sources[0]))
            for name in self._untouched
            if self._pretrained is not None and (conversion := self._in_files[self._canonical[name]]).is_renaming
        }

    def _is_stored(self, name: str) -> bool:
        return name not in self._untouched and self._stored_name(name) in self._reader.tensors("fp32")

    def _stored_name(self, name: str) -> str:
        canonical = self._canonical[name]
        return self._stored.get(canonical, canonical)

    def _check(self) -> None:
        found = dict(self._reader.tensors("fp32"))
        for name, parameter in self.outline.named_parameters():
            shape = found.pop(self._stored_name(name), None)
            if shape is None and not parameter.requires_grad:
                continue
            if shape != tuple(parameter.shape):
                came = f"has no {name}" if shape is None else f"has {name} of shape {list(shape)}"
                raise self._foreign(came, f"shape {list(parameter.shape)}, as the model has")
        if found:
            raise self._foreign(f"has {next(iter(found))}, which the model has not", "a checkpoint of this run's model")

    def _foreign(self, came: str, expected: str) -> CheckpointError:
        return CheckpointError(Problem(str(self._reader.directory), came, expected))


@dataclass(frozen=True)
class Converted:
    """`files.Part`: what one conversion makes of the model's tensors."""

    weights: Weights
    conversion: Conversion
    outlines: Mapping[str, torch.Tensor]

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        if self.conversion.is_renaming:
            yield from self.weights.pieces(self.conversion.sources[0])
            return
        tensor = self._made[name]
        assert tensor.shape == self.outlines[name].shape, name
        yield tensor
        if name == next(reversed(self.outlines)):
            del self.__dict__["_made"]

    @cached_property
    def _made(self) -> dict[str, torch.Tensor]:
        """Joined or cut tensors, whole: their parts cannot be had piece by piece."""
        return self.conversion.run(self.weights.read, self.weights.outline)


def _initial(outline: PreTrainedModel, name: str) -> torch.Tensor:
    """What neither checkpoint nor files hold: as the architecture initialises it (a bias of zeros; a table of fixed positions)."""
    path, _, own = name.rpartition(".")
    owner: Any = outline.get_submodule(path)
    model: Any = outline
    fixed = owner._buffers if own in owner._buffers else owner._parameters
    before = fixed[own]
    if before.requires_grad:
        raise CheckpointError(Problem(name, "is neither in the checkpoint nor in the model's own files"))
    value = torch.zeros(before.shape, dtype=before.dtype)
    fixed[own] = value if fixed is owner._buffers else torch.nn.Parameter(value, requires_grad=False)
    try:
        with torch.no_grad():
            model._init_weights(owner)
    finally:
        fixed[own] = before
    return value
