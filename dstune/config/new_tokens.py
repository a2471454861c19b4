"""`model.new_tokens` of the run file."""

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, StringConstraints, field_validator, model_validator

from dstune.config.section import SECTION

Spelling = Annotated[str, StringConstraints(min_length=1, max_length=1000)]


class NewTokensSection(BaseModel):
    """Tokens that the model's tokenizer does not have, added behind its own in this order."""

    model_config = SECTION

    plain: list[Spelling] = []
    """Found wherever text spells them."""
    special: list[Spelling] = []
    """Control tokens, which a template writes; spelled in text they stay text (`data.control_tokens`)."""

    def written(self) -> Iterator[tuple[str, bool]]:
        """Every token and whether it is special, in the order of their ids."""
        yield from ((token, False) for token in self.plain)
        yield from ((token, True) for token in self.special)

    def __bool__(self) -> bool:
        return bool(self.plain or self.special)

    @field_validator("plain", "special")
    @classmethod
    def _more_than_blanks(cls, tokens: list[str]) -> list[str]:
        for token in tokens:
            if token != token.strip():
                raise ValueError(f"{token!r} begins or ends with blanks, which tokenizers strip or count as their own")
        return tokens

    @model_validator(mode="after")
    def _each_once(self) -> "NewTokensSection":
        tokens = [token for token, _ in self.written()]
        twice = sorted({token for token in tokens if tokens.count(token) > 1})
        if twice:
            raise ValueError(f"{', '.join(map(repr, twice))} stands there twice")
        return self


def _listed(written: Any) -> Any:
    return {"plain": written} if isinstance(written, list) else written


NewTokens = Annotated[
    NewTokensSection, BeforeValidator(_listed, json_schema_input_type=NewTokensSection | list[Spelling])
]
"""A list means plain tokens."""
