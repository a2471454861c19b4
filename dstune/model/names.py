"""Between the names in a model's files and the names of its parameters at run time.

Most are equal, some are renamed, and some tensors are joined or cut on the way (a mixture's experts are one tensor at run time and
many in the files). transformers knows the rules; a plan here says, for all names at once, which tensors make which.
"""

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)

from dstune.engine.parameters import full_shape
from dstune.errors import ConfigError, Problem
from dstune.model.failures import FAILURES

Read = Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class Conversion:
    """Tensors that are made together: one that is only renamed, or several through transformers' operations."""

    sources: tuple[str, ...]
    target: str
    """The new name where there is one source and nothing but the name changes; else the first of several."""
    converter: Any | None = None
    patterns: tuple[str, ...] = ()
    renamings: tuple[Any, ...] = ()

    @property
    def is_renaming(self) -> bool:
        return self.converter is None

    def of_rows(self, first: int, last: int, count: int) -> "Conversion | None":
        """What makes rows `first` to `last` (not with it) alone of a tensor of `count` rows, each of which has its own sources (an expert's
        matrices); None where it is not made so.
        """
        merging, *joining = getattr(self.converter, "operations", [None])
        if not isinstance(merging, MergeModulelist) or merging.dim != 0:
            return None
        if not all(isinstance(one, Concatenate) and one.dim > 0 for one in joining):
            return None
        lists: dict[str, list[str]] = {}
        for source, pattern in zip(self.sources, self.patterns, strict=True):
            lists.setdefault(pattern, []).append(source)
        if any(len(rows) != count for rows in lists.values()):
            return None
        kept = {source for rows in lists.values() for source in rows[first:last]}
        pairs = [pair for pair in zip(self.sources, self.patterns, strict=True) if pair[0] in kept]
        return replace(self, sources=tuple(name for name, _ in pairs), patterns=tuple(pattern for _, pattern in pairs))

    def run(self, read: Read, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """The new tensors by name; `read` gives each source whole."""
        if self.converter is None:
            return {self.target: read(self.sources[0])}
        converter = copy.deepcopy(self.converter)
        for source, pattern in zip(self.sources, self.patterns, strict=True):
            converter.add_tensor(self.target, source, pattern, read(source))
        made = converter.convert(self.target, model=model, config=model.config)
        return {
            apply_renamings(name, list(self.renamings)): value[0] if isinstance(value, list) else value
            for name, value in made.items()
        }


def loading_plan(model: PreTrainedModel, files: Iterable[str]) -> list[Conversion]:
    """How the tensors that a directory's files hold become tensors of `model`; names it does not know keep theirs."""
    known = dict.fromkeys(all_tensors(model), True)
    transforms = get_model_conversion_mapping(model)
    return _plan(files, transforms, model.base_model_prefix, known)


def saving_plan(model: PreTrainedModel) -> list[Conversion]:
    """How `model`'s tensors become those that `save_pretrained` writes: each tied tensor once, ignored ones left out."""
    transforms = [
        # Whether a prefix was there is known only after loading; without it the files load as well.
        transform for transform in get_model_conversion_mapping(model, add_legacy=False)
        if not isinstance(transform, PrefixChange)
    ]  # fmt: skip
    backward = [transform.reverse_transform() for transform in transforms[::-1]]
    internals: Any = model
    ignored: set[str] = set(internals._keys_to_ignore_on_save or ())
    return _plan([name for name in _kept_names(model) if name not in ignored], backward, None, None)


def saved_names(model: PreTrainedModel) -> dict[str, str]:
    """Run-time name of each parameter that the files call otherwise. Joined tensors keep their run-time names.

    Also proves, without storage, that the model can be saved at all. Raises ConfigError where it cannot.
    """
    canonical = canonical_names(model)
    outlines = {
        name: torch.empty(full_shape(tensor), dtype=tensor.dtype, device="meta")
        for name, tensor in all_tensors(model).items()
    }
    renamed: dict[str, str] = {}
    for conversion in saving_plan(model):
        if conversion.is_renaming:
            name = canonical[conversion.sources[0]]
            if name != conversion.target:
                renamed[name] = conversion.target
        else:
            saved_outlines(conversion, outlines, model)
    return renamed


def saved_outlines(
    conversion: Conversion, outlines: Mapping[str, torch.Tensor], model: PreTrainedModel
) -> dict[str, torch.Tensor]:
    """What `conversion` makes of tensors without storage: shapes and types. Raises ConfigError where it cannot."""
    try:
        return conversion.run(lambda name: outlines[name], model)
    except FAILURES as error:
        raise ConfigError(
            Problem(
                "model.path",
                f"{type(model).__name__}'s {conversion.target} cannot be turned back into what its files hold: {error}",
                do="It could be trained but not exported; choose an architecture whose weights can be saved.",
            )
        ) from None


def canonical_names(model: torch.nn.Module) -> dict[str, str]:
    """For every name of a parameter or persistent buffer the first name of the same tensor: tied ones have several."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in all_tensors(model).items()}


def all_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and persistent buffers, under every name that they have."""
    saved = model.state_dict(keep_vars=True).keys()
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors |= {name: buffer for name, buffer in model.named_buffers(remove_duplicate=False) if name in saved}
    return tensors


def _kept_names(model: PreTrainedModel) -> list[str]:
    """One name of each tensor: of tied ones that which no declaration of the architecture calls the copy."""
    models: list[tuple[str, Any]] = [
        (prefix, module) for prefix, module in model.named_modules() if isinstance(module, PreTrainedModel)
    ]
    tied = [
        f"{prefix}.{pattern}" if prefix else pattern
        for prefix, module in models
        for pattern in (module._tied_weights_keys or {})
    ]
    groups: dict[str, list[str]] = {}
    for name, first in canonical_names(model).items():
        groups.setdefault(first, []).append(name)
    kept: list[str] = []
    for group in groups.values():
        copies = {name for name in group if len(group) > 1 and any(re.search(pattern, name) for pattern in tied)}
        kept.append(next((name for name in group if name not in copies), max(group)))
    return kept


def _plan(
    names: Iterable[str], transforms: list[Any], prefix: str | None, known: dict[str, Any] | None
) -> list[Conversion]:
    """Group `names` as transformers' own loading (with `known` names of the model) and saving (without) do."""
    saving = known is None
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    plain: list[Conversion] = []
    groups: dict[str, list[tuple[str, str]]] = {}
    for name in sorted(names, key=dot_natural_key):
        if saving:
            target, pattern = rename_source_key(name, [], converters)
            target = target if pattern is not None else apply_renamings(name, renamings)
        else:
            target, pattern = rename_source_key(name, renamings, converters, prefix, known)
            if target not in known and name in known:  # a rule that was meant for another part of the model
                target, pattern = rename_source_key(name, [], [], prefix, known)
        if pattern is None:
            plain.append(Conversion((name,), target))
        else:
            groups.setdefault(target, []).append((name, pattern))
    return plain + [
        Conversion(
            sources=tuple(name for name, _ in members),
            target=target,
            converter=by_pattern[members[0][1]],
            patterns=tuple(pattern for _, pattern in members),
            renamings=tuple(renamings) if saving else (),
        )
        for target, members in groups.items()
    ]
