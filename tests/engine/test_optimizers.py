"""Every update rule does under ZeRO what it does in plain torch; what does not belong to it is refused."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from dstune.config.train import TrainSection
from dstune.engine.optimizers import Lion, Settings, rule_of
from dstune.engine.world import World
from dstune.errors import CheckpointError
from tests.engine import tiny
from tests.spawn import run_workers

STEPS = range(5)
SCALED = "adamw-scaled"
SCALES = {"model.layers.0.*": 0.1, "*.mlp.*": 3.0}


def _plain(optimizer: str, weights: dict[str, torch.Tensor]) -> list[float]:
    """The losses of a bare training loop: one process, the whole batch at once."""
    module = tiny.build(dtype="fp32")
    for name, parameter in module.named_parameters():
        parameter.data.copy_(weights[name].view(parameter.shape))
    plain = _optimizers(optimizer, module)
    losses: list[float] = []
    for step in STEPS:
        ids, mask = tiny.batch(step)
        logits = module(input_ids=ids, use_cache=False).logits[:, :-1]
        each = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss = (each.view(len(ids), -1) * mask).sum() / mask.sum()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for one in plain:
            one.step()
            one.zero_grad()
        losses.append(loss.item())
    return losses


def _optimizers(name: str, module: nn.Module) -> list[torch.optim.Optimizer]:
    """torch's own, but for Lion; decay on matrices alone."""
    decays = {1: 0.0, 2: 0.1}
    if name == SCALED:
        each: list[dict[str, Any]] = [
            {
                "params": [parameter],
                "weight_decay": decays[parameter.dim()],
                "lr": 1e-3 * (0.1 if ".layers.0." in key else 1.0) * (3.0 if ".mlp." in key else 1.0),
            }
            for key, parameter in module.named_parameters()
        ]
        return [torch.optim.AdamW(each, betas=(0.9, 0.95), eps=1e-8)]
    groups = [
        {"params": [parameter for parameter in module.parameters() if parameter.dim() == dim], "weight_decay": decay}
        for dim, decay in decays.items()
    ]
    if name == "adagrad":
        return [torch.optim.Adagrad(groups, lr=1e-3)]
    if name == "adafactor":
        return [torch.optim.Adafactor(groups, lr=1e-3, eps=(1e-15, 1e-3))]
    if name == "muon":
        hidden = [weight for key, weight in module.named_parameters() if ".layers." in key and weight.dim() == 2]
        for group in groups:
            group["params"] = [one for one in group["params"] if all(one is not weight for weight in hidden)]
        muon = torch.optim.Muon(hidden, lr=1e-3, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
        return [muon, torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)]
    if name == "adamw8bit":  # what it stays close to
        return [torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)]
    rule = rule_of(Settings(name=name, **tiny.OPTIMIZERS[name]))
    optimizer = rule.build(groups, 1e-3)
    for group in groups:
        for parameter in group["params"]:
            rule.prepare(optimizer, parameter, {"kind": "matrix"})
    return [optimizer]


def _curves() -> dict[str, Any]:
    world = World.from_environment()
    world.init(60)
    curves: dict[str, Any] = {}
    for name in (*tiny.OPTIMIZERS, SCALED):
        curves[name] = []
        settings: dict[str, Any] = {"lr_scales": SCALES} if name == SCALED else {"optimizer": name}
        for stage in (1, 3):
            engine = tiny.engine(world, stage, dtype="fp32", **settings)
            weights = {piece.name: piece.tensor.clone() for piece in engine.slices() if piece.state == "fp32"}
            curves[name].append((_plain(name, weights), tiny.train(engine, world, STEPS)))
    with pytest.raises(CheckpointError, match="has the states of lion, and the run wants adamw"):
        engine.load_extra_state({"optimizer": "lion"})
    world.close()
    return curves


@pytest.mark.dist
def test_the_losses_are_those_of_plain_torch() -> None:
    (curves,) = run_workers(_curves, 1)
    for name, pairs in curves.items():
        for plain, ours in pairs:
            limit = 2e-3 if name == "adamw8bit" else 5e-5
            assert (torch.tensor(ours) / torch.tensor(plain) - 1).abs().max() < limit, name
    assert len({pairs[0][1][-1] for pairs in curves.values()}) == len(curves)


def test_lion_by_hand() -> None:
    """Two steps from 1.0 with gradients 2 and -1: the second one's interpolation is still positive, its momentum is not."""
    parameter = nn.Parameter(torch.tensor([1.0]))
    lion = Lion([{"params": [parameter], "weight_decay": 0.5}], lr=0.1, betas=(0.9, 0.5))
    lion.state[parameter]["exp_avg"] = torch.zeros(1)
    for gradient, value, momentum in [(2.0, 1.0 * 0.95 - 0.1, 1.0), (-1.0, 0.85 * 0.95 - 0.1, 0.0)]:
        parameter.grad = torch.tensor([gradient])
        lion.step()
        assert parameter.item() == pytest.approx(value)
        assert lion.state[parameter]["exp_avg"].item() == pytest.approx(momentum)


def test_each_optimizer_has_its_own_settings_and_defaults() -> None:
    assert TrainSection().betas == (0.9, 0.999) and TrainSection().momentum is None
    lion = TrainSection(optimizer="lion")
    assert (lion.betas, lion.eps, lion.momentum) == ((0.9, 0.99), None, None)
    sgd = TrainSection(optimizer="sgd", momentum=0.5)
    assert (sgd.betas, sgd.eps, sgd.momentum) == (None, None, 0.5)
    assert TrainSection(**sgd.model_dump()) == sgd
    relative, absolute = (TrainSection(optimizer="adafactor", scale_parameter=scale) for scale in (None, False))
    assert (relative.lr, relative.eps, relative.scale_parameter) == (1e-3, 1e-30, True)
    assert (absolute.lr, TrainSection(optimizer="adafactor", lr=2e-4).lr) == (2e-5, 2e-4)
    for optimizer, wrong, owners in [
        ("sgd", {"betas": (0.9, 0.9)}, "adamw, lion, muon and adamw8bit"),
        ("adamw", {"momentum": 0.9}, "sgd and muon"),
        ("lion", {"eps": 1e-8}, "adamw, adagrad, muon, adafactor and adamw8bit"),
        ("adamw", {"scale_parameter": False}, "adafactor"),
    ]:
        with pytest.raises(ValidationError, match=f"belongs to {owners}, not to {optimizer}"):
            TrainSection.model_validate({"optimizer": optimizer, **wrong})


@pytest.mark.parametrize("optimizer", ["adam8bit", "adamw_8bit", "paged_adamw_8bit", "AdamW-8bit"])
def test_other_names_of_eight_bits_are_told_ours(optimizer: str) -> None:
    with pytest.raises(ValidationError, match=f"the optimizer {optimizer} is bitsandbytes'; `adamw8bit` keeps"):
        TrainSection.model_validate({"optimizer": optimizer})
    assert TrainSection(optimizer="adamw8bit").betas == TrainSection().betas
