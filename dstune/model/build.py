"""The model of a run, partitioned as it is built: pretrained weights, or the same random ones on every world and ZeRO stage."""

import copy
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from dstune.config.schema import ModelSection
from dstune.data.tokenizer_files import new_rows
from dstune.engine.construction import DTYPES, construction
from dstune.engine.parameters import whole
from dstune.engine.tensor_parallel import held_in_parts, to_be_cut
from dstune.errors import ConfigError, Problem
from dstune.loggers import get_logger
from dstune.model import adapters, freezing, per_example, weights
from dstune.model.config import auto_class, is_builtin, is_multimodal, load_config, model_directory, task_of
from dstune.model.failures import FAILURES
from dstune.model.layers import keep_every_layer
from dstune.model.names import saved_names
from dstune.model.restarts import restart_positions
from dstune.model.rotary import follow_examples
from dstune.protocols import Slice

log = get_logger(__name__)


def build(
    model: ModelSection,
    base: Path,
    attention: str,
    seed: int,
    ds_config: Mapping[str, Any],
    frozen: Sequence[str] = (),
) -> PreTrainedModel:
    """The model to hand to the engine, with its weights, in `model.dtype`; under ZeRO-3 each worker holds its piece.

    Under tensor parallelism matrices of which a worker will have a part are unset, those of files that are trained (not `frozen`, as
    `train.freeze`): `masters_from_files` reads that part, once the engine has cut them. Their memory is never touched before.

    `attention`: `eager`, `sdpa` or `per-example` (as `attention.choose` found). A collective: every worker calls it.
    Raises ConfigError where the architecture or its weights do not fit.
    """
    config = load_config(model, base)
    if model.init == "random" and is_multimodal(config):
        came = f"random, and of {config.model_type} only the text side is trained: the rest would be in no file"
        raise ConfigError(Problem("model.init", came, "pretrained"))
    module = construct(config, model, attention, ds_config)
    if is_builtin(model) or model.init == "random":
        initialise(module, seed)
    else:
        # An adapter's own files hold nothing of a head that is in no other.
        head_seed = seed if model.adapter is None else None
        later = _later(module, config, ds_config, frozen)
        weights.load_weights(module, model_directory(model, base), new_rows(model, base), head_seed, later)
    if model.adapter is not None:
        adapters.attach(module, model.adapter, seed)
    if model.activation_checkpointing in (True, "offload"):  # whoever plans a run settles `auto`
        checkpoint_activations(module, offload=model.activation_checkpointing == "offload")
    return module.train()


def _later(
    module: PreTrainedModel, config: PretrainedConfig, ds_config: Mapping[str, Any], frozen: Sequence[str]
) -> frozenset[str]:
    """What is cut once the engine is there, and in its masters."""
    cut = to_be_cut(module, config, ds_config)
    fixed = {id(parameter) for parameter in freezing.frozen_by(module, frozen)} if cut else set()
    return cut - {name for name, parameter in module.named_parameters() if id(parameter) in fixed}


def construct(
    config: PretrainedConfig, model: ModelSection, attention: str, ds_config: Mapping[str, Any]
) -> PreTrainedModel:
    """The module tree with unset weights and right buffers. Raises ConfigError where there is no such architecture."""
    outline = skeleton(config, model, attention)
    # Filling weights that are overwritten next would take most of the time of building.
    largest = max(parameter.numel() for parameter in outline.parameters())
    with no_init_weights(), construction(ds_config, DTYPES[model.dtype], largest):
        module = _instance(config, model, attention)
    module.tie_weights()
    if rate := keep_every_layer(module):
        log.warning("no layer is left out at random (layerdrop %g): the workers gather each one together", rate)
    restart_positions(module)
    follow_examples(module)
    _restore_buffers(module, outline)
    return module


def skeleton(config: PretrainedConfig, model: ModelSection, attention: str = "eager") -> PreTrainedModel:
    """The model without storage (torch's `meta` device): names, shapes, types. Raises ConfigError as `construct`."""
    per_example.register()
    try:
        with no_init_weights(), torch.device("meta"):
            module = _instance(copy.deepcopy(config), model, attention)
    except FAILURES as error:
        text = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ConfigError(
            Problem(
                "model.path", f"transformers cannot build {config.model_type} with {attention} attention: {text[:400]}"
            )
        ) from error
    module.tie_weights()
    _keep_precise(module, module.named_buffers())
    return module


def take_types_of_files(outline: PreTrainedModel) -> None:
    """Give the parameters of a skeleton the types that `from_pretrained` loads and `save_pretrained` writes: fp32 for some (routers).

    Of files alone: while a model is trained, DeepSpeed has every parameter in `model.dtype`, and its fp32 master beside it.
    """
    _keep_precise(outline, outline.named_parameters())


def _keep_precise(outline: PreTrainedModel, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Those of `tensors` that the architecture wants in fp32 in any run (a router's corrections) get that type, as in `from_pretrained`."""
    internals: Any = outline
    patterns = [pattern.replace("*", ".*") for pattern in internals._get_dtype_plan(outline.dtype)]
    for name, tensor in tensors:
        if tensor.is_floating_point() and any(re.search(pattern, name) for pattern in patterns):
            tensor.data = tensor.data.float()


def adapted_skeleton(model: ModelSection, base: Path) -> PreTrainedModel:
    """The model with its adapter, without storage. Raises ConfigError as `skeleton` and `adapters.choose`."""
    assert model.adapter is not None
    module = skeleton(load_config(model, base), model)
    with torch.device("meta"):
        adapters.attach(module, model.adapter, 0)
    return module


def outline(model: ModelSection, base: Path) -> PreTrainedModel:
    """What is trained, with its adapter where it has one, without storage. Raises ConfigError as `skeleton` and `adapters.choose`."""
    return skeleton(load_config(model, base), model) if model.adapter is None else adapted_skeleton(model, base)


def checkpoint_names(module: PreTrainedModel, model: ModelSection) -> dict[str, str]:
    """What `save_pretrained` calls the trained parameters that it calls otherwise: the model's own, or peft's with an adapter."""
    return saved_names(module) if model.adapter is None else adapters.saved_names(module)


def masters_from_files(module: PreTrainedModel, model: ModelSection, base: Path) -> Callable[[Slice], None] | None:
    """What begins the engine's masters with the files' own values (`weights.masters`); None where nothing is left to be read.

    `module`: as the engine has it.
    """
    if model.adapter is not None or model.init == "random" or is_builtin(model):
        return None
    directory, names = model_directory(model, base), checkpoint_names(module, model)
    return weights.masters(module, directory, names, held_in_parts(module))


def _instance(config: PretrainedConfig, model: ModelSection, attention: str) -> PreTrainedModel:
    task_of(model, config)
    return auto_class(config).from_config(
        config,
        dtype=DTYPES[model.dtype],
        attn_implementation=attention,
        trust_remote_code=model.trust_remote_code,
    )


def _restore_buffers(module: PreTrainedModel, outline: PreTrainedModel) -> None:
    """Compute the buffers again in their own precision: zero.Init makes every tensor of a constructor `model.dtype`.

    Rotary frequencies in bf16 are off by up to 0.2%: a thousand tokens later the angle is wrong by a radian.
    """
    parameters: list[Any] = list(module.parameters())
    for parameter in parameters:
        parameter._is_hf_initialized = True  # transformers' own mark: its initialisers leave this one alone
    _visit_buffers(module, module, outline)
    for parameter in parameters:
        del parameter._is_hf_initialized


def _visit_buffers(module: Any, model: Any, outline: torch.nn.Module) -> None:
    """Children before parents, each by the rules of the nearest model around it: transformers' own order."""
    for name, child in module.named_children():
        inner = child if isinstance(child, PreTrainedModel) else model
        _visit_buffers(child, inner, outline.get_submodule(name))
    wanted = dict(outline.named_buffers(recurse=False))
    found = dict(module.named_buffers(recurse=False))
    for name, buffer in found.items():
        persistent = name not in module._non_persistent_buffers_set
        module.register_buffer(name, buffer.to(wanted[name].dtype), persistent=persistent)
    if found:
        with torch.no_grad():
            model._init_weights(module)


def initialise(module: PreTrainedModel, seed: int) -> None:
    """Random weights by the architecture's own rules: the same for a seed, whatever the world and the ZeRO stage.

    Each worker makes the whole model on its CPU for a moment and keeps its piece: meant for small models.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with whole(module.parameters()):
            module.initialize_weights()


def checkpoint_activations(module: PreTrainedModel, offload: bool = False) -> None:
    """Recompute each layer's activations in the backward pass. Raises ConfigError where the architecture cannot.

    `offload`: the layers' inputs wait in pinned main memory, copied on the stream that computes; on a CPU they are there already.
    """
    require_recomputing(module)
    module.activation_checkpointing_enable(
        activation_checkpointing_kwargs={"use_reentrant": False}, offload=offload and torch.accelerator.is_available()
    )
    # Or the embeddings' result wants a gradient, and the backward pass goes through all frozen layers below the trained ones.
    module.disable_input_require_grads()


def require_recomputing(module: PreTrainedModel) -> None:
    """Raises ConfigError where activations cannot be computed again."""
    if not module.supports_gradient_checkpointing:
        came = f"{type(module).__name__} does not support it"
        raise ConfigError(Problem("model.activation_checkpointing", came, "false"))
