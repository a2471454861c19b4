"""Parameters that stay as they are: chosen by patterns, left out of checkpoints, and known again by a digest of the base model's files."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from dstune.errors import ConfigError, Problem
from dstune.model import names, text_side
from dstune.model.patterns import known_names, matching
from dstune.model.weights import WeightFiles
from dstune.protocols import Control


def freeze(module: PreTrainedModel, patterns: Sequence[str]) -> None:
    """Take `requires_grad` from each parameter that a pattern matches under any of its names (`model.layers.[0-3].*`), and from those
    that no text passes (`text_side`).

    A tied parameter has several names and is one tensor. Raises ConfigError for a pattern that matches nothing, and where
    nothing is left to train.
    """
    for parameter in frozen_by(module, patterns):
        parameter.requires_grad_(False)
    if patterns and not any(parameter.requires_grad for parameter in module.parameters()):
        raise ConfigError(Problem("train.freeze", "leaves nothing to train"))


def frozen_by(module: PreTrainedModel, patterns: Sequence[str]) -> list[torch.nn.Parameter]:
    """What `freeze` takes it from. Raises ConfigError for a pattern that matches nothing."""
    found = [tensor for tensor in text_side.beside(module).values() if isinstance(tensor, torch.nn.Parameter)]
    problems: list[Problem] = []
    if patterns:
        known = known_names(module, names.saved_names(module))
        for parameters in matching(known, patterns, "train.freeze", problems).values():
            found += parameters
    if problems:
        raise ConfigError(problems)
    return found


def frozen_digest(module: PreTrainedModel, files: WeightFiles, control: Control | None = None) -> str:
    """SHA-256 over the tensors of `files` that frozen parameters are made of. With `control` each worker reads its share.

    A collective then; the same on every world.
    """
    rank, world_size = (control.rank, control.world_size) if control else (0, 1)
    frozen = {id(parameter) for parameter in module.parameters() if not parameter.requires_grad}
    tensors = names.all_tensors(module)
    plan = [one for one in names.loading_plan(module, files.names()) if id(tensors.get(one.target)) in frozen]
    _require_head(
        module, {id(tensors[one.target]) for one in plan} | {id(p) for p in module.parameters() if p.requires_grad}
    )
    sources = sorted(source for conversion in plan for source in conversion.sources)
    mine = {source: _sha256(files.read(source)) for source in sources[rank::world_size]}
    shares = control.gather(mine) if control else [mine]
    lines = sorted(f"{source} {digest}\n" for share in shares for source, digest in share.items())
    return hashlib.sha256("".join(lines).encode("utf-8")).hexdigest()


def _require_head(module: PreTrainedModel, kept: set[int]) -> None:
    head: Any = module.get_output_embeddings()
    if head is not None and any(id(parameter) not in kept for parameter in head.parameters()):
        came = "leaves the head as it was drawn, for these files have none: it would be in no checkpoint either"
        raise ConfigError(Problem("train.freeze", came, "patterns that do not match it"))


def _sha256(tensor: torch.Tensor) -> str:
    content: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(memoryview(content)).hexdigest()
