"""Conversations in languages that are not wanted."""

import re
from functools import cache
from importlib.metadata import version
from typing import Any, ClassVar

from pydantic import Field, field_validator

from dstune.data.cleaning.step import Step, without_code
from dstune.data.conversation import Conversation

_MOST_CHARACTERS = 800
_NO_LANGUAGE = re.compile(r"https?://\S+|`[^`\n]*`|[\d\W_]+")
_CODE_SIGNS = re.compile(r"[{}()\[\]<>=;:_/\\|&+*$#@^~]")
_CODE_SHARE = 0.05


class Language(Step):
    """Drops conversations that are certainly in a language other than those to keep. What user and assistant say is looked at, each
    side by itself, or a document; short texts, fenced code and what looks like code or maths have no language and are left alone."""

    name: ClassVar[str] = "language"
    keep: list[str] = Field(min_length=1)
    """Languages by their two letters (ISO 639-1): `[en, zh]`."""
    min_confidence: float = Field(default=0.999, gt=0, le=1)
    """How sure the detector (py3langid, after Lui and Baldwin 2012) must be that it is none of these languages."""
    min_characters: int = Field(default=60, ge=1)
    """Letters that a text must have to be looked at; a character of Chinese, Japanese or Korean counts as three."""

    @field_validator("keep")
    @classmethod
    def _known(cls, keep: list[str]) -> list[str]:
        if unknown := [language for language in keep if language not in _detector().labels]:
            known = ", ".join(sorted(_detector().labels))
            raise ValueError(f"{', '.join(unknown)} unknown; one of {known}")
        return keep

    def described(self) -> dict[str, Any]:
        return {**super().described(), "detector": f"py3langid {version('py3langid')}"}

    def apply(self, conversation: Conversation) -> Conversation:
        for role in ("user", "assistant", "document"):
            text = "\n".join(turn.content for turn in conversation.messages if turn.role == role)
            self._check(role, without_code(text)[:_MOST_CHARACTERS])
        return conversation

    def _check(self, role: str, text: str) -> None:
        if len(_CODE_SIGNS.findall(text)) > _CODE_SHARE * len(text):
            return
        bare = _NO_LANGUAGE.sub(" ", text).strip()
        if sum(3 if character >= "\u3040" else character != " " for character in bare) < self.min_characters:
            return
        ranked: list[tuple[str, float]] = _detector().rank(bare)
        confidence = 1 - sum(share for language, share in ranked if language in self.keep)
        if confidence >= self.min_confidence:
            kept = " or ".join(self.keep)
            raise self.refuse(
                f"the {role}'s text is not in {kept} ({confidence:.3f} sure) but likely in {ranked[0][0]}"
            )


@cache
def _detector() -> Any:
    """The model that comes with py3langid, read once per process (0.3 s)."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
