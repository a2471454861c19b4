"""What every part of a run file has in common."""

from pydantic import ConfigDict

SECTION = ConfigDict(extra="forbid", frozen=True, strict=False, use_attribute_docstrings=True)
"""Typed, frozen, no unknown keys, documented under each field."""
