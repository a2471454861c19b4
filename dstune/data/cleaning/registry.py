"""The cleaning steps by name, and what `dstune schema --cleaning` says about them."""

from typing import Any

from dstune.data.cleaning.bounds import Length, Ratio
from dstune.data.cleaning.language import Language
from dstune.data.cleaning.markup import Html
from dstune.data.cleaning.normal import ControlCharacters, Unicode, Whitespace
from dstune.data.cleaning.personal import PersonalData
from dstune.data.cleaning.placeholders import Placeholders
from dstune.data.cleaning.refusals import Refusals
from dstune.data.cleaning.step import Step

_ORDERED: tuple[type[Step], ...] = (
    Unicode,
    ControlCharacters,
    Html,
    Whitespace,
    Placeholders,
    Refusals,
    Length,
    Ratio,
    Language,
    PersonalData,
)
STEPS: dict[str, type[Step]] = {step.name: step for step in _ORDERED}
"""In the order in which most data wants them; the run file's order decides."""


def described() -> dict[str, Any]:
    """Each step's JSON Schema: what it does, its settings, their meaning and defaults."""
    return {name: step.model_json_schema() for name, step in STEPS.items()}
