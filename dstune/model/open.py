"""A finished model opened to be used: weights in full on one device, tokenizer, chat template, where a turn ends."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights
from transformers.utils import logging as transformers_logging

from dstune.config.new_tokens import NewTokensSection
from dstune.config.schema import ModelSection
from dstune.config.train import TrainSection
from dstune.data import tokenizer_files
from dstune.data.conversation import Conversation, Example, Message, Refused
from dstune.data.tokenize import Encoder, load_tokenizer, resolve_template
from dstune.errors import ConfigError, Problem, RunFailed, UsageError, first_line
from dstune.model import adapter_files, new_rows
from dstune.model.adapter_files import AdapterFiles
from dstune.model.build import initialise
from dstune.model.config import auto_class, is_builtin, load_config, model_directory, task_of
from dstune.model.reference import require_same, weights_digest
from dstune.paths import RunPaths

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_INITIAL_SEED = TrainSection().seed
_SOME_ANSWER = Message("assistant", "x")


@dataclass(frozen=True)
class Prompt:
    """What a model is given to go on from."""

    ids: list[int]
    control_tokens_encoded: int
    """Control tokens spelled in content that became ordinary text."""
    lossy_characters: int
    """Characters that this tokenizer has no tokens for: the model does not see them."""


@dataclass(frozen=True)
class OpenedModel:
    """What generation and scoring need of a model."""

    name: str
    module: Any
    """The transformers model, whole, in evaluation mode."""
    tokenizer: Any
    encoder: Encoder
    """Renders and tokenises conversations as in training; the last answer alone is the target."""
    seq2seq: bool
    device: torch.device
    dtype: str
    stop_ids: frozenset[int]
    """Tokens that end a turn: the tokenizer's and the generation config's, and the template's own."""
    pad_id: int
    context: int | None
    """The longest sequence in tokens; None where positions have no end (relative ones)."""

    def prompts(self, conversations: Sequence[Conversation]) -> list[Prompt | Refused]:
        """What stands before the next answer to each conversation, or why it cannot be asked; in order.

        Exactly what an answer followed in training: the conversation is encoded with some answer, and cut where its targets begin.
        """
        asked = [replace(one, messages=(*one.messages, _SOME_ANSWER)) for one in conversations]
        return [self._before_answer(example) for example in self.encoder.encode_batch(asked)]

    def _before_answer(self, example: Example | Refused) -> Prompt | Refused:
        if isinstance(example, Refused):
            return example
        ids = example.input_ids[: int(example.loss_mask.argmax())].tolist()
        return Prompt(ids, example.control_tokens_encoded, example.lossy_characters)


def open_model(
    model: str,
    *,
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto",
    device: str = "auto",
    template: str = "auto",
    base: Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> OpenedModel:
    """The model of an exported directory, a hub id, a run directory with an export, or a builtin one (random weights).

    An exported adapter opens with its base model.

    `base`: what a template's relative path is relative to, default here. Raises UsageError where there is no such model,
    RunFailed where its files do not make a whole one, ConfigError for a template.
    """
    section = ModelSection(path=_place(model), revision=revision, trust_remote_code=trust_remote_code)
    base = base or Path.cwd()
    try:
        adapter = _adapter(section, base)
        if adapter is not None:
            section = section.model_copy(update={"path": adapter.base, "revision": adapter.revision})
        directory = model_directory(section, base)
        config = load_config(section, base)
    except ConfigError as error:
        raise UsageError([Problem(model, p.came, p.expected, p.do) for p in error.problems] or str(error)) from None
    seq2seq = task_of(section, config) == "seq2seq-lm"
    if adapter is not None:
        _require_base(adapter, directory)
    tokenizer = load_tokenizer(_tokenizer_place(section, directory, adapter), base)
    chosen = resolve_template(template, tokenizer, base, seq2seq)
    encoder = Encoder(tokenizer, chosen, train_on="last", lossy_text="allow", seq2seq=seq2seq)
    where = _device(device)
    module = _module(section, directory, config, dtype)
    if adapter is not None:
        _make_room(module, len(tokenizer))  # for the rows of new tokens, which the adapter brings
    module = _on(where, module if adapter is None else adapter_files.put_into(module, adapter), model).eval()
    stop_ids = _stop_ids(tokenizer, module, encoder)
    _plain_generation(module)
    pad = tokenizer.pad_token_id
    return OpenedModel(
        name=model,
        module=module,
        tokenizer=tokenizer,
        encoder=encoder,
        seq2seq=seq2seq,
        device=where,
        dtype=_dtype_name(module.dtype),
        stop_ids=stop_ids,
        pad_id=pad if pad is not None else min(stop_ids, default=0),
        context=_context(config),
    )


def open_module(model: ModelSection, base: Path, device: str = "auto") -> tuple[Any, torch.device]:
    """The weights of a run's model alone, whole, in evaluation mode, and where they are: bf16 on a GPU, fp32 on a CPU.

    Raises ConfigError where there is no such model, RunFailed where its files do not make a whole one.
    """
    before = model.model_copy(update={"new_tokens": NewTokensSection()})
    config = load_config(before, base)
    place = _device(device)
    dtype = "fp32" if place.type == "cpu" else "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    module = _module(model, model_directory(model, base), config, dtype)
    if new := tokenizer_files.new_rows(model, base):
        _make_room(module, new.stop)
        new_rows.fill(module, new)
    return module.to(place).eval(), place


def _make_room(module: PreTrainedModel, num_tokens: int) -> None:
    """Rows for so many tokens, the new ones unset, where there are fewer."""
    embedding: Any = module.get_input_embeddings()
    if len(embedding.weight) < num_tokens:
        module.resize_token_embeddings(num_tokens, mean_resizing=False)


def _place(model: str) -> str:
    """The directory to open: an export inside a run directory, else `model` itself. Raises UsageError."""
    path = Path(model).expanduser()
    if not path.is_dir():
        return model
    run = RunPaths(path)
    for directory in (path, run.export):
        if (directory / "config.json").is_file() or adapter_files.is_adapter(directory):
            return str(directory.absolute())
    if run.config.is_file():
        raise UsageError(Problem(model, "is a run without an export", do=f"dstune export {model} {run.export}"))
    raise UsageError(Problem(model, "has no config.json", "an exported model's directory, or a hub id"))


def _adapter(section: ModelSection, base: Path) -> AdapterFiles | None:
    """The adapter that `section` names, a directory or a hub id; None for a whole model. Raises ConfigError where nothing is there."""
    directory = Path(section.path) if Path(section.path).is_dir() else model_directory(section, base)
    return adapter_files.read(directory) if adapter_files.is_adapter(directory) else None


def _require_base(adapter: AdapterFiles, directory: Path) -> None:
    """The base model must be the one that the adapter was trained on, as far as that is known. Raises RunFailed."""
    if adapter.reference is not None:
        now = {"path": adapter.base, "revision": adapter.revision, "sha256": weights_digest(directory)}
        try:
            require_same(adapter.reference, now, str(adapter.directory))
        except ConfigError as error:
            raise RunFailed(error.problems) from None


def _tokenizer_place(section: ModelSection, directory: Path, adapter: AdapterFiles | None) -> ModelSection:
    """What to open the tokenizer of: an adapter brings its own, with the template that it was trained with."""
    if adapter is not None and (adapter.directory / "tokenizer_config.json").is_file():
        return ModelSection(path=str(adapter.directory))
    return section if is_builtin(section) else ModelSection(path=str(directory))


def _device(written: str) -> torch.device:
    if written == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(written)
    except RuntimeError:
        raise UsageError(Problem("device", repr(written), "auto, cpu, cuda or cuda:N")) from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(Problem("device", f"{written} is not here: {torch.cuda.device_count()} GPUs are visible"))
    return device


def _on(device: torch.device, module: Any, model: str) -> Any:
    """Raises RunFailed where the GPU is too small for the model."""
    try:
        return module.to(device)
    except torch.OutOfMemoryError as error:
        came = f"its weights do not fit on {device}: {first_line(error)}"
        do = (
            "`--device cpu` (of `chat`) computes here, slowly; an inference server spreads an export over several GPUs."
        )
        raise RunFailed(Problem(model, came, do=do)) from None


def _module(section: ModelSection, directory: Path, config: PretrainedConfig, dtype: str) -> Any:
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    kind = auto_class(config)
    if is_builtin(section):
        with no_init_weights():
            module = kind.from_config(config, dtype=_DTYPES["bf16" if dtype == "auto" else dtype])
        module.tie_weights()
        initialise(module, _INITIAL_SEED)
        return module
    try:
        module, report = kind.from_pretrained(
            directory,
            config=config,
            dtype="auto" if dtype == "auto" else _DTYPES[dtype],
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=section.trust_remote_code,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        text = " ".join(str(error).split())
        raise RunFailed(Problem(str(directory), f"cannot be loaded: {text[:600]}")) from None
    # transformers only warns of these, and fills the holes with random numbers.
    for what in ("missing_keys", "mismatched_keys"):
        names = sorted(str(name) for name in report[what])
        if what == "missing_keys" and names:
            names = _without_fixed(names, config, section)
        if names:
            raise RunFailed(
                Problem(str(directory), f"{len(names)} weights have {what.replace('_', ' ')}: {', '.join(names[:3])} …")
            )
    return module


def _without_fixed(names: list[str], config: PretrainedConfig, section: ModelSection) -> list[str]:
    """Those of `names` that are no fixed tables: sinusoidal positions, which the architecture makes and many files leave out."""
    with torch.device("meta"), no_init_weights():
        outline = auto_class(config).from_config(config, trust_remote_code=section.trust_remote_code)
    fixed = {name for name, parameter in outline.named_parameters() if not parameter.requires_grad}
    return [name for name in names if name not in fixed]


def _dtype_name(dtype: torch.dtype) -> str:
    return next((name for name, known in _DTYPES.items() if known == dtype), str(dtype).removeprefix("torch."))


def _stop_ids(tokenizer: Any, module: Any, encoder: Encoder) -> frozenset[int]:
    """Every token after which the assistant has nothing more to say."""
    generation = module.generation_config.eos_token_id if module.generation_config is not None else None
    own = getattr(module.config.get_text_config(), "eos_token_id", None)
    found = {tokenizer.eos_token_id, *_listed(generation), *_listed(own)}
    return frozenset(token for token in (*found, *encoder.end_of_turn_ids) if token is not None)


def _listed(token: int | Iterable[int] | None) -> list[int]:
    if token is None:
        return []
    return [token] if isinstance(token, int) else list(token)


def _plain_generation(module: Any) -> None:
    """Keep of the model's generation config only what its decoding needs.

    transformers fills every setting that a call leaves open from it: a model's own sampling or penalty would creep in.
    """
    before = module.generation_config or GenerationConfig()
    module.generation_config = GenerationConfig(
        bos_token_id=before.bos_token_id,
        decoder_start_token_id=before.decoder_start_token_id,
        forced_bos_token_id=before.forced_bos_token_id,
        forced_eos_token_id=before.forced_eos_token_id,
    )


def _context(config: PretrainedConfig) -> int | None:
    length = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None
