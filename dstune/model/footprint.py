"""The sizes of a model that `planning` reckons with, counted on torch's `meta` device: no weights, no memory, no arithmetic.

What a forward pass keeps for the backward pass is not estimated from formulas but seen: the whole architecture is run once on tensors
without content, and every tensor that autograd saves is counted once, whichever views of it there are.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from dstune.config.schema import ModelSection
from dstune.data import tokenizer_files
from dstune.engine.construction import DTYPES
from dstune.errors import ConfigError
from dstune.loggers import get_logger
from dstune.model import adapters, fp8, freezing, new_rows, text_side, tiling
from dstune.model.attention import choose
from dstune.model.build import skeleton
from dstune.model.config import is_multimodal, load_config, numbers
from dstune.model.failures import FAILURES
from dstune.model.kernels import choice
from dstune.model.layers import repeated_layers
from dstune.model.per_example import FP32_ELEMENTS
from dstune.planning.shapes import ModelShape

log = get_logger(__name__)

_COUNTED = "counted"
_TOKENS = 256
"""So many tokens pass the model: activations grow with their number, attention's as well where no mask is kept."""


def footprint(model: ModelSection, base: Path, freeze: Sequence[str] = (), device: str | None = None) -> ModelShape:
    """Count the model of a run, with its adapter and what it freezes; with the kernels that it uses on `device` (`cpu` or `cuda`), or none.

    Raises ConfigError where transformers cannot build it.
    """
    config = load_config(model, base)
    _register()
    module = _outline(config, model)
    # Or GPT-2 and others look for padding among tokens that have no content; past the config's own check, which may want a number.
    vars(module.config)["pad_token_id"] = None
    if model.adapter is not None:
        with torch.device("meta"):
            adapters.attach(module, model.adapter, 0)
        for parameter in module.parameters():  # peft makes adapters in fp32, and the engine all parameters alike
            parameter.data = parameter.data.to(DTYPES[model.dtype])
    freezing.freeze(module, freeze)
    new_rows.require_trained(module, tokenizer_files.new_rows(model, base))
    layers = repeated_layers(module)
    parameters = list(module.parameters())
    text = config.get_text_config()
    if device is not None:
        choice.keep(model, module, device)
    if model.fp8:
        fp8.round_products(module)
    seen = _count(module, config, layers)
    tiles = _tiles(module, config, layers, model, seen)
    head: Any = module.get_output_embeddings()
    active, frozen = _active(module, text)
    return ModelShape(
        kind=config.model_type,
        sizes=Counter(parameter.numel() for parameter in parameters),
        trained=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        tables=sum(table.numel() for table in _tables(module)),
        hidden=_hidden(module, head),
        active=active,
        frozen_active=frozen,
        layers=len(layers),
        experts=_experts(text)[0] * len(layers),
        attention_width=_attention_width(text),
        vocabulary=int(text.vocab_size),
        largest_layer=max((sum(p.numel() for p in layer.parameters()) for layer in layers), default=0),
        layer_activations=(seen.a_layer(layers) if seen else _estimate(text, model)) - tiles.activations,
        compiled_activations=_compiled(seen, layers, _width(text) * _bytes(module)) if seen else 0,
        layer_input=_width(text) * _bytes(module),
        other_activations=seen.elsewhere // _TOKENS if seen else 8 * _width(text),
        attention_activations=seen.attended // (_TOKENS * len(layers)) if seen and layers else 0,
        attention_result=seen.results // (_TOKENS * len(layers)) if seen and layers else 0,
        fp32_tokens=FP32_ELEMENTS // seen.head_size if seen and seen.head_size else 0,
        tile_tokens=tiles.tokens,
        tile_activations=tiles.activations,
        tiled=tiles.elements,
        recomputable=module.supports_gradient_checkpointing and bool(layers),
        head_trained=head is None or head.weight.requires_grad,
        head_tied=_tied(module.get_input_embeddings(), head),
        counted=seen is not None,
    )


def _tables(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The trained embeddings, each once."""
    found = {id(part.weight): part.weight for part in module.modules() if isinstance(part, torch.nn.Embedding)}
    return [weight for weight in found.values() if weight.requires_grad]


def _outline(config: PretrainedConfig, model: ModelSection) -> PreTrainedModel:
    """The model with the attention that counts; one that knows transformers' own by name alone (Falcon) with the one it trains with."""
    try:
        return skeleton(config, model, _COUNTED)
    except ConfigError as error:
        log.debug("%s is counted with its own attention: %s", config.model_type, error)
        return skeleton(config, model, choose(model, config, "padded"))


class _Tiles(NamedTuple):
    """What `model.mlp_tile` changes (`planning.shapes`)."""

    tokens: int = 0
    activations: int = 0
    elements: int = 0


def _tiles(
    module: PreTrainedModel,
    config: PretrainedConfig,
    layers: Sequence[torch.nn.Module],
    model: ModelSection,
    whole: "_Seen | None",
) -> _Tiles:
    """Counted by running the model again with two tiles; `whole`: what is kept without any."""
    if model.mlp_tile == "off":
        return _Tiles()
    names = tiling.feed_forwards(module)
    elements = sum(p.numel() for name in names for p in module.get_submodule(name).parameters())
    tokens = _width(config.get_text_config()) if model.mlp_tile == "auto" else model.mlp_tile
    if whole is None or not names:
        return _Tiles(tokens, 0, elements)
    tiling.tile(module, _TOKENS // 2)
    parts = _count(module, config, layers)
    if parts is None:
        return _Tiles(tokens, 0, elements)
    # What a tile starts from is held by torch's checkpoint itself, where nobody sees it saved.
    kept = parts.a_layer(layers) + _width(config.get_text_config()) * _bytes(module)
    return _Tiles(tokens, max(0, whole.a_layer(layers) - kept), elements)


def _count(module: PreTrainedModel, config: PretrainedConfig, layers: Sequence[torch.nn.Module]) -> "_Seen | None":
    """What a forward pass keeps; None where the model could not be run without content."""
    seen = _Seen(list(module.parameters()))
    try:
        _run(module, config, layers, seen)
    except FAILURES as error:
        log.debug("%s was not counted: %s", config.model_type, error)
        return None
    return seen


class _Seen:
    """Bytes of the tensors that autograd saved, apart by whether a layer was running; the parameters are not among them."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        self._known = {_number(parameter.untyped_storage()) for parameter in parameters}
        self._kept: list[Any] = []  # a storage that is freed would lend its number to the next one
        self._operands: dict[int, Any] = {}
        self._layers: dict[int, int] = {}
        self._rounded: set[int] = set()
        self.depth = 0
        self.elsewhere = 0
        self.attended = self.results = self.head_size = 0
        """Bytes of attention's tensors, and of its results among them; the size of a head."""

    def a_layer(self, layers: Sequence[torch.nn.Module]) -> int:
        """Bytes of one token in one layer."""
        return sum(self._layers.values()) // (_TOKENS * max(1, len(layers)))

    def of_products(self, layers: Sequence[torch.nn.Module]) -> int:
        """Those of `a_layer` that matrix products read or made, and their copies in 8 bits."""
        kept = sum(
            count for number, count in self._layers.items() if number in self._operands or number in self._rounded
        )
        return kept // (_TOKENS * max(1, len(layers)))

    def operand(self, tensor: Any) -> None:
        """What a product, or attention, reads or makes."""
        if isinstance(tensor, torch.Tensor):
            storage = tensor.untyped_storage()
            self._operands[_number(storage)] = storage

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if (number := _number(storage)) not in self._known:
            self._known.add(number)
            self._kept.append(storage)
            if self.depth:
                self._layers[number] = storage.nbytes()
                if tensor.element_size() == 1:
                    self._rounded.add(number)
            else:
                self.elsewhere += storage.nbytes()
        return tensor


def _compiled(seen: "_Seen", layers: Sequence[torch.nn.Module], layer_input: int) -> int:
    """Bytes a token and layer that torch.compile keeps: what products and attention read or made, and the layer's two sums; what lies
    between is made again in the backward pass, which torch's partitioner finds cheaper than keeping it.
    """
    return min(seen.a_layer(layers), seen.of_products(layers) + 2 * layer_input)


def _number(storage: Any) -> int:
    """What tells storages apart that have no address."""
    return storage._cdata


def _run(module: PreTrainedModel, config: PretrainedConfig, layers: Sequence[torch.nn.Module], seen: _Seen) -> None:
    ids = torch.zeros((1, _TOKENS), dtype=torch.int64, device="meta")
    inputs: dict[str, Any] = {"input_ids": ids}
    if config.is_encoder_decoder:
        # Of a packed pair, half the tokens are taken for the source's.
        inputs = {"input_ids": ids[:, : _TOKENS // 2], "decoder_input_ids": ids[:, _TOKENS // 2 :]}
    # The language model itself: what stands around one that sees looks into the tokens for images.
    body: Any = (
        module.get_decoder() if is_multimodal(config) else module if config.is_encoder_decoder else module.base_model
    )
    _Attention.seen = seen
    with _counting(layers, seen), torch.autograd.graph.saved_tensors_hooks(seen.pack, lambda tensor: tensor):
        body.train()(**inputs, use_cache=False)


@contextlib.contextmanager
def _counting(layers: Sequence[torch.nn.Module], seen: _Seen) -> Iterator[None]:
    def multiplied(_: Any, inputs: tuple[Any, ...], result: Any) -> None:
        for tensor in (*inputs, result):
            seen.operand(tensor)

    def enter(*_: Any) -> None:
        seen.depth += 1

    def leave(*_: Any) -> None:
        seen.depth -= 1

    hooks = [
        hook
        for layer in layers
        for hook in (layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave))
    ]
    hooks += [
        part.register_forward_hook(multiplied)
        for layer in layers
        for part in layer.modules()
        if getattr(getattr(part, "weight", None), "ndim", 0) == 2
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _register() -> None:
    # Without a mask of its own transformers makes none, and does not look into the positions, which have no content.
    AttentionInterface.register(_COUNTED, _attention)


def _attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, None]:
    return _Attention.apply(query, key, value), None


class _Attention(torch.autograd.Function):
    """Keeps what flash attention keeps: queries, keys, values, the result, and a number per head and token."""

    seen: _Seen
    """Whoever counts at present."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        batch, heads, length, _ = query.shape
        result = value.new_empty((batch, length, heads, value.shape[-1]))
        seen, tensors = _Attention.seen, (query, key, value, result)
        seen.attended += sum(one.numel() * one.element_size() for one in tensors)
        seen.results += result.numel() * result.element_size()
        seen.head_size = value.shape[-1]
        for one in tensors:
            seen.operand(one)
        ctx.save_for_backward(*tensors, query.new_empty((batch, heads, length), dtype=torch.float32))
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _bytes(module: PreTrainedModel) -> int:
    return next(module.parameters()).element_size()


def _width(text: PretrainedConfig) -> int:
    return _size(text, "hidden_size", "d_model", "n_embd")


def _attention_width(text: PretrainedConfig) -> int:
    heads, size = _size(text, "num_attention_heads", "n_head", "num_heads"), _size(text, "head_dim", "d_kv")
    return heads * size if heads and size else _width(text)


def _size(text: PretrainedConfig, *keys: str) -> int:
    """The largest of what the config says under the first of `keys` that it has; 0: none."""
    return max(numbers(text, *keys), default=0)


def _active(module: PreTrainedModel, text: PretrainedConfig) -> tuple[int, int]:
    """Elements that a token is multiplied with, and those of them that are frozen: matrices, of experts a token's own; an embedding only
    where it is the head too.
    """
    embedding: Any = module.get_input_embeddings()
    head: Any = module.get_output_embeddings()
    total = frozen = 0
    experts, visited = _experts(text)
    beside = text_side.beside(module)
    for name, parameter in module.named_parameters():
        if (
            name in beside
            or parameter.dim() < 2
            or (embedding is not None and parameter is embedding.weight and not _tied(embedding, head))
        ):
            continue
        share = (visited or experts) / experts if experts and ".experts." in f".{name}." else 1.0
        count = int(parameter.numel() * share)
        total += count
        frozen += 0 if parameter.requires_grad else count
    return total, frozen


def _experts(text: PretrainedConfig) -> tuple[int, int]:
    """How many experts a layer has, and how many of them a token visits; 0: none, or the config does not say."""
    experts = _size(text, "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    visited = _size(text, "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
    return experts, min(experts, visited)


def _hidden(module: PreTrainedModel, head: Any) -> int:
    outer = {id(part.weight) for part in module.modules() if isinstance(part, torch.nn.Embedding)}
    outer.add(id(getattr(head, "weight", None)))
    return sum(p.numel() for p in module.parameters() if p.requires_grad and p.dim() > 1 and id(p) not in outer)


def _tied(embedding: Any, head: Any) -> bool:
    return head is not None and embedding is not None and head.weight is embedding.weight


def _estimate(text: PretrainedConfig, model: ModelSection) -> int:
    """Bytes a token and layer of a model that could not be run without content: the inputs and results of its products and norms."""
    size = {"bf16": 2, "fp16": 2, "fp32": 4}[model.dtype]
    _, visited = _experts(text)
    inner = _size(text, "moe_intermediate_size", "intermediate_size") or 4 * _width(text)
    return int(size * (14 * _width(text) + 4 * inner * max(1, visited)) + 8 * _width(text))
