"""The cleaning steps by name."""

from dstune.data.cleaning.normal import ControlCharacters, Unicode, Whitespace
from dstune.data.cleaning.step import Step

STEPS: dict[str, type[Step]] = {
    step.name: step
    for step in (
        Unicode,
        Whitespace,
        ControlCharacters,
    )
}
