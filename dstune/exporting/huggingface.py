"""A committed checkpoint as a Hugging Face directory: config, safetensors, tokenizer with its template, model card."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
from transformers import PretrainedConfig, PreTrainedModel

from dstune.atomic import dump_json, write_text
from dstune.checkpoint.reader import Reader
from dstune.config.schema import ModelSection, RunConfig
from dstune.data.encoder import run_template
from dstune.data.shards import Prepared
from dstune.data.tokenize import load_tokenizer
from dstune.engine.construction import DTYPES
from dstune.errors import CheckpointError, ConfigError, Problem, UsageError
from dstune.exporting import adapter, files
from dstune.exporting.card import CardFacts, model_card
from dstune.exporting.directory import new_directory
from dstune.exporting.merged import whole_model
from dstune.exporting.tensors import Masters, Weights
from dstune.loggers import get_logger
from dstune.model import freezing
from dstune.model.build import skeleton, take_types_of_files
from dstune.model.config import auto_class, is_builtin, load_config, model_directory
from dstune.model.weights import WeightFiles
from dstune.protocols import WEIGHTS

log = get_logger(__name__)

MAX_FILE_BYTES = 5_000_000_000
"""Of one safetensors file; the hub's usual size."""

_PROBE = "yes"
_GENERATION_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def export(
    checkpoint: Path,
    out: Path,
    config: RunConfig,
    base: Path,
    *,
    dtype: str = "bf16",
    max_file_bytes: int = MAX_FILE_BYTES,
    threads: int = 1,
    prepared: Path | None = None,
    merged: bool = False,
    weights: str = WEIGHTS,
) -> None:
    """Write `checkpoint` (a committed directory) to `out`, which must not exist; it appears whole or not at all.

    `base`: what the run file's relative paths are relative to. `dtype` (bf16, fp16, fp32): the fp32 masters are rounded to it, but for
    what transformers keeps in fp32 in such a model.
    `threads` files are written at a time; each holds a piece of a tensor (of joined ones, a mixture's experts, all) in memory.
    A run with an adapter gives the adapter alone, in peft's layout; `merged`: the whole model with the adapter in it.
    `weights`: the state that they are read from (`ema`: the average).
    `prepared`: the data's directory, for the model card. Raises UsageError, CheckpointError, ConfigError, RunFailed.
    """
    if dtype not in ("bf16", "fp16", "fp32"):
        raise UsageError(Problem("dtype", repr(dtype), "bf16, fp16 or fp32"))
    with new_directory(out) as directory:
        reader = Reader(checkpoint, weights)
        if config.model.adapter is not None and not merged:
            _write_adapter(directory, reader, config, base, dtype, prepared)
            return
        with whole_model(reader, config, base) as masters:
            _write(directory, masters, config, base, dtype, max_file_bytes, threads, prepared)


def _write(
    directory: Path,
    masters: Masters,
    config: RunConfig,
    base: Path,
    dtype: str,
    max_file_bytes: int,
    threads: int,
    prepared: Path | None,
) -> None:
    section = config.model.model_copy(update={"dtype": dtype})
    model_config = load_config(section, base)
    outline = skeleton(model_config, section)
    take_types_of_files(outline)
    weights = Weights(outline, masters, untrained(outline, masters, config, base))
    facts = {"total_parameters": weights.num_parameters}
    files.write(weights.as_saved(), directory, max_file_bytes, facts=facts, threads=threads)
    _write_config(directory, model_config, type(outline).__name__, DTYPES[dtype])
    source = model_directory(config.model, base, weights=False)
    _copy_code(source, directory, section, model_config)
    _copy_processors(source, directory)
    tokenizer = _write_tokenizer(directory, config, base, model_config)
    write_text(directory / "generation_config.json", dump_json(_generation(source, model_config, tokenizer)))
    card = _facts(masters, weights.num_parameters, dtype, model_config, prepared)
    write_text(directory / "README.md", model_card(config, card))


def _write_adapter(
    directory: Path, reader: Reader, config: RunConfig, base: Path, dtype: str, prepared: Path | None
) -> None:
    num_parameters = adapter.write(directory, reader, config, base, dtype)
    model_config = load_config(config.model, base)
    _write_tokenizer(directory, config, base, model_config)
    card = _facts(reader, num_parameters, dtype, model_config, prepared)
    write_text(directory / "README.md", model_card(config, replace(card, is_adapter=True)))


def untrained(outline: PreTrainedModel, masters: Masters, config: RunConfig, base: Path) -> WeightFiles | None:
    """The files that the run began with, for what it did not train; `outline` is told what that is (`requires_grad`).

    Raises CheckpointError where they are not those that the run left frozen.
    """
    if is_builtin(config.model) or config.model.init == "random":
        return None
    freezing.freeze(outline, config.train.freeze)
    files = WeightFiles(model_directory(config.model, base))
    frozen = masters.state.get("frozen")
    if frozen and freezing.frozen_digest(outline, files) != frozen:
        came = "its weights are not the ones that the run left frozen"
        raise CheckpointError(Problem(str(files.directory), came, "the files that the run began with"))
    return files


def _write_config(directory: Path, config: PretrainedConfig, architecture: str, dtype: Any) -> None:
    config.architectures = [architecture]
    config.dtype = dtype
    config.name_or_path = ""
    config.save_pretrained(str(directory))


def _copy_code(source: Path, directory: Path, model: ModelSection, config: PretrainedConfig) -> None:
    """The Python code that a model brings, where the run file trusts it."""
    if model.trust_remote_code and getattr(config, "auto_map", None):
        for file in source.glob("*.py"):
            shutil.copyfile(file, directory / file.name)


def _copy_processors(source: Path, directory: Path) -> None:
    """What turns pictures and sounds into a model's inputs is not tuned."""
    for file in source.glob("*processor_config.json"):
        shutil.copyfile(file, directory / file.name)


def _write_tokenizer(directory: Path, config: RunConfig, base: Path, model_config: PretrainedConfig) -> Any:
    """The tokenizer's files with the chat template that the run was trained with, where it was trained with one; the tokenizer."""
    tokenizer = load_tokenizer(config.model, base)
    template = run_template(config.data, tokenizer, base, model_config.is_encoder_decoder)
    if template is not None and template.tool_source is not None:
        tokenizer.chat_template = {"default": template.source, "tool_use": template.tool_source}
    elif template is not None:
        tokenizer.chat_template = template.source
    tokenizer.save_pretrained(str(directory))
    return tokenizer


def _generation(source: Path, config: PretrainedConfig, tokenizer: Any) -> dict[str, Any]:
    """The model's own generation_config.json, else its special tokens; generation stops at the end of an answer too."""
    file = source / "generation_config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise ConfigError(Problem(str(file), f"is not JSON: {error}")) from None
    tokens = config.get_text_config().to_dict() | config.to_dict()
    for key in _GENERATION_KEYS:
        token = tokens.get(key)
        if key not in values and token is not None:
            values[key] = token
    stops = values.get("eos_token_id", [])
    stops = list(stops) if isinstance(stops, list) else [stops]
    stops += [token for token in (tokenizer.eos_token_id, _end_of_turn(tokenizer)) if token is not None]
    stops = list(dict.fromkeys(stops))
    if stops:
        values["eos_token_id"] = stops[0] if len(stops) == 1 else stops
    if tokenizer.pad_token_id is not None:
        values["pad_token_id"] = tokenizer.pad_token_id
    return values


def _end_of_turn(tokenizer: Any) -> int | None:
    """The special token right behind an answer: for `…yes<|im_end|>\\n` that of `<|im_end|>`; None where there is none."""
    if not tokenizer.chat_template:
        return None
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except jinja2.TemplateError:  # instruction templates that are never without an input or a system text
        return None
    behind = text[text.rfind(_PROBE) + len(_PROBE) :]
    special = {str(token): number for number, token in tokenizer.added_tokens_decoder.items()}
    found = [token for token in special if behind.lstrip().startswith(token)]
    return special[max(found, key=len)] if found else None


def _facts(
    masters: Masters, num_parameters: int, dtype: str, model_config: PretrainedConfig, prepared: Path | None
) -> CardFacts:
    losses = masters.state.get("losses") or [None]
    manifest: dict[str, Any] = {}
    if prepared is not None and prepared.is_dir():
        manifest = dict(Prepared.open(prepared).manifest)
    return CardFacts(
        step=masters.step,
        loss=losses[-1],
        dtype=dtype,
        parameters=num_parameters,
        auto_class=auto_class(model_config).__name__,
        counts=manifest.get("counts", {}),
        sources=manifest.get("sources", ()),
    )
