"""Tensor parallelism (DeepSpeed's AutoTP): the members of a group of workers each hold a part of a model's matrices and compute that part.

Which matrix is cut along which axis says transformers' own plan of the architecture (`base_model_tp_plan`). Of two matrices that follow
each other the first gives each member some of the outputs, the second takes them as some of its inputs, and what the members make is
summed up. What is not in the plan (embeddings, the head, norms) every member holds and computes whole. `model.tensor_parallel` shows
that an architecture computes and learns the same so.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dstune.engine.cuts import Cut, Group, Uncut
from dstune.errors import ConfigError, Problem
from dstune.planning.tensor_parallel import members_of

WHERE = "cluster.tensor_parallel"

_COLUMNS, _ROWS, _SUMMED = "colwise", "rowwise", "replicated_with_grad_allreduce"
_WHOLE = ("colwise_gather_output", "rowwise_split_input", "embedding_rowwise", "replicate")
"""Styles of what comes in whole and goes out whole: such a layer need not be cut at all."""
_CUT_BY = "ds_autotp_universal_checkpoint_meta"
"""DeepSpeed's attribute of a parameter that it cut."""


@dataclass(frozen=True)
class Split:
    """What of a model is cut, by the names of its modules."""

    columns: tuple[str, ...]
    """Linear layers of which each member has some of the outputs."""
    rows: tuple[str, ...]
    """Of which each member takes some of the inputs."""
    summed: tuple[str, ...]
    """Whose weights every member has whole, and learns from its part of what they see: the gradients are to be summed up."""


def split_of(module: nn.Module, config: Any, members: int) -> Split:
    """How `members` workers share `module`, a model of `config` (transformers'). Raises ConfigError where they cannot."""
    plan = _plan(config)
    found: dict[str, list[str]] = {style: [] for style in (_COLUMNS, _ROWS, _SUMMED)}
    for name, part in module.named_modules():
        style = next((style for pattern, style in plan.items() if re.fullmatch(pattern, name)), None)
        if style in found:
            found[style].append(name)
            if style != _SUMMED:
                _require_even(name, part, 0 if style == _COLUMNS else 1, members)
    if not found[_ROWS]:
        raise ConfigError(Problem(WHERE, f"nothing of {config.model_type} is cut by transformers' plan for it", "1"))
    _require_whole_heads(config.get_text_config(), members)
    return Split(*(tuple(found[style]) for style in (_COLUMNS, _ROWS, _SUMMED)))


def _plan(config: Any) -> dict[str, str]:
    """Patterns of modules' whole names, and the style of each. Raises ConfigError."""
    plan: Mapping[str, str] = getattr(config.get_text_config(), "base_model_tp_plan", None) or {}
    if not plan:
        raise ConfigError(Problem(WHERE, f"transformers has no plan for the matrices of {config.model_type}", "1"))
    unknown = sorted(set(plan.values()) - {_COLUMNS, _ROWS, _SUMMED, *_WHOLE})
    if unknown:
        came = f"{config.model_type}: AutoTP does not cut as transformers' plan for it says ({', '.join(unknown)})"
        raise ConfigError(Problem(WHERE, came, "1", "ZeRO-3 splits every weight over all workers as well."))
    return {_expression(pattern): style for pattern, style in plan.items()}


def _expression(pattern: str) -> str:
    """Of `layers.*.mlp.up_proj`: the layer's number is open, and what it stands in."""
    return r"(?:.*\.)?" + r"\d+".join(re.escape(part) for part in pattern.split("*"))


def _require_even(name: str, part: nn.Module, axis: int, members: int) -> None:
    if type(part) is not nn.Linear:
        raise ConfigError(Problem(WHERE, f"{name} is a {type(part).__name__}, and no plain linear layer", "1"))
    size = part.weight.shape[axis]
    if size % members:
        what = "inputs" if axis else "outputs"
        raise ConfigError(Problem(WHERE, f"{members}, for the {size} {what} of {name}", "a divisor of them"))


def _require_whole_heads(config: Any, members: int) -> None:
    for key in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, key, None)
        if isinstance(heads, int) and heads % members:
            divisors = [str(number) for number in range(1, heads + 1) if heads % number == 0]
            came = f"{members} workers for the model's {heads} heads ({key})"
            raise ConfigError(Problem(WHERE, came, f"one of {', '.join(divisors)}"))


def to_be_cut(module: nn.Module, config: Any, ds_config: Mapping[str, Any]) -> frozenset[str]:
    """The parameters of `module`, a model of `config` that DeepSpeed has not cut yet, of which it will leave this worker a part.

    Raises ConfigError as `split_of`.
    """
    members = members_of(ds_config)
    if members == 1:
        return frozenset()
    split = split_of(module, config, members)
    biases = {f"{name}.bias" for name in split.columns}
    names = {f"{name}.weight" for name in (*split.columns, *split.rows)} | biases
    return frozenset(name for name, _ in module.named_parameters() if name in names)


def held_in_parts(module: nn.Module) -> frozenset[str]:
    """The same of one that DeepSpeed has cut."""
    return frozenset(name for name, parameter in module.named_parameters() if _cut(parameter).axis is not None)


def prepare(ds_config: dict[str, Any], module: Any) -> None:
    """Have DeepSpeed cut `module` as `split_of` says, when it makes its engine of it by `ds_config`, which says among how many.

    Raises ConfigError.
    """
    members = members_of(ds_config)
    if members == 1:
        return
    _require_learning(module, split_of(module, module.config, members))
    ds_config["tensor_parallel"] = {
        "autotp_size": members,
        "partition_config": {
            "use_default_specs": False,
            "layer_specs": [_spec(pattern, style) for pattern, style in _plan(module.config).items()],
        },
    }
    for parameter in module.parameters():
        if not parameter.requires_grad:
            # NOTE: DeepSpeed puts a hook on each that is marked to be summed up, which a frozen one does not take.
            parameter._ds_grad_allreduce_registered = True
    for part in module.modules():
        if list(part.children()):
            # NOTE: DeepSpeed divides attributes of what holds a cut layer by their names (`hidden_size`), whatever they are read for.
            part.replaced = True


def _require_learning(module: nn.Module, split: Split) -> None:
    """NOTE: of what is whole DeepSpeed's ZeRO-1 in bf16 counts the first member's in its norm; another one would have nothing to count."""
    parts = [module.get_submodule(name) for name in (*split.columns, *split.rows)]
    if not any(parameter.requires_grad for part in parts for parameter in part.parameters()):
        raise ConfigError(Problem(WHERE, "all matrices that the members share are frozen", "1"))


def trust_rows(engine: Any, ds_config: Mapping[str, Any]) -> None:
    """Take off DeepSpeed's comparison of the members' first micro-batches, which are the same by `batch.Share`.

    NOTE: it sends them pickled, and what is unpickled of another's GPU opens that GPU for the whole run.
    """
    if members_of(ds_config) > 1:
        engine.first_dataloader_check.remove()


def _spec(pattern: str, style: str) -> dict[str, Any]:
    kind = {_COLUMNS: "column", _ROWS: "row"}.get(style, "skip")
    return {"patterns": [rf"{pattern}\.weight$"], "partition_type": kind, "grad_allreduce": style == _SUMMED}


def cuts_of(module: nn.Module, ds_config: Mapping[str, Any], device: torch.device) -> Uncut:
    """Who holds what of `module`, which DeepSpeed has cut where `ds_config` says so; this worker computes on `device`."""
    from deepspeed.utils import groups

    if members_of(ds_config) == 1:
        return Uncut()
    cuts = {name: _cut(parameter) for name, parameter in module.named_parameters()}
    return Group(cuts, groups.get_tensor_model_parallel_group(), device)


def _cut(parameter: Any) -> Cut:
    """NOTE: DeepSpeed says it of what it touched alone, and of a bias that it left whole too."""
    cut_by = getattr(parameter, _CUT_BY, None)
    if cut_by is None or cut_by["partition_dim"] is None:
        return Cut(tuple(parameter.shape), None)
    whole, axis = tuple(cut_by["original_shape"]), int(cut_by["partition_dim"])
    assert len(set(cut_by["partition_sizes"])) == 1, f"uneven parts: {cut_by['partition_sizes']}"
    assert tuple(torch.Size(cut_by["target_partition_shape"])) == tuple(parameter.shape)
    return Cut(whole, axis)
