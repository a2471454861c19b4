"""Tensor parallelism for the architecture at hand: shown, before training, on a tiny random model of its class.

Several members' parts of a model are computed as rows of one batch, row m by the part of member m, with the sums between them where
DeepSpeed's AutoTP has them: behind a layer cut by its inputs forward, before one cut by its outputs backward. Every member's outputs
have to be the whole model's, and the gradients those that the whole one has.
"""

import copy
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from dstune.config.schema import ModelSection
from dstune.engine.tensor_parallel import WHERE, Split, split_of
from dstune.errors import ConfigError, Problem, first_line
from dstune.model import isolation
from dstune.model.build import skeleton
from dstune.model.failures import FAILURES
from dstune.model.remembered import Remembered

_MEMBERS = 2
_TOKENS = 12
_LARGEST = 1e-5
"""Of the largest gradient of all parameters, what is taken for rounding in one whose own is as good as none."""


def prove(model: ModelSection, config: PretrainedConfig, members: int) -> None:
    """Show that `members` workers can hold the layers of `config`'s architecture between them, or raise ConfigError with the reason."""
    split_of(skeleton(config, model), config, members)
    reason = _disproof(config)
    if reason is not None:
        raise ConfigError(Problem(WHERE, f"{config.model_type}: {reason}", "1"))


@Remembered
def _disproof(config: PretrainedConfig) -> str | None:
    """Why layers of this architecture cannot be cut; None where it is shown that they can."""
    small = isolation.smallest_that_builds(config)
    if small is None:
        return "no small model of this class can be built, so nothing is shown"
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        try:
            whole = isolation.instance(small, "eager")
            split = split_of(whole, small, _MEMBERS)
            cut = _cut(whole, split)
            ids = torch.randint(1, small.get_text_config().vocab_size, (1, _TOKENS))
            wanted = _outputs(whole, ids)
            found = _outputs(cut, ids.expand(_MEMBERS, -1))
            probe = torch.randn_like(wanted)
            for outputs in (wanted, found):
                (outputs * probe).sum().backward()
        except FAILURES as error:
            return f"its small model fails when it is held by two ({first_line(error)})"
    found, wanted = found.detach(), wanted.detach()
    difference = float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12))
    if not difference <= isolation.TOLERANCE:
        return f"the outputs of its small model change by {difference:.1e} when it is held by two"
    return _learns_otherwise(whole, cut, split)


def _outputs(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits


def _cut(whole: PreTrainedModel, split: Split) -> PreTrainedModel:
    cut = copy.deepcopy(whole)
    for names, axis in ((split.columns, 0), (split.rows, 1)):
        for name in names:
            cut.set_submodule(name, _Parts(cut.get_submodule(name), axis))
    return cut


class _Parts(nn.Module):
    """A linear layer cut along `axis` of its weight: row m of the batch goes through part m."""

    def __init__(self, linear: Any, axis: int) -> None:
        super().__init__()
        self._axis = axis
        self.weight = nn.Parameter(_parts(linear.weight.detach(), axis))
        bias = linear.bias
        self.bias = None if bias is None else nn.Parameter(_parts(bias.detach(), 0) if axis == 0 else bias.detach())

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[members, ..., inputs], of which a layer cut by its inputs has a part, to [members, ..., outputs], of which others give one."""
        rows = hidden.reshape(_MEMBERS, -1, hidden.shape[-1])
        if self._axis == 0:
            result = torch.bmm(_Spread.apply(rows), self.weight.transpose(1, 2))
            result = result if self.bias is None else result + self.bias[:, None]
        else:
            result = _Summed.apply(torch.bmm(rows, self.weight.transpose(1, 2)))
            result = result if self.bias is None else result + self.bias
        return result.view(*hidden.shape[:-1], -1)


def _parts(tensor: torch.Tensor, axis: int) -> torch.Tensor:
    return torch.stack(tensor.chunk(_MEMBERS, axis))


class _Spread(torch.autograd.Function):
    """The same for every member; backward the sum of what they find."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0].sum(0, keepdim=True).expand_as(gradients[0])


class _Summed(torch.autograd.Function):
    """The members' sum, for each of them; backward each for itself."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        return rows.sum(0, keepdim=True).expand_as(rows).contiguous()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0]


def _learns_otherwise(whole: PreTrainedModel, cut: PreTrainedModel, split: Split) -> str | None:
    """Which parameter has another gradient, where each member takes its own, or the sum of all where `split` says so."""
    found = dict(cut.named_parameters())
    wanted = {name: parameter.grad for name, parameter in whole.named_parameters() if parameter.grad is not None}
    largest = max(float(gradient.norm()) for gradient in wanted.values())
    for name, gradient in wanted.items():
        owner, _, kind = name.rpartition(".")
        axis = {**dict.fromkeys(split.columns, 0), **dict.fromkeys(split.rows, 1 if kind == "weight" else None)}.get(
            owner
        )
        mine = found[name].grad
        assert mine is not None
        if axis is not None:
            gradient = _parts(gradient, axis)
        elif owner not in split.summed:
            mine = mine / _MEMBERS  # the batch has summed up what each member has
        difference = float((mine - gradient).norm())
        if not difference <= isolation.TOLERANCE * float(gradient.norm()) + _LARGEST * largest:
            return f"{name} of its small model gets another gradient when it is held by two"
    return None
