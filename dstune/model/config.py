"""Which architecture a run tunes: the model's config.json (a directory, the hub, or a builtin one) with the run file's overrides."""

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
)

from dstune.config.load import resolve
from dstune.config.schema import ModelSection
from dstune.data.tokenizer_files import new_rows
from dstune.errors import ConfigError, Problem, first_line
from dstune.paths import builtin_model

BUILTIN_PREFIX = "builtin:"
Task = Literal["causal-lm", "seq2seq-lm"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_CONFIG_FILES = ["*.json", "*.jinja", "*.model", "*.txt"]
_WEIGHT_FILES = ["*.safetensors"]
_CODE_FILES = ["*.py"]


def load_config(model: ModelSection, base: Path) -> PretrainedConfig:
    """The config of `model`, `overrides` put over it, its vocabulary large enough for `new_tokens`. `base`: the run file's directory.

    Raises ConfigError.
    """
    config = _with_overrides(model, model_directory(model, base, weights=False))
    new = new_rows(model, base)
    if new:
        text = config.get_text_config()
        text.vocab_size = max(text.vocab_size, new.stop)
    return config


def _with_overrides(model: ModelSection, directory: Path) -> PretrainedConfig:
    plain = _read(directory, model)
    if not model.overrides:
        return plain
    values, _ = PretrainedConfig.get_config_dict(str(directory))
    problems = _unknown(model.overrides, {**plain.to_dict(), **plain.attribute_map, **values}, "model.overrides")
    if problems:
        raise ConfigError(problems)
    try:
        # From the file's own values, so that what a config derives (a head's size) follows what was overridden.
        config = type(plain).from_dict(_merged(values, model.overrides))
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        text = " ".join(str(error).split())
        raise ConfigError(Problem("model.overrides", f"{plain.model_type}'s config refuses them: {text}")) from None
    config.name_or_path = str(directory)
    return config


def task_of(model: ModelSection, config: PretrainedConfig) -> Task:
    """`causal-lm` or `seq2seq-lm`: as the run file says, else found from the config. Raises ConfigError where they disagree."""
    found: Task = "seq2seq-lm" if config.is_encoder_decoder else "causal-lm"
    if model.task not in ("auto", found):
        raise ConfigError(Problem("model.task", f"{model.task!r} for a {config.model_type} model", f"{found!r}"))
    return found


def auto_class(config: PretrainedConfig) -> Any:
    """transformers' class that opens the whole model for training: of one that sees or hears too, not its language model alone."""
    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM
    return AutoModelForMultimodalLM if is_multimodal(config) else AutoModelForCausalLM


def is_multimodal(config: PretrainedConfig) -> bool:
    """Whether a language model is but one part of it (`Gemma3ForConditionalGeneration`).

    A config that both such a class and a bare language model are made of (Qwen 3.5's) says which it is by its `architectures`.
    """
    mappings: tuple[Any, Any] = AutoModelForMultimodalLM._model_mapping, AutoModelForCausalLM._model_mapping
    whole, alone = (mapping.get(type(config), None) for mapping in mappings)
    if config.is_encoder_decoder or whole is None:
        return False
    return alone in (None, whole) or alone.__name__ not in (config.architectures or [])


def is_builtin(model: ModelSection) -> bool:
    """Whether the model is one of dstune's own tiny ones, which have no weights: they are always initialised."""
    return model.path.startswith(BUILTIN_PREFIX)


def model_directory(model: ModelSection, base: Path, weights: bool = True) -> Path:
    """The directory on this machine that holds the model; a hub id is fetched into the hub's cache (weights only if asked).

    Raises ConfigError where there is no such model.
    """
    if is_builtin(model):
        return _builtin(model.path.removeprefix(BUILTIN_PREFIX))
    directory = resolve(model.path, base)
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            raise ConfigError(
                Problem("model.path", f"{directory} has no config.json", "a Hugging Face model directory")
            )
        return directory
    if directory.exists() or not _HUB_ID.fullmatch(model.path):
        came = "is a file" if directory.exists() else "does not exist"
        raise ConfigError(Problem("model.path", f"{directory} {came}", "a model's directory or a hub id"))
    return _fetch(model, directory, weights)


def _builtin(name: str) -> Path:
    directory = builtin_model(name)
    if not re.fullmatch(r"[a-z0-9-]+", name) or not directory.is_dir():
        known = sorted(BUILTIN_PREFIX + path.name for path in builtin_model("x").parent.iterdir() if path.is_dir())
        raise ConfigError(Problem("model.path", f"{BUILTIN_PREFIX + name!r} is not builtin", " or ".join(known)))
    return directory


def _fetch(model: ModelSection, tried: Path, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = _CONFIG_FILES + (_WEIGHT_FILES if weights else []) + (_CODE_FILES if model.trust_remote_code else [])
    try:
        return Path(snapshot_download(model.path, revision=model.revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise ConfigError(
            Problem(
                "model.path",
                f"{model.path!r} is no directory here ({tried}) and the hub gave: {first_line(error)}",
                do="Without a network: fetch it where there is one, and name the directory.",
            )
        ) from None


def _read(directory: Path, model: ModelSection) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(str(directory), trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        text = " ".join(str(error).split())
        if "trust_remote_code" in text:
            raise ConfigError(
                Problem(
                    "model.trust_remote_code",
                    f"{directory} brings Python code of its own, which is off",
                    do="Read that code, then set `model.trust_remote_code: true`, or take a model that transformers knows.",
                )
            ) from None
        raise ConfigError(
            Problem(str(directory / "config.json"), f"transformers cannot read it: {text[:400]}")
        ) from None


def _unknown(overrides: Mapping[str, Any], known: Mapping[str, Any], where: str) -> list[Problem]:
    """A problem for every key that the model's config does not have, with its nearest neighbour; nested configs as well."""
    problems: list[Problem] = []
    for key, value in overrides.items():
        inner = known.get(key)
        if key not in known:
            near = difflib.get_close_matches(key, list(known), n=1)
            expected = f"`{near[0]}`" if near else "a key of the model's config.json"
            problems.append(Problem(where, f"{key!r} is not in the model's config", expected))
        elif isinstance(value, Mapping) and isinstance(inner, Mapping) and key.endswith("config"):
            problems += _unknown(value, inner, f"{where}.{key}")
    return problems


def _merged(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`overrides` put over `values`, mappings key by key."""
    result = dict(values)
    for key, value in overrides.items():
        inner = result.get(key)
        result[key] = _merged(inner, value) if isinstance(value, Mapping) and isinstance(inner, Mapping) else value
    return result


def sub_configs(config: PretrainedConfig) -> Iterable[PretrainedConfig]:
    """`config` and every config inside it (a vision tower's, an encoder's)."""
    yield config
    for name in config.sub_configs:
        inner = getattr(config, name)
        if inner is not None:
            yield from sub_configs(inner)


def numbers(config: PretrainedConfig, *keys: str) -> list[int]:
    """What the first of `keys` that `config` has a number for says: one number, or one for each layer. None of them: nothing."""
    layers = list(config.per_layer_config) if getattr(config, "is_heterogeneous", False) else [config]
    for key in keys:
        found = [getattr(layer, key, None) for layer in layers]
        flat = [number for one in found for number in (one if isinstance(one, (list, tuple)) else [one])]
        if known := [int(number) for number in flat if isinstance(number, (int, float)) and number]:
            return known
    return []
