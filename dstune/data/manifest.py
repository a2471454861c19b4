"""`manifest.json` of a prepared directory, and the identity that names the directory: what goes in decides what comes out."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dstune.config.schema import RunConfig, Source
from dstune.data.inputs import Input
from dstune.data.shards import FORMAT_VERSION

PREPARATION_VERSION = 3
"""Raised when the same inputs and settings give other tokens, masks or rows than before: old directories are not taken then."""


@dataclass(frozen=True)
class Identity:
    """Everything that the content of a prepared directory depends on, in the words of its manifest."""

    tokenizer: Mapping[str, Any]
    template: Mapping[str, Any]
    settings: Mapping[str, Any]
    sources: Sequence[Mapping[str, Any]]
    validation_sources: Sequence[Mapping[str, Any]]

    def digest(self) -> str:
        """SHA-256 of all of it."""
        content = {
            "format": FORMAT_VERSION,
            "preparation": PREPARATION_VERSION,
            "tokenizer": self.tokenizer,
            "template": self.template,
            "settings": self.settings,
            "sources": self.sources,
            "validation_sources": self.validation_sources,
        }
        text = json.dumps(content, sort_keys=True, ensure_ascii=False, allow_nan=False)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def settings(config: RunConfig, seq2seq: bool, packing: bool) -> dict[str, Any]:
    """The settings that decide what is prepared. The seed is among them where something is drawn by it."""
    data = config.data
    held_out: Sequence[Source] = data.validation if isinstance(data.validation, list) else ()
    drawn = any(source.repeat % 1 for source in [*data.sources, *held_out]) or data.temperature != 1
    drawn = drawn or not isinstance(data.template, str)
    return {
        "template": data.template,
        "max_length": data.max_length,
        "packing": packing,
        "seq2seq": seq2seq,
        "train_on": data.train_on,
        "turns": data.turns,
        "overlong": data.overlong,
        "control_tokens": data.control_tokens,
        "bad_rows": data.bad_rows,
        "lossy_text": data.lossy_text,
        "max_record_bytes": data.max_record_bytes,
        "temperature": data.temperature,
        "validation": "sources" if isinstance(data.validation, list) else data.validation,
        "seed": config.train.seed if drawn or (data.validation and not held_out) else None,
    }


def described(sources: Sequence[Source], inputs: Sequence[Input]) -> list[dict[str, Any]]:
    """Each source as the run file writes it, with the hashes of its files."""
    return [
        {
            **source.model_dump(mode="json"),
            "files": [{"path": one.file.name, "sha256": one.sha256} for one in inputs if one.source == number],
            **_resolved(source, [one.file.source for one in inputs if one.source == number]),
        }
        for number, source in enumerate(sources)
    ]


def _resolved(source: Source, read_as: Sequence[Source]) -> dict[str, Any]:
    """What a registry made of a source: its columns decide what comes out as much as the run file's own."""
    resolved = [one.model_dump(mode="json") for one in read_as[:1] if one != source]
    return {"read_as": resolved[0]} if resolved else {}


def counts(
    lengths: npt.NDArray[np.int32],
    supervised: npt.NDArray[np.int32],
    epoch: npt.NDArray[np.int32],
    num_rows: int,
    max_length: int,
) -> dict[str, Any]:
    """What is stored, and what one epoch takes of it. lengths, supervised: [examples]; epoch: example numbers of an epoch.

    `fill`: share of the rows' room that holds tokens. `epoch_squared_lengths`: sum of the squared lengths (attention's cost).
    """
    histogram = np.bincount(lengths[epoch])
    sizes = np.arange(len(histogram))
    tokens = int((histogram * sizes).sum())
    return {
        "examples": len(lengths),
        "rows": num_rows,
        "tokens": int(lengths.sum(dtype=np.int64)),
        "supervised_tokens": int(supervised.sum(dtype=np.int64)),
        "fill": round(tokens / (num_rows * max_length), 6),
        "epoch_examples": len(epoch),
        "epoch_tokens": tokens,
        "epoch_supervised_tokens": int(supervised[epoch].sum(dtype=np.int64)),
        "epoch_squared_lengths": int((histogram * sizes**2).sum()),
    }
