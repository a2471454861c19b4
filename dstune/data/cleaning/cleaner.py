"""The cleaning steps of a run file, over one conversation after another."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from dstune.data.cleaning.registry import STEPS
from dstune.data.cleaning.step import Step
from dstune.data.conversation import Conversation
from dstune.errors import ConfigError, Problem


@dataclass(frozen=True)
class Cleaned:
    """A conversation that went through all steps."""

    conversation: Conversation
    changed: tuple[str, ...]
    """The steps that changed it, in order."""
    flagged: tuple[str, ...]
    """What a step points at without a change, `personal_data_email`."""


class Cleaner:
    """The steps that `data.clean` lists, in its order: pure, picklable, the same in every process."""

    def __init__(self, steps: Sequence[str | Mapping[str, Any]]) -> None:
        """Raises ConfigError with every unknown step and setting."""
        made = [_made(written, f"data.clean[{number}]") for number, written in enumerate(steps)]
        problems = [problem for one in made if isinstance(one, list) for problem in one]
        if problems:
            raise ConfigError(problems)
        self._steps = tuple(one for one in made if isinstance(one, Step))

    def __bool__(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._steps)

    def clean(self, conversation: Conversation) -> Cleaned:
        """`conversation` after all steps. Raises Refused (`clean_refusals`, …) where one drops it."""
        changed: list[str] = []
        flagged: list[str] = []
        for step in self._steps:
            flagged += step.flags(conversation)
            after = step.apply(conversation)
            if after is not conversation:
                changed.append(step.name)
            conversation = after
        return Cleaned(conversation, tuple(dict.fromkeys(changed)), tuple(dict.fromkeys(flagged)))

    def described(self) -> list[dict[str, Any]]:
        """For the manifest: each step with all its settings, in order."""
        return [{step.name: step.described()} for step in self._steps]


def _made(written: str | Mapping[str, Any], where: str) -> Step | list[Problem]:
    if not isinstance(written, str) and len(written) != 1:
        return [Problem(where, f"{len(written)} keys", "one step: a name, or `{name: {setting: value}}`")]
    name, settings = (written, None) if isinstance(written, str) else next(iter(written.items()))
    if name not in STEPS:
        return [Problem(where, f"unknown cleaning step {name!r}", do=_nearest(name, STEPS))]
    if settings is not None and not isinstance(settings, Mapping):
        return [Problem(f"{where}.{name}", f"{settings!r}", "settings: `{setting: value}`")]
    try:
        return STEPS[name].model_validate(dict(settings or {}))
    except ValidationError as error:
        return [_problem(detail, f"{where}.{name}", STEPS[name]) for detail in error.errors(include_url=False)]


def _problem(detail: Any, where: str, step: type[Step]) -> Problem:
    setting = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return Problem(where, f"unknown setting {setting!r}", do=_nearest(setting, step.model_fields))
    if detail["type"] == "missing":
        return Problem(where, f"{setting!r} is missing", do=step.model_fields[setting].description or "")
    expected = str(detail["msg"]).removeprefix("Input should be ").removeprefix("Value error, ")
    came = f"{setting} is {detail['input']!r}" if setting else "the settings"
    return Problem(where, came[:200], expected)


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}" if known else "it has no settings"
