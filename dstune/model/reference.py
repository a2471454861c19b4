"""Which model an adapter belongs to: named, and recognised again. A checkpoint of an adapter holds nothing of it."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from dstune.config.schema import ModelSection
from dstune.errors import ConfigError, Problem
from dstune.model.config import is_builtin, load_config, model_directory
from dstune.model.weights import WeightFiles

_SAMPLE_BYTES = 4096
_MOST_SAMPLED = 4096
_ELSEWHERE = ("transformers_version", "_name_or_path", "name_or_path")
"""Keys of a config that say where it was read, not what it is."""
_LONGEST_HEADER = 100_000_000


def base_reference(model: ModelSection, base: Path, seed: int) -> dict[str, Any]:
    """The model of a run by name and hash, JSON-like. Raises ConfigError where it is not there.

    The hash of a directory covers config.json, and of every safetensors file its size, its header (names, types, shapes) and the
    first, middle and last 4 KiB of its tensors, of at most 4,096 in a file: milliseconds for any size, and a model that was
    tuned, merged or converted since differs in every matrix. It does not see single numbers changed in between.
    A random model's covers what it is made from: its config and the seed.
    """
    reference: dict[str, Any] = {"path": model.path, "revision": model.revision}
    if is_builtin(model) or model.init == "random":
        values = {key: value for key, value in load_config(model, base).to_dict().items() if key not in _ELSEWHERE}
        words = json.dumps([values, seed], sort_keys=True, default=str).encode()
        return reference | {"seed": seed, "sha256": hashlib.sha256(words).hexdigest()}
    return reference | {"sha256": weights_digest(model_directory(model, base))}


def weights_digest(directory: Path) -> str:
    """The hash of a model directory, as `base_reference` says. Raises ConfigError where it has no weights, or broken ones."""
    place = directory / "config.json"
    try:
        digest = hashlib.sha256(place.read_bytes())
        for place in [directory / name for name in WeightFiles(directory).files()]:
            with place.open("rb") as file:
                for part in _samples(file):
                    digest.update(part)
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(Problem(str(place), f"cannot be read: {error}")) from None
    return digest.hexdigest()


def require_same(recorded: Mapping[str, Any] | None, now: Mapping[str, Any], where: str) -> None:
    """Raises ConfigError where what a checkpoint or an adapter was trained on is not what the model is `now`."""
    if recorded is None or recorded.get("sha256") == now["sha256"]:
        return
    problem = Problem(
        where,
        f"was trained on {_words(recorded)}; the model is now {_words(now)}",
        "the same base model, unchanged",
        "An adapter means nothing beside other weights: bring the model back as it was (a hub id with its revision).",
    )
    raise ConfigError(problem)


def _words(reference: Mapping[str, Any]) -> str:
    revision = f" at {reference['revision']}" if reference.get("revision") else ""
    return f"{reference['path']}{revision} with hash {str(reference['sha256'])[:12]}"


def _samples(file: BinaryIO) -> Iterator[bytes]:
    size = os.fstat(file.fileno()).st_size
    length = min(int.from_bytes(file.read(8), "little"), _LONGEST_HEADER)
    header = file.read(length)
    yield f"{size}/{length}/".encode() + header
    tensors = [value["data_offsets"] for name, value in json.loads(header).items() if name != "__metadata__"]
    every = -(-len(tensors) // _MOST_SAMPLED) or 1
    for begin, end in tensors[::every]:
        places = {begin, (begin + end) // 2, max(begin, end - _SAMPLE_BYTES)}
        for place in sorted(places):
            file.seek(8 + length + place)
            yield file.read(min(_SAMPLE_BYTES, end - place))
