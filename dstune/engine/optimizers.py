"""The update rules that `train.optimizer` names: how each is built, and what it keeps of a parameter (`states`).

A checkpoint keeps the states by name, and any world takes its slices of them. Nothing here is compiled.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from dstune.engine.adafactor import Adafactor, column_shape, row_shape
from dstune.engine.adamw8bit import AdamW8bit, Blockwise, kept_in_fp32
from dstune.engine.muon import Muon
from dstune.engine.parameters import full_shape
from dstune.engine.partitions import Piece
from dstune.engine.sliced import Groups
from dstune.engine.states import BY_ELEMENT, State, Whole


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `train` says of the optimizer; what its rule does not know is None."""

    name: str = "adamw"
    betas: tuple[float, float] | None = None
    eps: float | None = None
    momentum: float | None = None
    scale_parameter: bool | None = None


def _tokens(module: torch.nn.Module) -> set[int]:
    """Embeddings and the head: matrices whose rows stand for tokens, one by one."""
    model: Any = module
    found = [part.weight for part in module.modules() if isinstance(part, torch.nn.Embedding)]
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return {id(weight) for weight in [*found, *([] if head is None else [head.weight])]}


@dataclass(frozen=True)
class Rule:
    """An optimizer of torch's kind, as the engine handles it."""

    build: Callable[[Groups, float], torch.optim.Optimizer]
    """From parameter groups and a learning rate."""
    states: Mapping[str, State]
    """Keys of the optimizer's state of a parameter, and how each is kept."""
    hidden: Mapping[str, State] | None = None
    """The same for a model's hidden matrices, where the rule treats them apart."""
    vectors: Mapping[str, State] | None = None
    """And for vectors."""
    outer: Callable[[torch.nn.Module], set[int]] = _tokens
    """Which matrices of a model are not hidden ones: `id`s of parameters."""
    counts: bool = False
    """Whether its state has `step`, the updates made so far."""

    def groups(
        self, module: torch.nn.Module, weight_decay: float, lr_scales: Mapping[str, float] = MappingProxyType({})
    ) -> Groups:
        """The trainable parameters of `module`: matrices with decay, vectors (biases, norms) without; hidden matrices apart.

        `lr_scales`: run-time names of parameters and the factors on their learning rate; those of one factor are a group.
        """
        outer = self.outer(module)
        groups: dict[tuple[str, float], dict[str, Any]] = {}
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                is_hidden = self.hidden is not None and id(parameter) not in outer
                kind = "vector" if len(full_shape(parameter)) < 2 else "hidden" if is_hidden else "matrix"
                scale = lr_scales.get(name, 1.0)
                decay = 0.0 if kind == "vector" else weight_decay
                fresh = {"params": [], "weight_decay": decay, "kind": kind, "lr_scale": scale}
                groups.setdefault((kind, scale), fresh)["params"].append(parameter)
        return [groups[key] for key in sorted(groups)]

    def states_of(self, group: Mapping[str, Any]) -> Mapping[str, State]:
        """Those of a parameter of this group."""
        apart = {"hidden": self.hidden, "vector": self.vectors}.get(group["kind"])
        return self.states if apart is None else apart

    @property
    def keys(self) -> list[str]:
        """Of all states that there may be."""
        return list(dict.fromkeys([*self.states, *(self.hidden or ()), *(self.vectors or ())]))

    def prepare(
        self,
        optimizer: torch.optim.Optimizer,
        flat: torch.Tensor,
        group: Mapping[str, Any],
        pieces: Sequence[Piece] = (),
    ) -> None:
        """Create the states that the first step would create, so that they can be read and written before it."""
        state = optimizer.state[flat]
        for key, kind in self.states_of(group).items():
            if key not in state:
                state[key] = kind.create(flat, pieces)
        if self.counts and "step" not in state:
            self.set_steps(optimizer, flat, 0)

    def set_steps(self, optimizer: torch.optim.Optimizer, flat: torch.Tensor, steps: int) -> None:
        """Say how many updates were made (Adam's bias correction)."""
        if self.counts:
            # torch's fused optimizers count in a float tensor beside the parameter.
            optimizer.state[flat]["step"] = torch.tensor(float(steps), dtype=torch.float32, device=flat.device)


_MOMENTS: Mapping[str, State] = {"exp_avg": BY_ELEMENT, "exp_avg_sq": BY_ELEMENT}


def rule_of(settings: Settings) -> Rule:
    """The rule that `settings` name."""
    return _RULES[settings.name](settings)


class Lion(torch.optim.Optimizer):
    """The sign of an interpolated momentum (Chen et al. 2023, "Symbolic discovery of optimization algorithms", algorithm 2).

    With momentum m, gradient g and decay w: p -= lr (sign(b1 m + (1 - b1) g) + w p), then m = b2 m + (1 - b2) g.
    """

    def __init__(self, params: Groups, lr: float, betas: tuple[float, float]) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            first, second = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                momentum = self.state[parameter]["exp_avg"]
                update = torch.lerp(parameter.grad, momentum, first).sign_()
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])
                momentum.lerp_(parameter.grad, 1 - second)


class Adagrad(torch.optim.Optimizer):
    """Gradients over the root of the sum of their squares (Duchi et al. 2011), as `torch.optim.Adagrad` without its own decay of lr.

    DeepSpeed 0.19.8 would replace torch's own by one of a single parameter group, and lose the others.
    """

    def __init__(self, params: Groups, lr: float, eps: float) -> None:
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                gradient = parameter.grad.add(parameter, alpha=group["weight_decay"])
                squares = self.state[parameter]["sum"].addcmul_(gradient, gradient)
                parameter.addcdiv_(gradient, squares.sqrt().add_(group["eps"]), value=-group["lr"])


def _adamw(settings: Settings) -> Rule:
    def build(groups: Groups, lr: float) -> torch.optim.Optimizer:
        assert settings.betas is not None and settings.eps is not None
        return torch.optim.AdamW(groups, lr=lr, betas=settings.betas, eps=settings.eps, fused=True)

    return Rule(build, _MOMENTS, counts=True)


def _sgd(settings: Settings) -> Rule:
    def build(groups: Groups, lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=lr, momentum=settings.momentum or 0.0, fused=True)

    # A first step from a momentum of zeros is torch's own first step, which begins with the gradient.
    return Rule(build, {"momentum_buffer": BY_ELEMENT} if settings.momentum else {})


def _lion(settings: Settings) -> Rule:
    def build(groups: Groups, lr: float) -> torch.optim.Optimizer:
        assert settings.betas is not None
        return Lion(groups, lr, settings.betas)

    return Rule(build, {"exp_avg": BY_ELEMENT})


def _adagrad(settings: Settings) -> Rule:
    def build(groups: Groups, lr: float) -> torch.optim.Optimizer:
        assert settings.eps is not None
        return Adagrad(groups, lr, settings.eps)

    return Rule(build, {"sum": BY_ELEMENT})


def _muon(settings: Settings) -> Rule:
    def build(groups: Groups, lr: float) -> torch.optim.Optimizer:
        assert settings.momentum is not None and settings.betas is not None and settings.eps is not None
        return Muon(groups, lr, settings.momentum, settings.betas, settings.eps)

    return Rule(build, _MOMENTS, hidden={"momentum_buffer": BY_ELEMENT}, counts=True)


def _adafactor(settings: Settings) -> Rule:
    def build(groups: Groups, lr: float) -> torch.optim.Optimizer:
        assert settings.eps is not None and settings.scale_parameter is not None
        return Adafactor(groups, lr, settings.eps, settings.scale_parameter)

    factors = {"row_var": Whole(row_shape), "col_var": Whole(column_shape)}
    return Rule(build, factors, vectors={"variance": BY_ELEMENT}, counts=True)


def _adamw8bit(settings: Settings) -> Rule:
    def build(groups: Groups, lr: float) -> torch.optim.Optimizer:
        assert settings.betas is not None and settings.eps is not None
        return AdamW8bit(groups, lr, settings.betas, settings.eps)

    in_8_bits = {"exp_avg": Blockwise(is_signed=True), "exp_avg_sq": Blockwise(is_signed=False)}
    return Rule(build, _MOMENTS, hidden=in_8_bits, outer=kept_in_fp32, counts=True)


_RULES: dict[str, Callable[[Settings], Rule]] = {
    "adamw": _adamw,
    "sgd": _sgd,
    "lion": _lion,
    "adagrad": _adagrad,
    "muon": _muon,
    "adafactor": _adafactor,
    "adamw8bit": _adamw8bit,
}
