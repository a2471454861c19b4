"""What every part of a run file has in common."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of the run file: typed, frozen, no unknown keys, documented under each field."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, use_attribute_docstrings=True)
