"""Pretrained weights into a model whose parameters are partitioned: each worker reads just its own slices of the files."""

import copy
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from dstune.engine.parameters import full_shape, local_piece, whole
from dstune.errors import ConfigError, Problem
from dstune.loggers import get_logger
from dstune.model import new_rows
from dstune.model.names import Conversion, all_tensors, canonical_names, loading_plan
from dstune.protocols import MODEL_STATES, Slice

log = get_logger(__name__)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_MOST_NAMES = 5


class WeightFiles:
    """The safetensors files of a model directory, opened when they are first read."""

    def __init__(self, directory: Path) -> None:
        """Raises ConfigError where there are none, or where the index names what is not there."""
        self.directory = directory
        self._file_of = _file_of_each_tensor(directory)
        self._open: dict[str, Any] = {}

    def names(self) -> list[str]:
        return list(self._file_of)

    def files(self) -> list[str]:
        """The files' own names, sorted."""
        return sorted(set(self._file_of.values()))

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        return self._slice(name)[:0].dtype if self.shape(name) else self.read(name).dtype

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, on the CPU."""
        return self._slice(name)[...]

    def read_range(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements `start` to `stop` of the flattened tensor [stop - start]; only the rows around them are read."""
        piece = self._slice(name)
        shape = piece.get_shape()
        if not shape:
            return piece[...].reshape(1)[start:stop]
        columns = max(1, _product(shape[1:]))
        first = start // columns
        rows = piece[first : -(-stop // columns)]
        return rows.reshape(-1)[start - first * columns : stop - first * columns]

    def _slice(self, name: str) -> Any:
        file = self._file_of[name]
        try:
            if file not in self._open:
                self._open[file] = safe_open(str(self.directory / file), framework="pt")
            return self._open[file].get_slice(name)
        except (SafetensorError, OSError) as error:
            raise ConfigError(Problem(str(self.directory / file), f"cannot be read: {error}")) from None


def load_weights(
    module: PreTrainedModel,
    directory: Path,
    new: range = range(0),
    head_seed: int | None = None,
    later: Collection[str] = (),
) -> None:
    """Fill `module`'s parameters and persistent buffers from the safetensors files of `directory`.

    Tensors that are only renamed are read slice by slice; joined ones (a layer's experts) whole, one at a time. Where they cannot be
    made so, transformers reads the whole model on every worker, with a warning.
    `new`: the rows of tokens that the files may not have; they begin as `new_rows.fill` says. A collective then.
    `head_seed`: what a head that is not in the files is drawn from, with a warning; None: that is an error.
    `later`: parameters that stay unset where `masters` can fill them.
    Raises ConfigError where weights are missing, of another shape, quantised, or only there as pickle.
    """
    if getattr(module.config, "quantization_config", None) is not None:
        raise ConfigError(
            Problem(
                "model.path", f"{directory} holds quantised weights", "bf16, fp16 or fp32 ones, to tune them in full"
            )
        )
    files = WeightFiles(directory)
    state = _Destination(module)
    unused: list[str] = []
    try:
        for conversion in loading_plan(module, files.names()):
            if conversion.is_renaming:
                if not _load_renamed(conversion, files, state, new, later):
                    unused.append(conversion.sources[0])
            else:
                _load_converted(conversion, files, state, module)
    except _NotInPieces as error:
        if new:
            raise ConfigError(Problem(str(directory), str(error), "a model without `model.new_tokens`")) from None
        _load_whole(module, state, directory, str(error))
    head: Any = module.get_output_embeddings()
    if head_seed is not None and head is not None and set(state.missing()) == state.names_of(head):
        _draw_head(module, head, state, head_seed, directory)
    _make_fixed_tables(module, state)
    _finish(module, state, unused, directory)
    if new:
        new_rows.fill(module, new)


def masters(
    module: PreTrainedModel, directory: Path, stored: Mapping[str, str], later: Collection[str] = ()
) -> Callable[[Slice], None] | None:
    """Writes into a slice of the weights what `load_weights` left for `later`, and what the files have in fp32 and `module` in 16 bits;
    None where there is no such thing.

    For `Engine.load`: masters are made of the rounded weights otherwise, routers' and state spaces' among them, which files keep in
    fp32 beside 16 bits. `stored`: as `checkpoint_names`. Joined tensors stay rounded.
    """
    files = WeightFiles(directory)
    canonical, parameters = canonical_names(module), dict(module.named_parameters())
    sources: dict[str, str] = {}
    for conversion in loading_plan(module, files.names()):
        name = canonical.get(conversion.target)
        if name not in parameters or not conversion.is_renaming:
            continue
        rounded = parameters[name].dtype is not torch.float32 and files.dtype(conversion.sources[0]) is torch.float32
        wanted = rounded or name in later
        if wanted and (stored.get(name, name) not in sources or name == conversion.target):
            sources[stored.get(name, name)] = conversion.sources[0]

    def fill(piece: Slice) -> None:
        if piece.state in MODEL_STATES and piece.name in sources:
            source = sources[piece.name]
            # Rows of new tokens are in no file.
            stop = min(piece.offset + len(piece.tensor), _product(files.shape(source)))
            if stop > piece.offset:
                piece.tensor[: stop - piece.offset].copy_(files.read_range(source, piece.offset, stop))

    return fill if sources else None


class _NotInPieces(Exception):
    """Says which tensors cannot be made by themselves."""


class _Destination:
    """The tensors of a model by name, and which of them are filled."""

    def __init__(self, module: PreTrainedModel) -> None:
        buffers = set(module.state_dict().keys())
        self._canonical = canonical_names(module)
        self._tensors: dict[str, torch.Tensor] = dict(module.named_parameters())
        self._tensors |= {name: buffer for name, buffer in module.named_buffers() if name in buffers}
        self.filled: dict[str, str] = {}

    def find(self, name: str) -> torch.Tensor | None:
        canonical = self._canonical.get(name)
        return None if canonical is None else self._tensors[canonical]

    def wants(self, name: str) -> bool:
        """Whether `name` should still be read: of a tied tensor's names in the files, its first one counts."""
        canonical = self._canonical[name]
        return canonical not in self.filled or name == canonical

    def names_of(self, part: torch.nn.Module) -> set[str]:
        """The parameters of a module, by the names that count."""
        own = {id(parameter) for parameter in part.parameters()}
        return {name for name, tensor in self._tensors.items() if id(tensor) in own}

    def mark(self, name: str) -> None:
        self.filled[self._canonical[name]] = name

    def missing(self) -> list[str]:
        """Parameters without weights. Buffers have the values that the architecture itself gave them."""
        return [
            name
            for name, tensor in self._tensors.items()
            if name not in self.filled and isinstance(tensor, torch.nn.Parameter)
        ]


def _load_renamed(
    conversion: Conversion, files: WeightFiles, state: _Destination, new: range, later: Collection[str]
) -> bool:
    source, name = conversion.sources[0], conversion.target
    tensor = state.find(name)
    if tensor is None:
        return False
    if state.wants(name):
        found, wanted = files.shape(source), full_shape(tensor)
        if not _lacks_rows(found, wanted, new):
            _check_shape(name, found, wanted, files.directory)
        if name not in later:
            with local_piece(tensor) as piece:
                stop = min(piece.stop, _product(found))
                if stop > piece.start:
                    piece.tensor[: stop - piece.start].copy_(files.read_range(source, piece.start, stop))
        state.mark(name)
    return True


def _lacks_rows(found: tuple[int, ...], wanted: tuple[int, ...], new: range) -> bool:
    """Whether a tensor in the files lacks but rows of `new` tokens: [1000, 64] for [1003, 64]; BART's bias is [1, tokens]."""
    axis = next((axis for axis, size in enumerate(wanted) if size != 1), 0)
    rows = found[axis] if len(found) == len(wanted) > axis else 0
    return 0 < rows < new.stop == wanted[axis] and (*wanted[:axis], rows, *wanted[axis + 1 :]) == found


def _load_converted(conversion: Conversion, files: WeightFiles, state: _Destination, module: PreTrainedModel) -> None:
    if _load_rows(conversion, files, state, module):
        return
    try:
        made = conversion.run(files.read, module)
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError) as error:
        raise _NotInPieces(f"{conversion.target} cannot be made of what the files hold: {error}") from None
    for name, value in made.items():
        tensor = state.find(name)
        if tensor is not None:
            _check_shape(name, tuple(value.shape), full_shape(tensor), files.directory)
            with local_piece(tensor) as piece:
                piece.tensor.copy_(value.reshape(-1)[piece.start : piece.stop])
            state.mark(name)


def _load_rows(conversion: Conversion, files: WeightFiles, state: _Destination, module: PreTrainedModel) -> bool:
    """Read of a mixture's experts those that this worker's piece lies in; False where the tensor is not made of one after the other."""
    tensor = state.find(conversion.target)
    shape = () if tensor is None else full_shape(tensor)
    # By the files' heads, which all workers read alike: what does not fit is said by all of them.
    alike = {
        (pattern, files.shape(name)) for name, pattern in zip(conversion.sources, conversion.patterns, strict=True)
    }
    if tensor is None or len(shape) < 2 or len(alike) != len(set(conversion.patterns)):
        return False
    each = _product(shape[1:])
    with local_piece(tensor) as piece:
        first, last = piece.start // each, -(-piece.stop // each)
        if (part := conversion.of_rows(first, last, shape[0])) is None:
            return False
        if first < last:
            try:
                made = part.run(files.read, module)[conversion.target]
            except (RuntimeError, ValueError, TypeError, KeyError, IndexError):
                return False  # which says more where all of it is read
            _check_shape(conversion.target, (shape[0], *made.shape[1:]), shape, files.directory)
            piece.tensor.copy_(made.reshape(-1)[piece.start - first * each : piece.stop - first * each])
    state.mark(conversion.target)
    return True


def _load_whole(module: PreTrainedModel, state: _Destination, directory: Path, reason: str) -> None:
    """As transformers itself loads a model: every worker reads all of it, and keeps its piece."""
    log.warning("%s: %s; every worker reads the whole model now", directory, reason)
    try:
        loaded, report = type(module).from_pretrained(
            directory,
            config=copy.deepcopy(module.config),
            dtype=module.dtype,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        text = " ".join(str(error).split())
        raise ConfigError(Problem(str(directory), f"{reason}; nor by transformers: {text[:400]}")) from None
    lacking = {str(name) for kind in ("missing_keys", "mismatched_keys") for name in report[kind]}
    for name, value in all_tensors(loaded).items():
        tensor = state.find(name)
        if tensor is not None and name not in lacking:
            with local_piece(tensor) as piece:
                piece.tensor.copy_(value.detach().reshape(-1)[piece.start : piece.stop])
            state.mark(name)


def _draw_head(module: PreTrainedModel, head: torch.nn.Module, state: _Destination, seed: int, directory: Path) -> None:
    """Random weights by the architecture's own rules, the same on every world."""
    names = sorted(state.names_of(head))
    log.warning("%s has no %s: it begins with random weights", directory, " and ".join(names))
    internals: Any = module
    with torch.random.fork_rng(devices=[]), torch.no_grad(), whole(head.parameters()):
        torch.manual_seed(seed)
        internals._init_weights(head)
    for name in names:
        state.mark(name)


def _make_fixed_tables(module: PreTrainedModel, state: _Destination) -> None:
    """What no file need have, for the architecture makes it and nobody trains it: sinusoidal positions (Marian's, Pegasus')."""
    internals: Any = module
    for name in state.missing():
        owner = module.get_submodule(name.rpartition(".")[0])
        if not any(parameter.requires_grad for parameter in owner.parameters()):
            with torch.random.fork_rng(devices=[]), torch.no_grad(), whole(owner.parameters()):
                torch.manual_seed(0)
                internals._init_weights(owner)
            state.mark(name)


def _check_shape(name: str, found: tuple[int, ...], wanted: tuple[int, ...], directory: Path) -> None:
    if found != wanted:
        raise ConfigError(
            Problem(
                f"{directory}",
                f"{name} has the shape {list(found)}",
                f"{list(wanted)}, as the config says",
                "Do the files and config.json belong together, and does `model.overrides` change a size?",
            )
        )


def _finish(module: PreTrainedModel, state: _Destination, unused: list[str], directory: Path) -> None:
    missing = state.missing()
    if missing:
        raise ConfigError(
            Problem(
                str(directory),
                f"has no weights for {_some(missing)} of {type(module).__name__}",
                do="Take the checkpoint that has all weights; a frozen head, or one beside an adapter, cannot be drawn.",
            )
        )
    internals: Any = module
    known = [*(internals._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq"]
    unused = [name for name in unused if not any(re.search(pattern, name) for pattern in known)]
    if unused:
        log.warning("%s: %s are not part of %s and were left out", directory, _some(unused), type(module).__name__)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def _product(numbers: Iterable[int]) -> int:
    result = 1
    for number in numbers:
        result *= number
    return result


def _file_of_each_tensor(directory: Path) -> dict[str, str]:
    index, single = directory / INDEX_FILE, directory / SINGLE_FILE
    if index.is_file():
        return _read_index(index)
    if single.is_file():
        try:
            with safe_open(str(single), framework="pt") as file:
                return {name: SINGLE_FILE for name in file.keys()}  # noqa: SIM118 - not a mapping
        except (SafetensorError, OSError) as error:
            raise ConfigError(Problem(str(single), f"cannot be read: {error}")) from None
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt")):
        raise ConfigError(
            Problem(
                str(directory),
                "has its weights only as pickle files, which can run any code when they are read",
                "safetensors",
                "Take the model's safetensors revision, or convert it where you trust it: "
                "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)",
            )
        )
    raise ConfigError(
        Problem(str(directory), "has no weights", f"{SINGLE_FILE} or {INDEX_FILE}", "or set `model.init: random`")
    )


def _read_index(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(Problem(str(index), f"is no index of safetensors files: {error}")) from None
    for file in sorted(set(files.values())):
        if Path(file).name != file or not (index.parent / file).is_file():
            raise ConfigError(Problem(str(index), f"names {file!r}, which is not beside it"))
    return files
