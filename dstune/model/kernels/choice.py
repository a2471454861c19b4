"""Which kernels a run uses: chosen once, by its file, its model and its device."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from dstune.config.schema import ModelSection
from dstune.errors import ConfigError, Problem
from dstune.loggers import get_logger
from dstune.model.build import outline
from dstune.model.kernels import blocked_norm, gated_mlp
from dstune.model.kernels.blocked_norm import BlockedNorm
from dstune.model.kernels.by_device import ByDevice
from dstune.model.kernels.fused_loss import FusedLossKernel
from dstune.model.kernels.kernel import Kernel, TokenLoss
from dstune.model.kernels.liger import LigerLayers
from dstune.model.kernels.rotation import Rotation
from dstune.model.loss import summed_token_loss

log = get_logger(__name__)

KERNELS: Sequence[Kernel] = (
    FusedLossKernel(),
    ByDevice(cpu=BlockedNorm(), cuda=LigerLayers(BlockedNorm.name, ("rms_norm",), blocked_norm.put_into)),
    ByDevice(cpu=Rotation(), cuda=LigerLayers(Rotation.name, ("rope",))),
    LigerLayers("gated-mlp", ("swiglu", "geglu"), gated_mlp.keep),
)
"""Every kernel there is, in the order in which they are listed and put in."""


@dataclass(frozen=True)
class Choice:
    """One kernel of a run."""

    name: str
    on: bool
    why: str
    """What runs, or why it does not: a line for a person."""


def chosen(section: ModelSection, model: PreTrainedModel, device: str) -> list[Choice]:
    """Every kernel, and whether the run of `model` on `device` (`cpu` or `cuda`) uses it.

    `section.kernels` decides; `model` may be without storage (`build.skeleton`), and packages are looked for here. Raises ConfigError
    where a kernel that the run file names cannot be used, or is none.
    """
    require_known(section)
    choices: list[Choice] = []
    problems: list[Problem] = []
    for kernel in KERNELS:
        wanted = _wanted(section, kernel.name)
        if wanted is False:
            choices.append(Choice(kernel.name, False, f"`model.kernels: {_spelled(section)}`"))
            continue
        finding = kernel.find(model, device)
        if wanted and not finding.works:
            came = f"{kernel.name} was asked for: {finding.why}"
            problems.append(Problem("model.kernels", came, do="Take it out, or set `auto`, which uses what works."))
        choices.append(Choice(kernel.name, finding.works, finding.why))
    if problems:
        raise ConfigError(problems)
    return choices


def require_known(section: ModelSection) -> None:
    """Raises ConfigError for a name in `section.kernels` that no kernel has."""
    names = [kernel.name for kernel in KERNELS]
    asked = [] if isinstance(section.kernels, str) else list(section.kernels)
    problems: list[Problem] = []
    for name in asked:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            do = f"did you mean {near[0]!r}?" if near else ""
            problems.append(Problem("model.kernels", f"{name!r} is no kernel", ", ".join(names), do))
    if problems:
        raise ConfigError(problems)


def planned(section: ModelSection, base: Path, device: str) -> list[Choice]:
    """`chosen` for a model of which only the config is here."""
    return chosen(section, outline(section, base), device)


def fuses_loss(section: ModelSection, model: PreTrainedModel) -> bool:
    """Whether the logits of a run of `model` are never held whole. Shown on the CPU: no GPU is touched."""
    return _uses(section, model, FusedLossKernel(), "cpu")


def keep(section: ModelSection, model: PreTrainedModel, device: str) -> None:
    """Have `model`, which has no storage, keep for the backward pass what it keeps in a run on `device`, with its kernels."""
    for kernel in KERNELS:
        if _uses(section, model, kernel, device):
            kernel.keep(model, device)


def _uses(section: ModelSection, model: PreTrainedModel, kernel: Kernel, device: str) -> bool:
    return _wanted(section, kernel.name) is not False and kernel.find(model, device).works


def put_in(choices: Sequence[Choice], model: PreTrainedModel, device: str) -> TokenLoss:
    """Make `model` use the kernels that are on, and log all of them; the loss to train with."""
    loss: TokenLoss = summed_token_loss
    for kernel, choice in zip(KERNELS, choices, strict=True):
        log.info("kernel %s: %s (%s)", kernel.name, "on" if choice.on else "off", choice.why)
        if choice.on:
            loss = kernel.put_in(model, device, loss)
    return loss


def _wanted(section: ModelSection, name: str) -> bool | None:
    """What the run file says of a kernel: on, off; None: as it turns out."""
    asked = section.kernels
    if asked == "auto":
        return None
    if asked == "off":
        return False
    if isinstance(asked, dict):
        return asked.get(name)
    return name in asked


def _spelled(section: ModelSection) -> str:
    asked = section.kernels
    if isinstance(asked, dict):
        return "{" + ", ".join(f"{name}: {str(on).lower()}" for name, on in asked.items()) + "}"
    return asked if isinstance(asked, str) else "[" + ", ".join(asked) + "]"
