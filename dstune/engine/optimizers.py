"""The update rules that `train.optimizer` names: how each is built, and which of its states hold one number per element.

Such states are cut like the weights themselves, so a checkpoint keeps them by name and any world takes its slices of them.
Nothing here is compiled.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from dstune.engine.muon import Muon
from dstune.engine.parameters import full_shape

Groups = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `train` says of the optimizer; what its rule does not know is None."""

    name: str = "adamw"
    betas: tuple[float, float] | None = None
    eps: float | None = None
    momentum: float | None = None


@dataclass(frozen=True)
class Rule:
    """An optimizer of torch's kind, as the engine handles it."""

    build: Callable[[Groups, float], torch.optim.Optimizer]
    """From parameter groups and a learning rate."""
    states: tuple[str, ...]
    """Keys of the optimizer's state of a parameter that are tensors of its shape, zero before the first step."""
    hidden_states: tuple[str, ...] = ()
    """The same for groups marked `hidden`, where the rule treats a model's hidden matrices apart."""
    counts: bool = False
    """Whether its state has `step`, the updates made so far."""

    def groups(
        self, module: torch.nn.Module, weight_decay: float, lr_scales: Mapping[str, float] = MappingProxyType({})
    ) -> Groups:
        """The trainable parameters of `module`: matrices with decay, vectors (biases, norms) without; hidden matrices apart.

        `lr_scales`: run-time names of parameters and the factors on their learning rate; those of one factor are a group.
        """
        outer = _outer(module)
        groups: dict[tuple[str, float], dict[str, Any]] = {}
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                is_hidden = bool(self.hidden_states) and id(parameter) not in outer
                kind = "vector" if len(full_shape(parameter)) < 2 else "hidden" if is_hidden else "matrix"
                scale = lr_scales.get(name, 1.0)
                decay = 0.0 if kind == "vector" else weight_decay
                fresh = {"params": [], "weight_decay": decay, "hidden": kind == "hidden", "lr_scale": scale}
                groups.setdefault((kind, scale), fresh)["params"].append(parameter)
        return [groups[key] for key in sorted(groups)]

    def states_of(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        """The keys of a parameter of this group."""
        return self.hidden_states if group["hidden"] else self.states

    def prepare(self, optimizer: torch.optim.Optimizer, flat: torch.Tensor, group: Mapping[str, Any]) -> None:
        """Create the states that the first step would create, so that they can be read and written before it."""
        state = optimizer.state[flat]
        for key in self.states_of(group):
            if key not in state:
                state[key] = torch.zeros_like(flat, requires_grad=False)
        if self.counts and "step" not in state:
            self.set_steps(optimizer, flat, 0)

    def set_steps(self, optimizer: torch.optim.Optimizer, flat: torch.Tensor, steps: int) -> None:
        """Say how many updates were made (Adam's bias correction)."""
        if self.counts:
            # torch's fused optimizers count in a float tensor beside the parameter.
            optimizer.state[flat]["step"] = torch.tensor(float(steps), dtype=torch.float32, device=flat.device)


def rule_of(settings: Settings) -> Rule:
    """The rule that `settings` name."""
    return _RULES[settings.name](settings)


def _outer(module: torch.nn.Module) -> set[int]:
    """Embeddings and the head: matrices whose rows stand for tokens, one by one."""
    model: Any = module
    found = [part.weight for part in module.modules() if isinstance(part, torch.nn.Embedding)]
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return {id(weight) for weight in [*found, *([] if head is None else [head.weight])]}


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

    return Rule(build, ("exp_avg", "exp_avg_sq"), counts=True)


def _sgd(settings: Settings) -> Rule:
    def build(groups: Groups, lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=lr, momentum=settings.momentum or 0.0, fused=True)

    # A first step from a momentum of zeros is torch's own first step, which begins with the gradient.
    return Rule(build, ("momentum_buffer",) if settings.momentum else ())


def _lion(settings: Settings) -> Rule:
    def build(groups: Groups, lr: float) -> torch.optim.Optimizer:
        assert settings.betas is not None
        return Lion(groups, lr, settings.betas)

    return Rule(build, ("exp_avg",))


def _adagrad(settings: Settings) -> Rule:
    def build(groups: Groups, lr: float) -> torch.optim.Optimizer:
        assert settings.eps is not None
        return Adagrad(groups, lr, settings.eps)

    return Rule(build, ("sum",))


def _muon(settings: Settings) -> Rule:
    def build(groups: Groups, lr: float) -> torch.optim.Optimizer:
        assert settings.momentum is not None and settings.betas is not None and settings.eps is not None
        return Muon(groups, lr, settings.momentum, settings.betas, settings.eps)

    return Rule(build, ("exp_avg", "exp_avg_sq"), hidden_states=("momentum_buffer",), counts=True)


_RULES: dict[str, Callable[[Settings], Rule]] = {
    "adamw": _adamw,
    "sgd": _sgd,
    "lion": _lion,
    "adagrad": _adagrad,
    "muon": _muon,
}
