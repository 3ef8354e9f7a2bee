"""Finds personal data with a fixed format, and secrets: e-mail, IP and street addresses, phone, card, account and
social security numbers, dates of birth, keys.

Checksums (python-stdnum) and numbering plans (phonenumbers) exclude other numbers; a national phone number counts where
the text says that it is one. Names have no format: finding them needs a named-entity model, which is not used here.
docs/data-rules.md has the precision and recall on tests/rlhf/curation/personal_data.jsonl.
"""

import ipaddress
import re
from functools import lru_cache

from rlhf.curation.secrets import secrets_in

_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]+(?:\.[\w-]+)*\.[A-Za-z]{2,24}\b(?![(\w-])")
# ... (at) ... (dot) ...: with brackets or in words; a local part, "at", a domain, "dot", a top-level domain.
_DOT, _AT = r"(?: ?[(\[{<] ?dot ?[)\]}>] ?| dot )", r"(?: ?[(\[{<] ?at ?[)\]}>] ?| at )"
_SPELLED_EMAIL = re.compile(
    rf"\b[\w+-]+(?:(?:\.|{_DOT})[\w+-]+)*{_AT}[\w-]+(?:(?:\.|{_DOT})[\w-]+)*{_DOT}"
    r"(?:com|org|net|edu|gov|mil|int|info|biz|app|dev|[a-z]{2})\b", re.IGNORECASE)
_MAIL_WORDS = re.compile(r"\b(?:e-?mails?|mailto|write|reach|contact|address|send|ping|message)\b", re.IGNORECASE)
_NO_DOMAIN = re.compile(r" at (?:the|a|an|this|that|each|every|any|one|some|which|what)\b", re.IGNORECASE)
# Top-level domains that are common and longer than a country's two letters; x@y.transpose is no address.
_TOP_LEVEL = frozenset({
    "com", "org", "net", "edu", "gov", "mil", "int", "info", "biz", "name", "pro", "aero", "coop", "museum", "jobs",
    "mobi", "app", "dev", "tech", "online", "site", "store", "shop", "xyz", "blog", "cloud", "email", "live",
    "news", "world", "space", "club", "life", "today", "agency", "digital", "studio", "design", "solutions",
    "company", "global", "group", "consulting", "academy", "education", "foundation", "health", "care", "london",
    "berlin", "paris", "tokyo", "nyc", "eus", "cat", "gal", "asia", "africa"})
# Domains that belong to nobody [RFC 2606, 6761], and those that people write for an example.
_RESERVED_DOMAIN = re.compile(
    r"(?:^|[.])(?:example\.(?:com|net|org|edu)|(?:test|invalid|example|localhost|local|internal))$")
_EXAMPLE_DOMAINS = frozenset({
    "domain.com", "yourdomain.com", "mydomain.com", "company.com", "yourcompany.com", "email.com", "mail.com",
    "website.com", "yoursite.com", "site.com", "abc.com", "xyz.com", "test.com", "foo.com", "bar.com", "acme.com"})
_NOBODY = frozenset({
    "git", "noreply", "no-reply", "donotreply", "do-not-reply", "user", "username", "your.name", "yourname", "name",
    "someone", "somebody", "you", "me", "firstname.lastname", "first.last", "youremail", "email"})

_PLAIN_CARD = r"[2-6]\d{3}(?P<gap>[ -]?)\d{4}(?P=gap)\d{4}(?P=gap)\d{4}|3[47]\d{2}(?P<gap2>[ -]?)\d{6}(?P=gap2)\d{5}"
_CARD = re.compile(rf"(?<![\w.-])(?:{_PLAIN_CARD}|3(?:0[0-5]|[68]\d)\d{{11}})(?![\w-]|\.\d)")
_CARD_PREFIX = re.compile(r"4|5[1-5]|2(?:22[1-9]|2[3-9]|[3-6]|7[01]|720)|3[47]|3(?:0[0-5]|[68])|6(?:011|4[4-9]|5|2)|35")
# Numbers that payment services publish for tests; they pass the checksum and pay nothing.
_TEST_CARDS = frozenset({
    "4111111111111111", "4242424242424242", "4012888888881881", "4000056655665556", "4000000000000002",
    "4444333322221111", "5555555555554444", "5200828282828210", "5105105105105100", "2223003122003222",
    "2223000048400011", "378282246310005", "371449635398431", "378734493671000", "6011111111111117",
    "6011000990139424", "6011981111111113", "3056930009020004", "36227206271667", "30569309025904", "38520000023237",
    "3566002020360505", "3530111333300000", "6200000000000005"})
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30}\b")
_SSN = re.compile(r"(?<![\w-])(?<!\d[.,])\d{3}([- ])\d{2}\1\d{4}(?![\w-]|[.,]\d)")
_SSN_WORDS = re.compile(r"\b(?:ssns?|social security|soc\.? sec)", re.IGNORECASE)
_IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w.]*\d)")
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])")
_VERSION = re.compile(r"(?:\bv|version|release|build|python|chrome|firmware|section|clause|chapter|oid|edge|safari|"
                      r"webkit)[\s:=/]*$", re.IGNORECASE)
_PUBLIC_DNS = frozenset({"8.8.8.8", "8.8.4.4", "1.1.1.1", "1.0.0.1", "9.9.9.9", "208.67.222.222", "208.67.220.220",
                         "2606:4700:4700::1111", "2001:4860:4860::8888", "2001:4860:4860::8844"})
_STREET = re.compile(
    r"(?<![\d.,$-])\b\d{1,5}[A-Za-z]? (?:[NSEW]\.? |North |South |East |West )?(?:[A-Z][\w'-]+ ){1,3}"
    r"(?:Street|St|Avenue|Ave|Road|Rd|Boulevard|Blvd|Lane|Ln|Drive|Court|Ct|Square|Terrace|Highway|Hwy)\b\.?")
_NO_STREET = re.compile(r"(?:Supreme|High|District|Circuit|Superior|Appeals|Federal|County|Crown|Tennis|Food|"
                        r"Basketball|Hard|Clay|Grass|Times|Wall|Sesame|Test|Disk|Flash|Red|Star|Downing) \w+\.?$|"
                        r"^(?:221[Bb] Baker|4 Privet|742 Evergreen|1600 Pennsylvania|12 Grimmauld) ")
_MONTH = r"(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)[a-z]*"
_DAY = r"\d{1,2}(?:st|nd|rd|th)?"
_DATE = rf"(?:\d{{1,2}}[./-]\d{{1,2}}[./-](?:19|20)?\d\d|(?:19|20)\d\d-\d\d-\d\d|" \
        rf"{_DAY}(?: of)? {_MONTH},? (?:19|20)\d\d|{_MONTH}\.? {_DAY},? (?:19|20)\d\d)"
_BIRTH = re.compile(
    rf"\b(?:D\.?O\.?B\.?|[Dd]ate of [Bb]irth|[Bb]irth ?date|[Bb]irthday|BIRTH ?DATE|DATE OF BIRTH)(?!\w)"
    rf"(?: is| was|:| -| =|,|\))* {_DATE}|\b[Bb]orn(?: on)?:? (?:\d{{1,2}}[./-]\d{{1,2}}[./-](?:19|20)\d\d)")
_NAME = re.compile(
    r"\b(?!(?:Date|Birth|The|Her|His|My|Our|Their|New|Patient|Name|Full|First|Last|Medical|Please)\b)"
    r"[A-Z][a-z]+(?:[-'][A-Z][a-z]+)? (?:[A-Z]\.? )?(?!Of\b|Birth\b)[A-Z][a-z]+")
NEAR = 60  # characters between a number and the words that say what it is

# A number as people write it: digits with at most one mark and a blank between them.
_NUMBER = re.compile(r"(?<![A-Za-z0-9_.,/:$\u20ac\u00a3%#=*^@&?-])(?:\+|00)?(?:\(\+?\d{1,4}\)|\d)"
                     r"(?:(?:[ \u00a0]?[().\u2011/-] ?|[ \u00a0])?\d){6,14}"
                     r"(?![A-Za-z0-9_%@=]|[.,:/-]\d|-[A-Za-z]| ?[=*^\u00d7\u00f7<>\u20ac%])")
_PHONE_WORDS = re.compile(
    r"\b(?:tele)?phones?\b|\btel\b|\bcall(?:ed|ing|s)?\b|\bring\b|\brang\b|\bmobiles?\b|\bcell(?:phone)?\b|\blandline|"
    r"\bfax\b|whats ?app|\btext(?:ed|ing)? (?:me|him|her|us|them|at|on|to|back)\b|\bsms\b|\bdial|\bvoicemail|"
    r"\b(?:reach|contact) (?:me|him|her|us|them)\b|\b(?:my|his|her|our|their) number|tel[e\u00e9]fo+n|\bhandy|"
    r"rufnummer|\bt\u00e9l|\bportable\b|\bm[o\u00f3]vil\b|\bcelular|\bcellulare|\bnumero\b|\bn\u00famero\b|\bmobil\b|\bmobiel|"
    r"\bpuhelin|\bpuh\b|\u7535\u8bdd|\u624b\u673a|\u96fb\u8a71|\u643a\u5e2f|\uc804\ud654|"
    r"\u0442\u0435\u043b\u0435\u0444\u043e\u043d|\u0442\u0435\u043b\.", re.IGNORECASE)
_OTHER_NUMBER = re.compile(
    r"\b(?:orders?|parts?|models?|serial|sku|items?|invoice|isbn|issn|tracking|tickets?|case|reference|ref|account|acct|"
    r"catalog(?:ue)?|routing|id|doi|patent|article|version|coordinates?|latitude|longitude|pages?|bible|score|seed|"
    r"student|member(?:ship)?|policy|batch|lot|barcode|zip|post(?:al )?code|cell(?= [A-Z]\d)|"
    r"upc|ean|vin|licen[cs]e|flight|po)\b(?:no\.|nr\.|[^\n.;!?]){0,12}$",
    re.IGNORECASE)
_TERM = re.compile(r"[-+*/=^<>\u2212] $")  # what stands before a term of a sum
_NANP = re.compile(r"(?:\+?1[ .-]?)?(?:\(\d{3}\) ?\d{3}[-. ]\d{4}|\d{3}([-.])\d{3}\1\d{4})")
_DATE_LIKE = re.compile(r"(?:1[5-9]|20)\d\d[-/. ](?:0?[1-9]|1[0-2])[-/. ]\d|\d{1,2}[-/.]\d{1,2}[-/.](?:1[89]|20)\d\d|"
                        r"(?:1[0-9]|20)\d\d ?[-/ \u2013] ?(?:1[0-9]|20)\d\d\b")
_FREE = re.compile(r"(?:\+?1[-. ]?)?\(?8(?:00|33|44|55|66|77|88)\)?[-. ]|\(?0[89]00|\(?080[458]|1[38]00 ")
_RANGE = re.compile(r"(\d{3,5})-(\d{3,5})")
_FIGURE = re.compile(r"\d+\.\d+|\d(?:\D+\d)*")  # a decimal number; digits one by one
_THOUSANDS = re.compile(r"[1-9]\d{0,2}(?:[ \u00a0]\d{3}){2,}")
_COUNTED = re.compile(r"0?123456789|1234567890")
# Where a national number is looked for, if it has no country code; roughly by number of speakers of the data at hand.
REGIONS = ("US", "GB", "DE", "FR", "AU", "SE", "ES", "IT", "NL", "IN", "JP", "BR", "CH", "AT", "BE", "IE", "NZ", "ZA",
           "MX", "PL", "DK", "NO", "FI", "PT", "CN", "KR", "RU", "TR", "SG", "HK")


def personal_data_in(text: str) -> list[str]:
    """The personal data and secrets in a text, as "kind: value", ordered by kind. Takes linear time."""
    items = [f"e-mail: {item}" for item in _emails(text)]
    items += [f"secret: {item}" for item in secrets_in(text)]
    if not any(map(str.isdigit, text)):
        return items + ([f"IP address: {item}" for item in _ip6(text)] if "::" in text else [])
    cards = [match.group() for match in _CARD.finditer(text) if _is_card(match.group())]
    accounts = [item for item in _IBAN.findall(text) if _is_iban(item)] + _social_security(text)
    addresses = [*_ip4(text), *_ip6(text)]
    items += [f"card number: {item}" for item in cards] + [f"account number: {item}" for item in accounts]
    items += [f"IP address: {item}" for item in addresses]
    items += [f"street address: {match.group()}" for match in _STREET.finditer(text)
              if not _NO_STREET.search(match.group())]
    items += [f"date of birth: {item}" for item in _births(text)]
    taken = " ".join(cards + accounts + addresses)
    return items + [f"phone number: {item}" for item in _phones(text) if item not in taken]


def _around(match: re.Match[str], before: int = NEAR, after: int = 0) -> str:
    return match.string[max(0, match.start() - before):match.start()] + " " + \
        match.string[match.end():match.end() + after]


def _emails(text: str) -> list[str]:
    """Addresses that belong to somebody, also with (at) and (dot)."""
    found = [match.group() for match in _EMAIL.finditer(text) if _is_somebody(match.group())] if "@" in text else []
    lower = text.lower()
    if "dot" in lower and "at" in lower:
        for match in _SPELLED_EMAIL.finditer(text):
            item = match.group()
            words = not any(mark in item for mark in "([{<")
            if words and (_NO_DOMAIN.search(item) or not _MAIL_WORDS.search(_around(match, 40, 20))):
                continue
            plain = re.sub(_AT, "@", re.sub(_DOT, ".", item, flags=re.IGNORECASE), count=1, flags=re.IGNORECASE)
            if plain.count("@") == 1 and _is_somebody(plain):
                found.append(item)
    return found


def _is_somebody(address: str) -> bool:
    name, _, domain = address.lower().rpartition("@")
    top = domain.rsplit(".", 1)[-1]
    if _RESERVED_DOMAIN.search(domain) or domain in _EXAMPLE_DOMAINS or name in _NOBODY:
        return False
    return (len(top) == 2 or top in _TOP_LEVEL) and len(name) + len(domain) > 5


def _social_security(text: str) -> list[str]:
    """Numbers in the form of a US social security number: any that is called so, and valid ones with hyphens."""
    return [match.group() for match in _SSN.finditer(text)
            if _SSN_WORDS.search(_around(match, NEAR, NEAR // 2)) or
            ("-" in match.group() and _is_ssn(match.group()) and not _OTHER_NUMBER.search(_around(match).rstrip()))]


def _births(text: str) -> list[str]:
    """Dates that are called a date of birth, beside a name."""
    return [match.group() for match in _BIRTH.finditer(text) if _NAME.search(_around(match, NEAR, NEAR))]


def _phones(text: str) -> list[str]:
    """Phone numbers: with a country code; of North America, in its form; others where the text says so."""
    found = []
    for match in _NUMBER.finditer(text):
        item = match.group()
        before = text[max(0, match.start() - NEAR):match.start()]
        other = _OTHER_NUMBER.search(before.rstrip(" :#"))
        if _is_other(item) or (other and not _PHONE_WORDS.search(other.group())) or _TERM.search(before):
            continue
        said = bool(_PHONE_WORDS.search(before) or _PHONE_WORDS.search(text[match.end():match.end() + NEAR // 2]))
        if _THOUSANDS.fullmatch(item):  # may be a number of phones
            said = len(item) > 10 and bool(_PHONE_WORDS.search(before[-NEAR // 2:]))
        if item.startswith(("+", "00")):
            regions: tuple[str, ...] = ("ZZ",)
        elif said and not (item.isdigit() and not 9 <= len(item) <= 11):
            regions = REGIONS
        else:
            regions = ("US",) if _NANP.fullmatch(item) else ()
        if _is_phone(item, regions):
            found.append(item)
    return found


def _is_other(item: str) -> bool:
    """Whether a number is a date, a range, a figure, or digits in a row that stand for any number."""
    digits, bounds = re.sub(r"\D", "", item), _RANGE.fullmatch(item)
    if _DATE_LIKE.search(item) or _FIGURE.fullmatch(item) or _COUNTED.fullmatch(digits) or len(set(digits[3:])) < 2:
        return True
    return bounds is not None and len(bounds[1]) == len(bounds[2]) and int(bounds[1]) < int(bounds[2])


@lru_cache(maxsize=4096)
def _is_phone(text: str, regions: tuple[str, ...]) -> bool:
    """Whether a number is valid in a region; one that is free or costs extra belongs to nobody in person.

    "ZZ": by its country code; then a possible length is enough, since plans leave out the numbers kept for fiction.
    """
    import phonenumbers

    if _FREE.match(text):
        return False
    kinds = phonenumbers.PhoneNumberType
    public = (kinds.TOLL_FREE, kinds.PREMIUM_RATE, kinds.SHARED_COST, kinds.UAN)
    for region in regions:
        try:
            number = phonenumbers.parse(re.sub(r"^00", "+", text), region)
        except phonenumbers.NumberParseException:
            continue
        possible = region == "ZZ" and phonenumbers.is_possible_number(number)
        if (possible or phonenumbers.is_valid_number(number)) and phonenumbers.number_type(number) not in public:
            return True
    return False


@lru_cache(maxsize=4096)
def _is_card(text: str) -> bool:
    from stdnum import luhn

    digits = re.sub(r"[ -]", "", text)
    return bool(_CARD_PREFIX.match(digits)) and len(set(digits)) > 1 and digits not in _TEST_CARDS and bool(
        luhn.is_valid(digits))


@lru_cache(maxsize=4096)
def _is_iban(text: str) -> bool:
    from stdnum import iban

    return bool(iban.is_valid(text))


@lru_cache(maxsize=4096)
def _is_ssn(text: str) -> bool:
    from stdnum.us import ssn

    return bool(ssn.is_valid(text))


def _ip4(text: str) -> list[str]:
    """Addresses on the internet: not private, of documentation or of a well-known service; no version numbers."""
    addresses = []
    for match in _IPV4.finditer(text):
        if any(part.startswith("0") and part != "0" for part in match.group().split(".")):
            continue  # a version, as Ubuntu's 20.04.1.25
        parts = [int(part) for part in match.group().split(".")]
        if max(parts) > 255 or sum(part > 19 for part in parts) < 2 or match.group() in _PUBLIC_DNS:
            continue
        if ipaddress.IPv4Address(bytes(parts)).is_global and not _VERSION.search(_around(match, 16)[:-1]):
            addresses.append(match.group())
    return addresses


def _ip6(text: str) -> list[str]:
    addresses = []
    for match in _IPV6.finditer(text):
        try:
            address = ipaddress.IPv6Address(match.group())
        except ValueError:
            continue
        unicast = 0x2000 <= int(address) >> 112 <= 0x3FFF  # all that has been given to anybody
        if unicast and address.is_global and match.group().lower() not in _PUBLIC_DNS:
            addresses.append(match.group())
    return addresses
