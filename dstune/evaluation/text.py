"""From an answer as the model wrote it to what a metric compares: extraction, normalisation, tokens of any script."""

import re
import string
import unicodedata
from collections.abc import Callable, Iterable
from decimal import Decimal, InvalidOperation

_ARTICLES = re.compile(r"\b(a|an|the)\b")
# Scripts written without spaces: kana, Han with its extensions and compatibility forms, Thai, Lao, Khmer, Burmese.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\uff66-\uff9f\U00020000-\U0003ffff"
)
_UNSPACED_CHARACTER = re.compile(f"[{_UNSPACED}]")
_TOKEN = re.compile(rf"[{_UNSPACED}]|(?:(?![{_UNSPACED}_])\w)+")
_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_KANA_OR_SOUTH_EAST_ASIAN = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff]")
_MOSTLY = 0.3


def extract(text: str, pattern: re.Pattern[str] | None, last: bool = True) -> str | None:
    """The part of `text` that `pattern` picks: its group 1, or the whole match where it has none. None: not in there."""
    if pattern is None:
        return text
    found = pattern.search(text)
    if found is None:
        return None
    if last:
        *_, found = pattern.finditer(text)
    return (found.group(1) or "") if pattern.groups else found.group(0)


def _strip(text: str) -> str:
    return " ".join(text.split())


def _lower(text: str) -> str:
    return _strip(text).casefold()


def _squad(text: str) -> str:
    """SQuAD's own script: lower case, no punctuation, no English articles; here punctuation of every script."""
    kept = "".join(
        character
        for character in text.lower()
        if character not in string.punctuation and not unicodedata.category(character).startswith("P")
    )
    return _strip(_ARTICLES.sub(" ", kept))


def _number(text: str) -> str:
    """`$1,200.50` and `1200.5` are one number; what is none stays as it is, stripped."""
    plain = unicodedata.normalize("NFKC", _strip(text)).replace(",", "").rstrip(".").removeprefix("$").strip()
    try:
        value = Decimal(plain)
    except InvalidOperation:
        return _strip(text)
    return format(value.normalize() + 0, "f") if value.is_finite() else _strip(text)


NORMALISERS: dict[str, Callable[[str], str]] = {
    "none": str,
    "strip": _strip,
    "lower": _lower,
    "squad": _squad,
    "number": _number,
}
"""By the name a tasks file gives."""


def words(text: str) -> list[str]:
    """Lower-case tokens: runs of letters and digits, and each character of a script that is written without spaces.

    For ASCII text exactly rouge_score's own tokens. "Das Café, 北京2008" -> das, café, 北, 京, 2008.
    """
    return _TOKEN.findall(text.lower())


def squad_tokens(text: str) -> list[str]:
    """The tokens of SQuAD's F1 in a normalised text: split at spaces, and around each character of an unspaced script."""
    return _UNSPACED_CHARACTER.sub(r" \g<0> ", text).split()


def bleu_tokenizer(references: Iterable[str]) -> str:
    """sacreBLEU's tokenizer for these references: `zh` where Han characters abound, `char` for kana, Thai, …, else `13a`."""
    letters = han = other = 0
    for text in references:
        letters += sum(map(str.isalpha, text))
        han += len(_HAN.findall(text))
        other += len(_KANA_OR_SOUTH_EAST_ASIAN.findall(text))
    if other > _MOSTLY * letters or (other > 0.1 * letters and han + other > _MOSTLY * letters):
        return "char"
    return "zh" if han > _MOSTLY * letters else "13a"
