"""dstune: instruction tuning with DeepSpeed ZeRO-3 on Ray, from packed Arrow shards, with exact resumes.

Every command is a function here: `dstune.prepare(run)`, `dstune.training(run)`, … (see `dstune.api`). Nothing heavy is
imported before one is used.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_FUNCTIONS = (
    "chat",
    "checkpoints",
    "evaluate",
    "export",
    "import_deepspeed",
    "init",
    "logs",
    "plan",
    "prepare",
    "preview",
    "prune_checkpoints",
    "resume",
    "schema",
    "select",
    "status",
    "stop",
    "submit",
    "train",
    "verify_checkpoints",
)

__all__ = ["__version__"]
__all__ += list(_FUNCTIONS)


def __getattr__(name: str) -> Any:
    if name in _FUNCTIONS:
        return getattr(importlib.import_module("dstune.api"), name)
    raise AttributeError(f"module 'dstune' has no attribute {name!r}")
