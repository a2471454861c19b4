"""Parameters that a run file chooses by patterns on their names: which are frozen, which learn faster or slower than others."""

import difflib
import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from transformers import PreTrainedModel

from dstune.errors import ConfigError, Problem

_WILD = "*?[]"


def known_names(module: PreTrainedModel, stored: Mapping[str, str]) -> dict[str, torch.nn.Parameter]:
    """Every name of every parameter: at run time, tied ones under all of theirs, and as files have it (`stored`, by run-time names)."""
    known = dict(module.named_parameters(remove_duplicate=False))
    return known | {other: known[name] for name, other in stored.items() if name in known}


def matching(
    known: Mapping[str, torch.nn.Parameter], patterns: Sequence[str], where: str, problems: list[Problem]
) -> dict[str, list[torch.nn.Parameter]]:
    """For each pattern the parameters that it fits under any of their names, each once. One that fits none is a problem."""
    found: dict[str, list[torch.nn.Parameter]] = {}
    for pattern in patterns:
        fits = {id(parameter): parameter for name, parameter in known.items() if fnmatchcase(name, pattern)}
        found[pattern] = list(fits.values())
        if not fits:
            problems.append(Problem(where, f"{pattern!r} matches no parameter", do=_near(pattern, list(known))))
    return found


def lr_scales(module: PreTrainedModel, scales: Mapping[str, float], stored: Mapping[str, str]) -> dict[str, float]:
    """The factor on the learning rate of each parameter that a pattern of `scales` fits, by its run-time name; the product of several.

    `stored`: run-time names and those in checkpoints (`build.checkpoint_names`). Raises ConfigError for a pattern that
    fits nothing, or nothing that is trained.
    """
    if not scales:
        return {}
    problems: list[Problem] = []
    found = matching(known_names(module, stored), list(scales), "train.lr_scales", problems)
    for pattern, parameters in found.items():
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            problems.append(Problem("train.lr_scales", f"{pattern!r} matches frozen parameters alone"))
    if problems:
        raise ConfigError(problems)
    factors: dict[int, list[float]] = {}
    for pattern, parameters in found.items():
        for parameter in parameters:
            factors.setdefault(id(parameter), []).append(scales[pattern])
    # In an order of their own: a product must not depend on where in the file a pattern stands.
    return {
        name: math.prod(sorted(factors[id(parameter)]))
        for name, parameter in module.named_parameters()
        if id(parameter) in factors and parameter.requires_grad
    }


def _near(pattern: str, known: list[str]) -> str:
    plain = "".join(letter for letter in pattern if letter not in _WILD)
    near = difflib.get_close_matches(plain, known, n=3, cutoff=0.3) or known[:3]
    return f"Names are such as {', '.join(near)}; `*` stands for any letters."
