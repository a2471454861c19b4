"""What preparing data must know of a model, read from its config.json without torch or transformers: its task, its vocabulary."""

import json
import re
from pathlib import Path
from typing import Any

from dstune.config.load import resolve
from dstune.config.schema import ModelSection
from dstune.data.tokenizer_files import new_rows
from dstune.errors import ConfigError, Problem, first_line
from dstune.paths import builtin_model

_BUILTIN = "builtin:"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SEQ2SEQ_TYPES = (
    *(
        "bart",
        "bigbird_pegasus",
        "blenderbot",
        "blenderbot-small",
        "encoder-decoder",
        "fsmt",
        "led",
        "longt5",
        "m2m_100",
        "marian",
        "mbart",
        "mt5",
    ),
    *(
        "mvp",
        "nllb-moe",
        "pegasus",
        "pegasus_x",
        "plbart",
        "prophetnet",
        "switch_transformers",
        "t5",
        "t5gemma",
        "t5gemma2",
        "umt5",
    ),
)
"""For a config.json that leaves `is_encoder_decoder` to its class."""
PACKED_SEQ2SEQ_TYPES = (
    "bart", "blenderbot", "blenderbot-small", "marian", "mbart", "mt5", "pegasus", "plbart", "t5", "umt5",
)  # fmt: skip
"""Encoder-decoders whose packed examples are known to stay apart (`model.isolation` shows it again before training)."""


UNPACKED_CAUSAL_TYPES = (
    "bailing_hybrid", "bamba", "big_bird", "bloom", "cpmant", "deepseek_v4", "falcon", "falcon_h1",
    "falcon_mamba", "gpt_oss", "granitemoehybrid", "inkling2_text", "inkling_text", "jamba", "kimi_linear",
    "lfm2", "lfm2_moe", "lfm3", "mamba", "mamba2", "minimax", "mpt", "nemotron_h", "olmo_hybrid", "openai-gpt",
    "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "qwen4_exp", "qwen4_exp_text",
    "recurrent_gemma", "rwkv", "xglm", "xlstm", "zamba", "zamba2", "zaya",
)  # fmt: skip
"""Causal models that carry something over from one packed example to the next (a recurrent state, a convolution, positions of their
own), or keep them apart only by kernels that are not on every machine (GPT-OSS's sinks). `data.packing: true` packs those where it is
shown to be right."""


def is_seq2seq(model: ModelSection, base: Path) -> bool:
    """True for encoder-decoder models. `model.task` decides where it is given, else the model's config.json.

    Raises ConfigError for a model that is not there, or whose config.json cannot be read.
    """
    if model.task != "auto":
        return model.task == "seq2seq-lm"
    config = read_config(model, base)
    if "is_encoder_decoder" in config:
        return bool(config["is_encoder_decoder"])
    return config.get("model_type") in _SEQ2SEQ_TYPES


def packs(model: ModelSection, base: Path) -> bool:
    """Whether `data.packing: auto` packs this model's examples: causal models' but for recurrent ones, and known encoder-decoders'.

    The latter want dstune's own attention, so one that names another is not packed. Raises ConfigError as `is_seq2seq`.
    """
    if not is_seq2seq(model, base):
        return read_config(model, base).get("model_type") not in UNPACKED_CAUSAL_TYPES
    known = read_config(model, base).get("model_type") in PACKED_SEQ2SEQ_TYPES
    return known and model.attention in ("auto", "per-example")


def vocabulary_size(model: ModelSection, base: Path) -> int | None:
    """How many tokens the model has embeddings for, `model.overrides` and `model.new_tokens` heeded; None where its config.json leaves
    it to its class. Raises ConfigError as `read_config`, and where the tokens cannot be added."""
    config = read_config(model, base) | model.overrides
    text = config.get("text_config")
    size = config.get("vocab_size", text.get("vocab_size") if isinstance(text, dict) else None)
    return max(size, new_rows(model, base).stop) if isinstance(size, int) else None


def read_config(model: ModelSection, base: Path) -> dict[str, Any]:
    """The model's config.json. Raises ConfigError for a model that is not there, or whose config.json cannot be read."""
    path = _config_file(model, base)
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(Problem("model.path", f"{path}: {error.strerror}", "a model's config.json")) from None
    except ValueError as error:
        raise ConfigError(Problem(str(path), f"no valid JSON ({error})", "a model's config.json")) from None
    if not isinstance(config, dict):
        raise ConfigError(Problem(str(path), "no JSON object", "a model's config.json"))
    return config


def _config_file(model: ModelSection, base: Path) -> Path:
    if model.path.startswith(_BUILTIN):
        path = builtin_model(model.path.removeprefix(_BUILTIN)) / "config.json"
        if not path.is_file():
            known = sorted(_BUILTIN + folder.name for folder in builtin_model("x").parent.iterdir() if folder.is_dir())
            raise ConfigError(Problem("model.path", f"{model.path!r} is not builtin", " or ".join(known)))
        return path
    directory = resolve(model.path, base)
    if directory.is_dir():
        return directory / "config.json"
    if directory.exists() or not _HUB_ID.fullmatch(model.path):
        came = "is a file" if directory.exists() else "does not exist"
        raise ConfigError(Problem("model.path", f"{directory} {came}", "a model's directory or a hub id"))
    return _from_hub(model, directory)


def _from_hub(model: ModelSection, tried: Path) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(model.path, "config.json", revision=model.revision))
    except (OSError, ValueError) as error:
        came = f"{model.path!r} is no directory here ({tried}), and the hub gave: {first_line(error)}"
        do = "Without a network: fetch it where there is one, and name the directory."
        raise ConfigError(Problem("model.path", came, "a model's directory or a hub id", do)) from None
