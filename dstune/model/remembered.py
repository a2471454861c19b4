"""What an experiment finds of an architecture is found once in a process: remembered by its config's class and content."""

import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from transformers import PretrainedConfig

P = ParamSpec("P")
T = TypeVar("T")
_KEPT = 32


class Remembered(Generic[P, T]):
    """`find(config, …)` with each answer kept; what follows the config can be hashed. `find` gets a config of its own."""

    def __init__(self, find: Callable[Concatenate[PretrainedConfig, P], T]) -> None:
        asked: Any = find

        @lru_cache(maxsize=_KEPT)
        def found(kind: type[PretrainedConfig], written: str, *rest: Any) -> T:
            return asked(kind.from_dict(json.loads(written)), *rest)

        self._found = found
        self.cache_clear = found.cache_clear

    def __call__(self, config: PretrainedConfig, *rest: P.args, **named: P.kwargs) -> T:
        assert not named, "by position alone"
        return self._found(type(config), json.dumps(config.to_dict(), sort_keys=True, default=str), *rest)
