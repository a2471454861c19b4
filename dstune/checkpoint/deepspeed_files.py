"""A checkpoint that DeepSpeed itself wrote (ZeRO 1, 2, 3): its files, and which elements of which parameter each of them holds."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dstune.checkpoint.layout import SliceEntry, tile
from dstune.checkpoint.restricted import Record, load, require_checksums
from dstune.errors import CheckpointError, Problem

_OPTIMIZER_FILE = re.compile(r"((?:bf16_|fp16_)?)zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_UNKNOWN_FILES = {
    "layer_*": "pipeline stages, or experts spread over workers",
    "expp_rank_*": "experts spread over workers",
    "*mp_rank_01_*": "tensor parallelism",
}
_LOSS_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class Piece:
    """A run of elements of one parameter that one of DeepSpeed's ranks holds, in every state."""

    name: str
    """As DeepSpeed knew it: the module's own name at run time."""
    offset: int
    """First element, in the flattened parameter."""
    states: Mapping[str, torch.Tensor]
    """`fp32`, `exp_avg`, …: one-dimensional views of the mapped file."""


@dataclass(frozen=True)
class _Place:
    """Where a piece stands in the flat tensor `group` of its rank."""

    name: str
    offset: int
    length: int
    group: int
    start: int


class DeepSpeedCheckpoint:
    """One tag of a DeepSpeed checkpoint directory, mapped; only what is asked for is read.

    Raises CheckpointError, with the file's name, where a rank's file is missing, damaged, or of another save than the others.
    """

    def __init__(self, directory: Path, tag: str | None = None, skip_objects: bool = False) -> None:
        """`directory`: that which `save_checkpoint` was given, or the tag's own; `tag`: default the one that `latest` names.

        `skip_objects`: read past objects of classes that DeepSpeed itself does not write, rather than refuse the file.
        """
        self.directory = _tag_directory(directory, tag)
        self._skip_objects = skip_objects
        try:
            self._look()
        except CheckpointError:
            raise
        except (KeyError, AttributeError, IndexError, TypeError, ValueError) as error:
            came = f"its records are not laid out as DeepSpeed's are: {error!r}"
            raise CheckpointError(Problem(str(self.directory), came, "a checkpoint of ZeRO stage 1, 2 or 3")) from error

    def _look(self) -> None:
        files = _optimizer_files(self.directory)
        first = self._optimizer(files[min(files)])
        self.world_size: int = _partition_count(files[min(files)], first)
        _require_ranks(self.directory, files, self.world_size)
        self.stage = int(first.get("zero_stage", 1))  # DeepSpeed's class for ZeRO-1 in bf16 writes none
        self._files = [files[rank] for rank in range(self.world_size)]
        self._optimizers = [self._optimizer(file) for file in self._files]
        self._model_files = self._find_model_files()
        self._models = [self._load(file) for file in self._model_files]
        self._check_same_save()
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: tuple(shape) for group in self._model["param_shapes"] for name, shape in group.items()
        }
        """The trained parameters; a tied one under its first name."""
        self._places = self._find_places()
        self._check_places()
        self._check_states()

    @property
    def global_steps(self) -> int:
        """Steps taken, skipped ones counted."""
        return int(self._model["global_steps"])

    @property
    def optimizer_steps(self) -> int:
        """Updates made, as the optimizer counts them (its bias correction)."""
        return self._steps[0]

    @property
    def batch_size(self) -> int | None:
        """Rows of a step over all workers, by DeepSpeed's own count; None before its first step."""
        return int(self._model["global_samples"]) // self.global_steps if self.global_steps else None

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the optimizer was last set to: `lr`, `betas`, `eps`, `weight_decay`, …"""
        return {key: value for key, value in _param_groups(self._optimizers[0])[0].items() if key != "params"}

    @property
    def shared(self) -> Mapping[str, str]:
        """Other names of tied parameters, each with the name that `shapes` has."""
        return dict(self._model.get("shared_params") or {})

    @property
    def frozen(self) -> Mapping[str, tuple[int, ...]]:
        """Parameters that were not trained, where the checkpoint names them."""
        return {name: tuple(shape) for name, shape in (self._model.get("frozen_param_shapes") or {}).items()}

    @property
    def buffers(self) -> list[str]:
        """The persistent buffers that it holds (they are not imported: training does not change them)."""
        return list(self._model.get("buffer_names") or ())

    @property
    def loss_scale(self) -> dict[str, float] | None:
        """fp16's dynamic loss scale; None where there is none."""
        scaler = vars(self._optimizers[0].get("loss_scaler") or Record())
        if not self._optimizers[0].get("dynamic_loss_scale") or any(key not in scaler for key in _LOSS_SCALER):
            return None
        return {key: scaler[key] for key in _LOSS_SCALER}

    @cached_property
    def states(self) -> tuple[str, ...]:
        """The training states of every parameter: `fp32`, and the optimizer's."""
        return tuple(self._flat_states(0)[0])

    def pieces(self, rank: int) -> Iterator[Piece]:
        """What `rank` holds, in the order of its file, which is first read whole against its own checksums."""
        require_checksums(self._files[rank])
        flats = self._flat_states(rank)
        for place in self._places[rank]:
            states = {
                state: flat.detach().narrow(0, place.start, place.length) for state, flat in flats[place.group].items()
            }
            yield Piece(place.name, place.offset, states)

    def frozen_weight(self, name: str) -> torch.Tensor:
        """A frozen parameter, whole, in the type that it was kept in."""
        parts = [model["frozen_param_fragments"][name].detach().flatten() for model in self._models]
        return torch.cat(parts)[: math.prod(self.frozen[name])].view(self.frozen[name])

    @property
    def _model(self) -> Mapping[str, Any]:
        return self._models[0]

    def _optimizer(self, file: Path) -> Mapping[str, Any]:
        state = self._load(file).get("optimizer_state_dict")
        if not isinstance(state, Mapping) or "partition_count" not in state:
            raise CheckpointError(Problem(str(file), "holds no ZeRO optimizer", "a checkpoint of ZeRO stage 1, 2 or 3"))
        return state

    def _load(self, file: Path) -> Mapping[str, Any]:
        value = load(file, self._skip_objects)
        if not isinstance(value, Mapping):
            raise CheckpointError(Problem(str(file), "is not a file of a DeepSpeed checkpoint"))
        return value

    def _find_model_files(self) -> list[Path]:
        if self.stage == 3:
            names = [f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(self.world_size)]
        else:
            names = ["mp_rank_00_model_states.pt"]
        missing = [name for name in names if not (self.directory / name).is_file()]
        if missing:
            raise CheckpointError(Problem(str(self.directory / missing[0]), "is missing", "one for each worker"))
        return [self.directory / name for name in names]

    def _check_same_save(self) -> None:
        """Every file belongs to the same step of the same world: DeepSpeed overwrites a tag file by file."""
        for file, state in zip(self._files, self._optimizers, strict=True):
            if _partition_count(file, state) != self.world_size:
                came = f"was written by {_partition_count(file, state)} workers, others by {self.world_size}"
                raise CheckpointError(Problem(str(file), came, "files of one save"))
        for file, model in zip(self._model_files, self._models, strict=True):
            for key in ("param_shapes", "global_steps", "dp_world_size"):
                if key not in model or model[key] is None:
                    raise CheckpointError(Problem(str(file), f"has no {key}", "a checkpoint of ZeRO stage 1, 2 or 3"))
            for key in ("global_steps", "param_shapes"):
                if model[key] != self._model[key]:
                    raise CheckpointError(Problem(str(file), f"its {key} is not that of rank 0", "files of one save"))
            if model["dp_world_size"] != self.world_size:
                came = f"is of {model['dp_world_size']} workers, the optimizer's files are of {self.world_size}"
                raise CheckpointError(Problem(str(file), came, "files of one save"))
            if (model.get("mp_world_size") or 1) != 1:
                raise CheckpointError(Problem(str(file), "tensor parallelism", "data parallelism (ZeRO) alone"))

    def _find_places(self) -> list[list[_Place]]:
        return self._places_of_stage_3() if self.stage == 3 else self._places_of_groups()

    def _places_of_stage_3(self) -> list[list[_Place]]:
        """Each parameter is cut into equal pieces, the last ones padded: 10 elements on 3 ranks are 4, 4, and 2 with 2 of padding."""
        places: list[list[_Place]] = [[] for _ in range(self.world_size)]
        for group, shapes in enumerate(self._model["param_shapes"]):
            start = 0
            for name, shape in shapes.items():
                count = math.prod(shape)
                size = -(-count // self.world_size)
                for rank in range(self.world_size):
                    offset = min(rank * size, count)
                    places[rank].append(_Place(name, offset, min(size, count - offset), group, start))
                start += size
        return [[place for place in mine if place.length] for mine in places]

    def _places_of_groups(self) -> list[list[_Place]]:
        """Each group is one tensor, cut between the ranks: a parameter's pieces follow each other in the ranks' order."""
        reached: dict[str, int] = {}
        places: list[list[_Place]] = []
        for file, state in zip(self._files, self._optimizers, strict=True):
            mappings = state.get("param_slice_mappings")
            if mappings is None:
                raise CheckpointError(Problem(str(file), "has no param_slice_mappings", "DeepSpeed 0.8 or newer"))
            mine: list[_Place] = []
            for group, mapping in enumerate(mappings):
                for name, address in mapping.items():
                    offset = reached.get(name, 0)
                    reached[name] = offset + address.numel
                    mine.append(_Place(name, offset, address.numel, group, address.start))
            places.append([place for place in mine if place.length])
        return places

    def _check_places(self) -> None:
        """The pieces are exactly the parameters, each element once."""
        entries = [
            SliceEntry("fp32", place.name, self.shapes.get(place.name, ()), place.offset, place.length)
            for mine in self._places
            for place in mine
        ]
        found, problems = tile(entries)
        whole = {name for name, shape in self.shapes.items() if math.prod(shape)}
        problems += [f"{name} is in no file" for name in sorted(whole - set(found.get("fp32", {})))]
        if problems:
            raise CheckpointError(Problem(str(self.directory), "; ".join(problems[:5]), "files of one save"))

    def _check_states(self) -> None:
        """Every rank has every state of every element, and all count the same updates."""
        self._steps = list[int]()
        for rank, file in enumerate(self._files):
            flats = self._flat_states(rank)
            for place in self._places[rank]:
                for state in self.states:
                    flat = flats[place.group].get(state)
                    if flat is None or flat.dim() != 1 or not 0 <= place.start <= flat.numel() - place.length:
                        came = f"has not all of {state} of {place.name}"
                        do = "States on NVMe, or in 8 bits, cannot be imported; train on without them from an export."
                        raise CheckpointError(Problem(str(file), came, "a flat tensor of it", do))
            self._steps += _optimizer_steps(self._optimizers[rank]) or [0]
            if set(self._steps) != {self._steps[0]}:
                came = f"its optimizer has made {self._steps[-1]} updates, rank 0's {self._steps[0]}"
                raise CheckpointError(Problem(str(file), came, "files of one save"))

    def _flat_states(self, rank: int) -> list[dict[str, torch.Tensor]]:
        """For each flat tensor of a rank its fp32 values, and what the optimizer keeps beside them."""
        state = self._optimizers[rank]
        flats: list[torch.Tensor] = state["fp32_flat_groups" if self.stage == 3 else "single_partition_of_fp32_groups"]
        base = _base_optimizer(state)
        kept: list[Mapping[str, Any]]
        if isinstance(base, list):  # what DeepSpeed calls an elastic checkpoint: no dictionary around
            kept = base
        else:
            order = [number for group in base["param_groups"] for number in group["params"]]
            kept = [base["state"].get(number, {}) for number in order]
        if len(kept) != len(flats):
            came = f"holds {len(flats)} flat tensors, and the optimizer's states of {len(kept)}"
            raise CheckpointError(Problem(str(self._files[rank]), came))
        return [
            {"fp32": flat}
            | {key: value for key, value in values.items() if isinstance(value, torch.Tensor) and value.dim() > 0}
            for flat, values in zip(flats, kept, strict=True)
        ]


def _tag_directory(directory: Path, tag: str | None) -> Path:
    latest = directory / "latest"
    if tag is None and any(directory.glob("*_optim_states.pt")):
        return directory
    if tag is None and not latest.is_file():
        came = "no `latest` and no *_optim_states.pt" if directory.is_dir() else "no such directory"
        expected, do = "the directory that save_checkpoint was given", "--tag names a save in it"
        raise CheckpointError(Problem(str(directory), came, expected, do))
    if tag is None:
        tag = latest.read_text(encoding="utf-8", errors="replace").strip()
    named = directory / tag
    if tag in ("", "..") or Path(tag).name != tag or not named.is_dir():
        tags = sorted(path.parent.name for path in directory.glob("*/*rank_0_mp_rank_00_optim_states.pt"))
        raise CheckpointError(
            Problem(str(directory), f"no directory for the tag {tag!r}", f"one of: {', '.join(tags) or 'none'}")
        )
    return named


def _optimizer_files(directory: Path) -> dict[int, Path]:
    """The optimizer's file of each rank. Raises CheckpointError where there are none, or files of other kinds of parallelism."""
    for pattern, what in _UNKNOWN_FILES.items():
        if strange := sorted(directory.glob(pattern)):
            raise CheckpointError(Problem(str(strange[0]), what, "data parallelism (ZeRO stage 1, 2 or 3) alone"))
    files: dict[int, Path] = {}
    for path in sorted(directory.glob("*_optim_states.pt")):
        if match := _OPTIMIZER_FILE.fullmatch(path.name):
            rank = int(match.group(2))
            if rank in files:
                raise CheckpointError(Problem(str(path), f"is there beside {files[rank].name}", "files of one save"))
            files[rank] = path
    if not files:
        raise CheckpointError(
            Problem(str(directory), "no *_optim_states.pt of ZeRO", "a checkpoint of ZeRO stage 1, 2 or 3")
        )
    return files


def _require_ranks(directory: Path, files: Mapping[int, Path], world_size: int) -> None:
    name = re.compile(r"zero_pp_rank_\d+_")
    some = files[min(files)].name
    for rank in range(world_size):
        if rank not in files:
            missing = directory / name.sub(f"zero_pp_rank_{rank}_", some)
            raise CheckpointError(Problem(str(missing), "is missing", f"the files of all {world_size} workers"))
    for rank, path in sorted(files.items()):
        if rank >= world_size:
            came = f"is a file of rank {rank}, and the others are of {world_size} workers"
            raise CheckpointError(
                Problem(str(path), came, "files of one save", "Was an older save under this tag larger?")
            )


def _partition_count(file: Path, state: Mapping[str, Any]) -> int:
    counts = state["partition_count"]
    counts = set(counts) if isinstance(counts, list) else {counts}
    if len(counts) != 1:
        raise CheckpointError(
            Problem(str(file), f"groups cut for {sorted(counts)} workers", "one number: no experts apart")
        )
    return int(counts.pop())


def _base_optimizer(state: Mapping[str, Any]) -> Any:
    return state["optimizer_state_dict" if "optimizer_state_dict" in state else "base_optimizer_state"]


def _param_groups(state: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    base = _base_optimizer(state)
    return [{}] if isinstance(base, list) else base["param_groups"]


def _optimizer_steps(state: Mapping[str, Any]) -> list[int]:
    """The counts of updates that an optimizer keeps: beside each flat tensor (torch, CPUAdam), or once a group (FusedAdam)."""
    base = _base_optimizer(state)
    kept = base if isinstance(base, list) else base["state"].values()
    found = [values["step"] for values in kept if "step" in values]
    found += [group["step"] for group in _param_groups(state) if "step" in group]
    found += [state["base_optimizer_state_step"]] if "base_optimizer_state_step" in state else []
    return [int(step) for step in found]
