"""Adapters by peft: small trained matrices beside the linear layers of a model whose own weights stay as they are.

peft's layers are put into the model itself: it keeps its class and its forward pass, so that what is shown of the architecture
(packed examples kept apart) and what reads its arguments (the loss) hold with an adapter too. An adapter works on each token alone.
"""

import contextlib
import difflib
import hashlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dstune.config.adapter import AdapterSection
from dstune.engine.parameters import full_shape, is_partitioned, share
from dstune.errors import ConfigError, Problem
from dstune.loggers import get_logger
from dstune.model import text_side, unreached
from dstune.model.names import canonical_names

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

log = get_logger(__name__)

ADAPTER = "default"
"""peft's own name for an adapter that was given none; left out in its files."""
PREFIX = "base_model.model."
"""What peft's files put before the model's own names."""

_NEAREST = 3


@dataclass(frozen=True)
class Chosen:
    """The modules of one model that an adapter trains, by their whole names."""

    targets: tuple[str, ...]
    """Linear layers that get the small matrices."""
    saved: tuple[str, ...]
    """Modules that are trained in full."""


def choose(adapter: AdapterSection, model: PreTrainedModel) -> Chosen:
    """What `adapter` means in `model`; of one that sees too, in its language model.

    Raises ConfigError with every pattern that fits nothing, and the names near it.
    """
    beside = text_side.modules_beside(model)
    modules = {name: module for name, module in model.named_modules() if name and name not in beside}
    problems: list[Problem] = []
    with_weights = {name: module for name, module in modules.items() if any(True for _ in module.parameters())}
    saved = _matching(adapter.modules_to_save, list(with_weights), "modules_to_save", "module", problems)
    head: Any = model.get_output_embeddings()
    linear = [name for name, module in modules.items() if _is_linear(module)]
    linear = [name for name in linear if not name.startswith(tuple(f"{one}." for one in saved)) and name not in saved]
    experts = _names_of_experts(model, linear)
    if adapter.targets == "auto":
        shared = {name.rpartition(".")[0] for name in _shared(model)}
        left_out = {name for name in linear if modules[name] is head or _is_read_past(name, modules)}
        targets = [name for name in linear if name not in left_out | shared and _last(name) not in experts]
        still = _without_gradient(targets, model)
        if still:
            log.info("the adapter leaves out what no gradient reaches: %s", _summary(still))
        targets = [name for name in targets if name not in still]
    else:
        targets = _matching(adapter.targets, linear, "targets", "linear layer", problems)
        for name in sorted({_last(name) for name in targets} & experts):
            came = (
                f"{name}: of {model.config.model_type} peft takes a layer of that name for the experts' fused weights"
            )
            problems.append(Problem("model.adapter.targets", came, "other layers, or `auto`, which leaves it out"))
        if still := _without_gradient(targets, model):
            log.warning("no gradient reaches these targets of the adapter, which stay as they are: %s", _summary(still))
    problems += _tied(model, targets, "targets") + _tied(model, saved, "modules_to_save")
    if not targets and not problems:
        problems.append(Problem("model.adapter.targets", f"{type(model).__name__} has no linear layers left to train"))
    if problems:
        raise ConfigError(problems)
    return Chosen(tuple(targets), tuple(saved))


def _is_linear(module: torch.nn.Module) -> bool:
    """Whether it gives a product and no more: routers of experts are made from linear layers too, and give choices beside it."""
    return isinstance(module, (torch.nn.Linear, Conv1D)) and "router" not in type(module).__name__.lower()


def _names_of_experts(model: PreTrainedModel, linear: Sequence[str]) -> set[str]:
    """The last parts of names that peft, here and whenever it opens the adapter, puts on a mixture's experts instead.

    It does so for adapters of old, when experts were layers of their own, even where dense layers bear these names today.
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    found: set[str] = set()
    for name in {_last(one) for one in linear}:
        config = LoraConfig(target_modules=[name])
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:  # one of the two that are fused, without the other
            found.add(name)
        else:
            found |= {name} - set(config.target_modules or ())
    return found


def _without_gradient(names: Sequence[str], model: PreTrainedModel) -> set[str]:
    found = unreached.unreached(model.config)
    return {name for name in names if unreached.pattern(name) in found}


def _summary(names: set[str]) -> str:
    return ", ".join(sorted({unreached.pattern(name) for name in names}))


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _is_read_past(name: str, modules: Mapping[str, torch.nn.Module]) -> bool:
    """Whether a state space (Mamba's) or its kernels read this layer's weight without calling it: an adapter would be left out."""
    owner, _, own = name.rpartition(".")
    mixer = modules.get(owner)
    return own in ("x_proj", "dt_proj", "out_proj") and hasattr(mixer, "A_log") and hasattr(mixer, "D")


def _matching(patterns: Sequence[str], names: list[str], key: str, what: str, problems: list[Problem]) -> list[str]:
    """The `names` that a pattern fits whole, or from some dot on: `q_proj` fits `model.layers.0.self_attn.q_proj`."""
    found: set[str] = set()
    for pattern in patterns:
        fits = {name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")}
        if not fits:
            near = _near(pattern, names)
            problems.append(Problem(f"model.adapter.{key}", f"{pattern!r} fits no {what}", near))
        found |= fits
    return [name for name in names if name in found]


def _near(pattern: str, names: list[str]) -> str:
    """The names like `pattern`, last parts first: what a person meant, or what there is."""
    if any(fnmatchcase(name, f"{pattern}.*") or fnmatchcase(name, f"*.{pattern}.*") for name in names):
        return f"`{pattern}.*`"
    last = list(dict.fromkeys(map(_last, names)))
    near = difflib.get_close_matches(pattern, list(dict.fromkeys([*last, *names])), n=_NEAREST)
    shown = near or [part for part in last if not part.isdigit()]
    return " or ".join(f"`{name}`" for name in shown[:8])


def _tied(model: PreTrainedModel, modules: Sequence[str], key: str) -> list[Problem]:
    """A weight that two modules share cannot be changed in one of them: peft would take them apart when it loads."""
    shared = _shared(model)
    problems: list[Problem] = []
    for module in modules:
        name = next((name for name in shared if name.startswith(f"{module}.")), None)
        if name is not None:
            other = next(one for one in shared[name] if one != name)
            came = f"{module} shares its weight with {other}"
            problems.append(Problem(f"model.adapter.{key}", came, "modules with weights of their own"))
    return problems


def _shared(model: PreTrainedModel) -> dict[str, list[str]]:
    """Every name of a tensor that has several, with all of them."""
    groups: dict[str, list[str]] = {}
    for name, first in canonical_names(model).items():
        groups.setdefault(first, []).append(name)
    return {name: group for group in groups.values() if len(group) > 1 for name in group}


def peft_config(adapter: AdapterSection, model: PreTrainedModel, chosen: Chosen) -> "LoraConfig":
    """The same adapter in peft's words; `model` as it was before the adapter was put in."""
    from peft import LoraConfig

    layers = [model.get_submodule(name) for name in chosen.targets]
    return LoraConfig(
        task_type="SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM",
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=_shortest(chosen.targets, model),
        use_rslora=adapter.kind == "rslora",
        use_dora=adapter.kind == "dora",
        fan_in_fan_out=all(isinstance(layer, Conv1D) for layer in layers),
        modules_to_save=list(chosen.saved) or None,
    )


def _shortest(targets: Sequence[str], model: PreTrainedModel) -> list[str]:
    """`q_proj` for all of them where that means just these; else every whole name."""
    last = {_last(name) for name in targets}
    meant = [name for name, _ in model.named_modules() if _last(name) in last]
    return sorted(last) if sorted(meant) == sorted(targets) else sorted(targets)


def attach(model: PreTrainedModel, adapter: AdapterSection, seed: int) -> None:
    """Put `adapter` into `model`, freeze all else, and start the adapter: the same on every world, ZeRO stage and worker.

    A is drawn from (seed, name) as peft draws it, uniform within 1 / sqrt(inputs); B is zero, so that the model begins as it was.
    `model` has its weights; on ZeRO-3 the adapter is whole here, and partitioned when the engine is made. A collective.
    Raises ConfigError as `choose`, and where peft refuses the architecture.
    """
    from peft import inject_adapter_in_model

    chosen = choose(adapter, model)
    config = peft_config(adapter, model, chosen)
    # They are trained where they stand: peft would put copies of them beside, and know nothing of their partitions.
    config.modules_to_save = None
    try:
        with torch.random.fork_rng(devices=[]), _gathering(model, adapter), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            inject_adapter_in_model(config, model)
    except ValueError as error:
        text = " ".join(str(error).split())
        raise ConfigError(Problem("model.adapter.targets", f"peft refuses: {text[:400]}", "other layers")) from None
    made = dict(layers(model))
    assert set(made) == set(chosen.targets), set(made) ^ set(chosen.targets)
    for name, layer in made.items():
        _start(layer, f"{seed}/{name}")
    for name in chosen.saved:
        model.get_submodule(name).requires_grad_(True)
    config.modules_to_save = list(chosen.saved) or None
    trained = sum(math.prod(full_shape(one)) for one in model.parameters() if one.requires_grad)
    everything = sum(math.prod(full_shape(one)) for one in model.parameters())
    log.info(
        "%s of rank %d: %s of %s parameters are trained", adapter.kind, adapter.rank, f"{trained:,}", f"{everything:,}"
    )


def layers(model: torch.nn.Module) -> Iterator[tuple[str, "LoraLayer"]]:
    """peft's layers in `model`, by the names of the linear layers that they stand for."""
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def _start(layer: Any, words: str) -> None:
    """The first values of a layer's matrices; of a layer without storage, nothing."""
    first, second, weight = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight, layer.get_base_layer().weight
    if first.is_meta:
        return
    generator = torch.Generator().manual_seed(_seed(words))
    bound = 1 / math.sqrt(layer.in_features)
    first.data.copy_(torch.empty(first.shape).uniform_(-bound, bound, generator=generator))
    second.data.zero_()
    if ADAPTER in layer.lora_magnitude_vector and is_partitioned(weight):
        # DoRA's norm is over W + B A, which its own module computes with its neighbours' weights.
        share(layer.lora_magnitude_vector[ADAPTER], [weight, first])


def _seed(words: str) -> int:
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "little") >> 1


@contextlib.contextmanager
def _gathering(model: PreTrainedModel, adapter: AdapterSection) -> Iterator[None]:
    """peft gathers the weights whose norms DoRA begins with, layer by layer, where transformers tells it that ZeRO-3 is on."""
    if adapter.kind != "dora" or not any(is_partitioned(parameter) for parameter in model.parameters()):
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    told = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del told


def saved_names(model: PreTrainedModel) -> dict[str, str]:
    """Run-time name of each trained parameter of a model with an adapter, and its name in peft's files."""
    from peft import get_peft_model_state_dict

    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    run_time = {id(parameter): name for name, parameter in trained.items()}
    own = get_peft_model_state_dict(model, state_dict=trained, save_embedding_layers=False)
    names = {run_time[id(parameter)]: name for name, parameter in own.items()}
    return {name: PREFIX + names.get(name, name) for name in trained}
