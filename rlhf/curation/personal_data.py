"""Finds personal data with a fixed format: e-mail, phone, card and account numbers, IP and street addresses.

Checksums (python-stdnum) and numbering plans (phonenumbers) exclude other numbers. Names have no format: finding them
needs a named-entity model, which is not used here (docs/validation.md).
"""

import ipaddress
import re
from functools import lru_cache

_EMAIL = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)*\.[A-Za-z]{2,}\b")
_CARD = re.compile(r"(?<![\w.-])[3-6]\d{3}(?:[ -]?\d){9,15}(?![\w-])")
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30}\b")
_SSN = re.compile(r"(?<![\w-])\d{3}-\d{2}-\d{4}(?![\w-])")
_IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w.]*\d)")
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])")
_VERSION = re.compile(r"(?:\bv|version|release|build|python|chrome)[\s:=]*$", re.IGNORECASE)
_STREET = re.compile(
    r"\b\d{1,5}[A-Za-z]? (?:[NSEW]\.? )?(?:[A-Z][\w'-]+ ){1,3}"
    r"(?:Street|St|Avenue|Ave|Road|Rd|Boulevard|Blvd|Lane|Ln|Drive|Court|Ct|Square|Terrace|Highway|Hwy)\b\.?")
_DIGITS = re.compile(r"\d(?:[\s().+/-]*\d){6}")  # seven digits close together: the shortest phone number
RESERVED_NETS = ("0.", "127.", "255.")  # addresses of no particular host


def personal_data_in(text: str) -> list[str]:
    """The personal data in a text, as "kind: value", ordered by kind. Takes linear time."""
    has_at, has_digit = "@" in text, any(map(str.isdigit, text))
    items = [f"e-mail: {match}" for match in _EMAIL.findall(text)] if has_at else []
    if not has_digit:
        return items + ([f"IP address: {item}" for item in _ip6(text)] if "::" in text else [])
    cards = [item for item in _CARD.findall(text) if _is_card(item)]
    accounts = [item for item in _IBAN.findall(text) if _is_iban(item)] + [
        item for item in _SSN.findall(text) if _is_ssn(item)]
    addresses = [*_ip4(text), *_ip6(text)]
    items += [f"card number: {item}" for item in cards] + [f"account number: {item}" for item in accounts]
    items += [f"IP address: {item}" for item in addresses]
    items += [f"street address: {match.group()}" for match in _STREET.finditer(text)]
    if _DIGITS.search(text):
        taken = " ".join(cards + accounts + addresses)
        items += [f"phone number: {item}" for item in _phones(text) if item not in taken]
    return items


def _phones(text: str) -> list[str]:
    """Phone numbers that are valid in a numbering plan; without a country code, that of the United States."""
    import phonenumbers

    leniency = phonenumbers.Leniency.VALID
    return [match.raw_string for match in phonenumbers.PhoneNumberMatcher(text, "US", leniency=leniency)
            if match.raw_string.startswith("+") or not match.raw_string.isdigit()]  # bare digits may be any number


@lru_cache(maxsize=4096)
def _is_card(text: str) -> bool:
    from stdnum import luhn

    digits = re.sub(r"[ -]", "", text)
    return len(digits) <= 19 and len(set(digits)) > 1 and bool(luhn.is_valid(digits))


@lru_cache(maxsize=4096)
def _is_iban(text: str) -> bool:
    from stdnum import iban

    return bool(iban.is_valid(text))


@lru_cache(maxsize=4096)
def _is_ssn(text: str) -> bool:
    from stdnum.us import ssn

    return bool(ssn.is_valid(text))


def _ip4(text: str) -> list[str]:
    return [match.group() for match in _IPV4.finditer(text)
            if all(int(part) < 256 for part in match.group().split(".")) and not match.group().startswith(RESERVED_NETS)
            and not _VERSION.search(text[max(0, match.start() - 12):match.start()])]


def _ip6(text: str) -> list[str]:
    addresses = []
    for match in _IPV6.finditer(text):
        try:
            address = ipaddress.IPv6Address(match.group())
        except ValueError:
            continue
        if not address.is_loopback and not address.is_unspecified and len(match.group()) > 6:
            addresses.append(match.group())
    return addresses
