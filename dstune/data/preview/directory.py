"""A prepared directory by itself, without its run file."""

from pathlib import Path
from typing import Any

from dstune.config.schema import ModelSection
from dstune.data.shards import Prepared
from dstune.data.tokenizer_files import load_tokenizer
from dstune.errors import Problem, UsageError


def opened(directory: str | Path) -> tuple[Prepared, Any]:
    """A prepared directory and its tokenizer. Raises DataError for no prepared directory, UsageError without the tokenizer."""
    prepared = Prepared.open(directory)
    about = prepared.manifest["tokenizer"]
    named = about["path"]
    if not Path(named).is_dir() and not named.startswith("builtin:"):
        do = "preview the run file instead"
        raise UsageError(Problem(str(directory), f"its tokenizer ({named}) is not here", do=do))
    return prepared, load_tokenizer(ModelSection(path=named, new_tokens=about.get("new_tokens", {})), Path.cwd())
