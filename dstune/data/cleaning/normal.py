"""Steps that write the same text in one way: Unicode, white space, control characters."""

import re
import unicodedata
from typing import ClassVar, Literal

from pydantic import Field

from dstune.data.cleaning.step import Step, edited, outside_code
from dstune.data.conversation import Conversation


class Unicode(Step):
    """One way to write each character, in every turn, outside fenced code."""

    name: ClassVar[str] = "unicode"
    form: Literal["NFC", "NFKC"] = "NFC"
    """NFC joins letters with their accents and changes no meaning. NFKC also turns full-width letters and ligatures into plain ones, but
    ruins maths and code: x² becomes x2, ½ becomes 1⁄2, … becomes three dots, and Chinese punctuation becomes ASCII."""

    def apply(self, conversation: Conversation) -> Conversation:
        return edited(conversation, self._normal)

    def _normal(self, text: str) -> str:
        if text.isascii() or unicodedata.is_normalized(self.form, text):
            return text
        return outside_code(text, lambda part: unicodedata.normalize(self.form, part))


_RUN = re.compile(r"(?<=[^ \u00a0])[ \u00a0]{2,}(?=[^ \u00a0])")
_UNTIDY = re.compile("[ \t\u00a0][ \u00a0\n]|\r")
_COUNTED = re.compile(r"[\t|`]|^ {4}|(?<=[^ ])[ \u00a0]{3,}[^ ].*[^ ][ \u00a0]{3,}[^ ]|[;{}]$|[^=]=[^=]")
"""A line whose blanks may count: columns, and what looks like code outside a fence."""


class Whitespace(Step):
    """Fewer blanks, in every turn: none at the ends, one between words, few empty lines; line ends as \\n.

    Indentation, fenced code, lines that look like code or rows of a table, and Markdown's two blanks at the end of a line stay.
    """

    name: ClassVar[str] = "whitespace"
    max_blank_lines: int = Field(default=2, ge=0)
    """Empty lines that may follow each other outside code."""

    def apply(self, conversation: Conversation) -> Conversation:
        return edited(conversation, self._trimmed)

    def _trimmed(self, text: str) -> str:
        if text == text.strip() and not _UNTIDY.search(text) and "\n" * (self.max_blank_lines + 2) not in text:
            return text
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        text = outside_code(text, self._squeezed).rstrip()
        start = len(text) - len(text.lstrip())
        first_line = text.rfind("\n", 0, start) + 1
        indented = text.find("\n ", start) >= 0 or text.find("\n\t", start) >= 0
        return text[first_line if indented else start :]

    def _squeezed(self, text: str) -> str:
        lines: list[str] = []
        empty = 0
        for line in text.split("\n"):
            bare = line.rstrip(" \t\u00a0")
            empty = 0 if bare else empty + 1
            if empty <= self.max_blank_lines:
                lines.append(_one_blank(bare) + ("  " if bare and line[len(bare) :] == "  " else ""))
        return "\n".join(lines)


def _one_blank(line: str) -> str:
    return line if ("  " not in line and "\u00a0" not in line) or _COUNTED.search(line) else _RUN.sub(" ", line)


_WINDOWS = {code: bytes([code]).decode("cp1252", "ignore") for code in range(0x80, 0xA0)}
"""What Windows means by the control codes from 0x80: a text that has them was decoded wrongly."""
_ESCAPES = re.compile(r"\x1b\[[0-9;?]{0,32}[A-Za-z]")
_LINE_ENDS = re.compile("[\x0b\x0c\u2028\u2029]")
_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f\u00ad\u200b\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff\ufff9-\ufffb]"
    "|(?<![\U0001f3f4\U000e0020-\U000e007f])[\U000e0000-\U000e007f]+"
)


class ControlCharacters(Step):
    """Characters that nobody sees are removed from every turn, code included: control codes, terminal colours, byte order marks,
    zero-width spaces, soft hyphens, switches of direction, tags. Line and page separators become line ends; codes from 0x80 to 0x9F
    become the dashes and quotes that Windows means by them.

    Tabs and line ends stay, and what joins emoji and Indic, Persian or Arabic letters.
    """

    name: ClassVar[str] = "control_characters"

    def apply(self, conversation: Conversation) -> Conversation:
        return edited(conversation, _visible)


_SUSPECT = re.compile(
    "[^\t\n\r -~\u00a1-\u00ac\u00ae-\u1fff\u2010-\u2027\u2030-\u205f\u2070-\ufefe\uff00-\ufff8\U00010000-\U000dffff]"
)


def _visible(text: str) -> str:
    if not _SUSPECT.search(text):
        return text
    return _INVISIBLE.sub("", _LINE_ENDS.sub("\n", _ESCAPES.sub("", text).translate(_WINDOWS)))
