"""What personal data and secrets look like: patterns that are confirmed by check digits or by what stands around them.

Every pattern takes time in proportion to the text: repetitions are bounded, and start where their like has not just begun.
"""

import ipaddress
import re
from collections.abc import Callable
from typing import Literal

Kind = Literal["email", "phone", "credit_card", "iban", "ip", "api_key", "private_key"]
Confirm = Callable[[re.Match[str]], bool]

_DOMAINS = "|".join(
    (
        "com|org|net|edu|gov|mil|int|info|biz|name|pro|app|dev|xyz|online|site|tech|store|cloud|email|asia|mobi|jobs",
        "travel|museum|[a-z]{2}",
    )
)
_EMAIL = re.compile(
    r"(?<![\w.%+/@-])[\w%+-]{1,64}(?:\.[\w%+-]{1,64}){0,8}@(?:[a-z0-9-]{1,63}\.){1,6}(?:"
    + _DOMAINS
    + r")\b(?![(\[@=]|:[\w/~])",
    re.IGNORECASE | re.ASCII,
)
_NO_PERSONS = re.compile(
    r"@(?:[a-z0-9-]{1,63}\.){0,5}(?:example|test|invalid|localhost|domain|email|your-?\w{1,20})\.|^git@", re.IGNORECASE
)

_PHONE = re.compile(
    r"(?<![\w.+-])(?:"
    r"\+[1-9]\d{0,2}(?:[ .-]?\(\d{1,4}\))?(?:[ .-]?\d){6,12}"  # +49 30 1234567
    r"|\([2-9]\d{2}\) ?[2-9]\d{2}[ .-]\d{4}"  # (415) 555-2671
    r"|(?:1[ .-])?[2-9]\d{2}([.-])[2-9]\d{2}\1\d{4}"  # 415-555-2671
    r"|(0\d{2,3}-)\d{7,8}"  # 010-12345678
    r"|1[3-9]\d[ -]?\d{4}[ -]?\d{4}|[2-9]\d{2} [2-9]\d{2} \d{4}"  # 138 1234 5678, 415 555 2671
    r")(?![\w+]|[.-]\d)",
    re.ASCII,
)
_CALL = re.compile(
    r"phone|tel\b|tel[.:]|mobile|call|cell|fax|whatsapp|contact|电话|手机|联系|致电|传真|微信|热线", re.IGNORECASE
)
_CALL_WITHIN = 40
_OPERATORS = "=*/^<>)]}0123456789"

_CARD = re.compile(
    r"(?<![\w.,-])(?<!\d{4} )(?:\d{13,19}|\d{4}([ -])\d{4}\1\d{4}\1\d{4}|\d{4}([ -])\d{6}\2\d{5})(?![\w-]|[.,]\d| \d{4}(?!\d))",
    re.ASCII,
)
_ISSUED = re.compile(
    r"4\d{12}(?:\d{3})?|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}|3[47]\d{13}|6(?:011|5\d\d|4[4-9]\d)\d{12}|62\d{14}"
)

_IBAN = re.compile(
    r"(?<![\w-])[A-Z]{2}\d{2}(?:[A-Z0-9]{11,30}"
    r"| [A-Z0-9]{4}(?: (?=[A-Z0-9]{0,3}\d)[A-Z0-9]{4}){1,6}(?: (?=[A-Z0-9]{0,2}\d)[A-Z0-9]{1,3})?)(?![\w-])",
    re.ASCII,
)
"""In one piece or in fours; a bank's code behind it, which has no digits, is not part of it."""

_IP = re.compile(
    r"(?<![\w.:/-])(?:(?:\d{1,3}\.){3}\d{1,3}(?![\w-]|\.\d)|(?:[0-9a-f]{1,4}:){2,7}(?::?[0-9a-f]{1,4}){1,7}(?![\w:]))",
    re.IGNORECASE | re.ASCII,
)
_VERSION = re.compile(r"(?:\bv|version|release|build|ver\.?|section|版本|第)\s{0,2}$", re.IGNORECASE)

_KEY = re.compile(
    r"(?<![\w-])(?:"
    r"sk-[\w-]{20,200}|sk_live_\w{16,100}|gh[pousr]_[A-Za-z0-9]{36}|github_pat_\w{22,100}|glpat-[\w-]{20}|(?:AKIA|ASIA)[0-9A-Z]{16}"
    r"|AIza[\w-]{35}|xox[abprs]-[\w-]{10,200}|hf_[A-Za-z0-9]{30,40}|npm_[A-Za-z0-9]{36}|pypi-[\w-]{50,300}|SG\.[\w-]{22}\.[\w-]{43}"
    r"|eyJ[\w-]{10,2000}\.eyJ[\w-]{10,4000}\.[\w-]{20,1000}"
    r"|(?i:(?:[a-z]{1,20}_){0,3}(?:(?:api|access|secret|auth)[_-]?(?:key|token)|secret|password|token)[\"']?\s?[:=]\s?)"
    r"[\"']([\w+/=.-]{20,200})[\"']"
    r")(?![\w-])",
    re.ASCII,
)
_KEY_NAME = r"(?:[A-Z0-9]{2,12} ){0,3}PRIVATE KEY(?: BLOCK)?-----"
_PRIVATE_KEY = re.compile(
    rf"-----BEGIN {_KEY_NAME}(?:(?:(?!-----).){{40,20000}}-----END {_KEY_NAME}|(?:\s{{1,2}}[A-Za-z0-9+/=]{{16,76}})*)",
    re.DOTALL,
)
"""Up to its end; where that is missing, as far as it looks like one."""


def _email(found: re.Match[str]) -> bool:
    return not _NO_PERSONS.search(found[0])


def _phone(found: re.Match[str]) -> bool:
    """Numbers in a spelling that nothing else has; barer ones, and behind an operator, only where someone is to be called."""
    before = found.string[max(0, found.start() - _CALL_WITHIN) : found.start()]
    if found[0].startswith("("):
        return True
    if found[0].startswith("+") or found[1] or found[2]:
        digits = sum(character.isdigit() for character in found[0])
        if digits >= 8 and before.rstrip()[-1:] not in tuple(_OPERATORS):
            return True
    return bool(_CALL.search(before) or _CALL.search(found.string[found.end() : found.end() + _CALL_WITHIN // 2]))


def _card(found: re.Match[str]) -> bool:
    digits = re.sub(r"\D", "", found[0])
    return bool(_ISSUED.fullmatch(digits)) and _luhn(digits)


def _luhn(digits: str) -> bool:
    """ISO/IEC 7812-1, annex B: from the right, every second digit doubled; the sum of all digits divides by ten."""
    doubled = [sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2]]
    return (sum(map(int, digits[-1::-2])) + sum(doubled)) % 10 == 0 and len(set(digits)) > 2


def _iban(found: re.Match[str]) -> bool:
    """ISO 13616: the country and check digits behind the account, letters as 10 to 35, leave 1 when divided by 97."""
    number = found[0].replace(" ", "")
    return 15 <= len(number) <= 34 and int("".join(str(int(sign, 36)) for sign in number[4:] + number[:4])) % 97 == 1


def _ip(found: re.Match[str]) -> bool:
    """Public addresses that are no version numbers and not the documentation's."""
    written = found[0]
    try:
        address = ipaddress.ip_address(written)
    except ValueError:
        return False
    if not address.is_global or address.is_multicast:
        return False
    if address.version == 6:
        groups = [group for group in written.split(":") if group]
        return len(groups) >= 4 and any(character.isdigit() for character in written)
    before = found.string[max(0, found.start() - 12) : found.start()]
    return max(address.packed) >= 32 and not _VERSION.search(before)


def _key(found: re.Match[str]) -> bool:
    """Not `sk-xxxxxxxx` nor a word: letters, digits, and many different ones."""
    secret = found[1] or found[0]
    return any(map(str.isdigit, secret)) and any(map(str.isalpha, secret)) and len(set(secret)) >= 10


def _certain(found: re.Match[str]) -> bool:
    return True


_KEY_STARTS = (
    *("sk-", "sk_live_", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "glpat-", "AKIA", "ASIA", "AIza"),
    *(
        "xox",
        "hf_",
        "npm_",
        "pypi-",
        "SG.",
        "eyJ",
        "key",
        "token",
        "secret",
        "password",
        "KEY",
        "TOKEN",
        "SECRET",
        "PASSWORD",
    ),
)
_ADDRESS = re.compile(r"\d\.\d{1,3}\.\d|:[0-9a-fA-F]{0,4}:")
_LONG_NUMBER = re.compile(r"\d[\d ().-]{5}")
_ACCOUNT = re.compile(r"\d{2} ?[A-Z0-9]{4} ?[A-Z0-9]{4}")


def _has_key(text: str) -> bool:
    return any(start in text for start in _KEY_STARTS)


KINDS: dict[Kind, tuple[re.Pattern[str], Confirm, Callable[[str], object]]] = {
    "private_key": (_PRIVATE_KEY, _certain, re.compile("-----BEGIN").search),
    "api_key": (_KEY, _key, _has_key),
    "email": (_EMAIL, _email, re.compile("@").search),
    "iban": (_IBAN, _iban, _ACCOUNT.search),
    "credit_card": (_CARD, _card, _LONG_NUMBER.search),
    "ip": (_IP, _ip, _ADDRESS.search),
    "phone": (_PHONE, _phone, _LONG_NUMBER.search),
}
"""How each is found: a pattern, what confirms it, and a quick look whether a text may have one. In this order: a card is no phone."""


def mask_kind(text: str, kind: Kind) -> str:
    """`text` with `[KIND]` for what is found; the same object where nothing is."""
    pattern, confirm, may_have = KINDS[kind]
    if not may_have(text):
        return text
    found = False

    def masked(match: re.Match[str]) -> str:
        nonlocal found
        if not confirm(match):
            return match[0]
        found = True
        secret = match[1] if kind == "api_key" else None
        mask = f"[{kind.upper()}]"
        return match[0].replace(secret, mask) if secret else mask

    result = pattern.sub(masked, text)
    return result if found else text
