"""An adapter on disk, in peft's layout: which model it goes with, and putting it into that model to be used."""

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from dstune.errors import Problem, RunFailed, UsageError
from dstune.model.adapters import ADAPTER, PREFIX

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
REFERENCE_KEY = "dstune_base"
"""Where the weights' file holds which base model they were trained on (`reference.base_reference`), as JSON."""


@dataclass(frozen=True)
class AdapterFiles:
    """A directory with an adapter."""

    directory: Path
    base: str
    """The base model: a hub id or a directory."""
    revision: str | None
    reference: Mapping[str, Any] | None
    """Name and hash of the base model, where dstune wrote the adapter."""


def is_adapter(directory: Path) -> bool:
    """Whether `directory` holds an adapter and not a whole model."""
    return (directory / CONFIG_FILE).is_file() and not (directory / "config.json").is_file()


def read(directory: Path) -> AdapterFiles:
    """The adapter in `directory`. Raises RunFailed where its files are broken or not there, UsageError where they are not LoRA's."""
    path = directory / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        kind, base, revision = values["peft_type"], values["base_model_name_or_path"], values.get("revision")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunFailed(Problem(str(path), f"is no adapter's config: {error!r}")) from None
    if kind != "LORA":
        raise UsageError(Problem(str(path), f"an adapter of the kind {kind!r}", "LORA (with rsLoRA and DoRA)"))
    if not isinstance(base, str) or not base:
        raise RunFailed(Problem(str(path), "does not name its base model", "base_model_name_or_path"))
    return AdapterFiles(directory, base, revision, _reference(directory / WEIGHTS_FILE))


def _reference(path: Path) -> Mapping[str, Any] | None:
    try:
        with safe_open(str(path), framework="pt") as file:
            written = (file.metadata() or {}).get(REFERENCE_KEY)
        return None if written is None else json.loads(written)
    except (SafetensorError, OSError, ValueError) as error:
        raise RunFailed(Problem(str(path), f"cannot be read: {error}")) from None


def put_into(model: PreTrainedModel, files: AdapterFiles) -> PreTrainedModel:
    """`model`, whole and with its weights, with the adapter beside them in the model's own dtype; its class stays.

    Raises RunFailed where the files do not hold exactly the adapter that they describe: peft itself goes on with random numbers.
    """
    from peft import PeftModel, get_peft_model_state_dict

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what peft warns of when it loads is an error below
            wrapped = PeftModel.from_pretrained(model, str(files.directory), autocast_adapter_dtype=False)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        text = " ".join(str(error).split())
        raise RunFailed(Problem(str(files.directory), f"does not fit {files.base}: {text[:600]}")) from None
    wanted = {_within(name) for name in get_peft_model_state_dict(wrapped, save_embedding_layers=False)}
    with safe_open(str(files.directory / WEIGHTS_FILE), framework="pt") as file:
        found = {_within(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    for names, came in ((wanted - found, "does not hold"), (found - wanted, "holds, and the model has no place for,")):
        if names:
            raise RunFailed(Problem(str(files.directory / WEIGHTS_FILE), f"{came} {', '.join(sorted(names)[:3])}"))
    return wrapped.get_base_model()


def _within(name: str) -> str:
    """A tensor's name without what stands around the model's own names."""
    return re.sub(rf"\.{ADAPTER}(?=\.|$)", "", name.removeprefix(PREFIX))
