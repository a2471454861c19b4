"""What is left of a web page in a text: entities and tags."""

import html
import re
from html.entities import html5
from typing import ClassVar

from dstune.data.cleaning.step import Step, edited, outside_code
from dstune.data.conversation import Conversation

_SUBJECT = re.compile(
    r"\b(?:x?html5?|xml|css|svg|jsx|dom|markup|tags?|entit(?:y|ies)|javascript|react|vue|php|web ?(?:site|page)s?)\b|标签|网页|网站"
    r"|<!doctype|<\?xml|<(?:html|head|body|script|style|form|input|button|table|svg|meta|link|img|template)\b",
    re.IGNORECASE,
)
_ATTRIBUTES = r"""(?:\s{1,9}[a-z-]{1,30}=(?:"[^"<>]{0,500}"|'[^'<>]{0,500}'|[^\s"'<>]{1,500})){0,9}\s{0,9}/?>"""
_BREAKS = ("br", "p", "div", "li", "ul", "ol", "hr", "blockquote", "center", "h1", "h2", "h3", "h4", "h5", "h6")
_INLINE = ("b", "i", "u", "em", "strong", "span", "font", "a", "small", "big", "strike", "nobr", "tt")
_UNPAIRED = frozenset(("br", "hr"))
_TAG = re.compile(rf"<(/?)({'|'.join(_BREAKS + _INLINE)}){_ATTRIBUTES}", re.IGNORECASE)
_ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,30});")
_LEFTOVER = re.compile(r"</?[A-Za-z]|&#?[A-Za-z0-9]{1,31};")
_SPAN = re.compile(r"(`[^`\n]*`)")


class Html(Step):
    """Entities become what they stand for (`&quot;`, `&#39;`), and leftover formatting tags (`<br>`, `<p>`, `<b>…</b>`, `<span …>`) go;
    a tag that starts a new line leaves one. In every turn, outside fenced and `inline` code.

    Only known tags in a well-formed spelling, and of those that come in pairs only pairs: `a < b`, `List<T>` and XML survive. A
    conversation that is about markup or the web (it says HTML, XML, CSS, tag, …) stays as it is.
    """

    name: ClassVar[str] = "html"

    def apply(self, conversation: Conversation) -> Conversation:
        texts = [message.content for message in conversation.messages]
        if not any(map(_LEFTOVER.search, texts)) or any(map(_SUBJECT.search, texts)):
            return conversation
        return edited(conversation, lambda text: outside_code(text, _without_markup))


def _without_markup(text: str) -> str:
    if "&" not in text and "<" not in text:
        return text
    parts = _SPAN.split(text)
    prose = "".join(parts[::2]).lower()
    paired = {name for name in _BREAKS + _INLINE if f"<{name}" in prose and f"</{name}>" in prose} | _UNPAIRED
    parts[::2] = [_plain(part, paired) for part in parts[::2]]
    return "".join(parts)


def _plain(text: str, known: set[str]) -> str:
    def tag(match: re.Match[str]) -> str:
        name = match[2].lower()
        if name not in known:
            return match[0]
        return "\n" if name in _BREAKS and (name == "br" or not match[1]) else ""

    return _ENTITY.sub(_character, _TAG.sub(tag, text))


def _character(entity: re.Match[str]) -> str:
    """What an entity stands for; itself where no such entity is known. A non-breaking blank becomes a blank."""
    written = entity[0]
    meant = html.unescape(written).replace("\u00a0", " ")
    known = meant.isprintable() and "\ufffd" not in meant if written[1] == "#" else written[1:] in html5
    return meant if known else written
