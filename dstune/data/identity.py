"""What an encoding depends on, as hashes: two equal fingerprints give equal examples from equal conversations."""

import hashlib
import json
from datetime import datetime
from typing import Any

import jinja2
import tokenizers

from dstune.data.templates import Template

ENCODING_VERSION = "2"
"""Raised whenever the same conversation would become other tokens or another mask."""


def fingerprint(tokenizer: Any, template: Template, now: datetime, seed: int = 0) -> dict[str, dict[str, Any]]:
    """`tokenizer` and `template`, each with its `sha256`; versions, the day where the template tells it, the seed where it draws."""
    settings = json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
    source = template.source + "\0" + (template.tool_source or "")
    about: dict[str, Any] = {
        "name": template.name,
        "sha256": _sha256(source),
        "encoding": ENCODING_VERSION,
        "jinja2": jinja2.__version__,
    }
    if "strftime_now" in source:
        about["day"] = now.strftime("%Y-%m-%d")
    if template.num_variants > 1:
        about["seed"] = seed
    return {
        "tokenizer": {
            "sha256": _sha256(tokenizer.backend_tokenizer.to_str() + settings),
            "size": len(tokenizer),
            "tokenizers": tokenizers.__version__,
        },
        "template": about,
    }


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
