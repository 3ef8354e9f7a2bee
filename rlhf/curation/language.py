"""Detects prompts that are certainly not in the language of a dataset (py3langid, offline).

What counts is the instruction: an English question about a long German text is English. So a prompt is foreign only if
none of its sentences is in the dataset's language.
"""

import re
from functools import cache
from typing import Any

CONFIDENT = 0.8  # minimum probability of another language
UNLIKELY = 0.001  # maximum probability of the dataset's own language in a text in one of several related ones
MIN_LETTERS = 12  # shorter texts are undecided
READ_CHARS = 1000  # of the beginning of a long text, and half of it of its end, where the instruction may be
ACCEPTED = {"en": {"en", "pcm"}, "no": {"no", "nn", "da"}, "zh": {"zh", "wuu", "yue"}, "ar": {"ar", "arz", "ary"},
            "sr": {"sr", "hr", "bs", "mk"}, "hr": {"hr", "bs", "sr"}, "id": {"id", "ms"}, "ms": {"ms", "id"},
            "uz": {"uz", "uzs"}}  # languages that short texts of the first are often taken for
_KANA, _HAN = "\u3041-\u30ff\u31f0-\u31ff\uff66-\uff9d", "\u3005\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_CYRILLIC, _ARABIC, _INDIC = "\u0400-\u052f", "\u0600-\u06ff\u0750-\u077f\ufb50-\ufdff\ufe70-\ufeff", "\u0900-\u097f"
# The letters of languages with another alphabet than the Latin one.
SCRIPTS = {"ja": _KANA + _HAN, "zh": _HAN, "ko": "\uac00-\ud7a3\u1100-\u11ff\u3131-\u318e",
           **dict.fromkeys(("ru", "uk", "be", "bg", "sr", "mk", "kk", "ky", "mn", "tg", "tt", "ba"), _CYRILLIC),
           **dict.fromkeys(("ar", "arz", "ary", "fa", "ur", "ps", "ug", "sdh"), _ARABIC),
           **dict.fromkeys(("hi", "mr", "ne", "sa", "gom"), _INDIC), "he": "\u0590-\u05ff",
           "el": "\u0370-\u03ff\u1f00-\u1fff", "th": "\u0e00-\u0e7f",
           "lo": "\u0e80-\u0eff", "ka": "\u10a0-\u10ff", "hy": "\u0530-\u058f",
           "bn": "\u0980-\u09ff", "as": "\u0980-\u09ff", "pa": "\u0a00-\u0a7f", "gu": "\u0a80-\u0aff",
           "or": "\u0b00-\u0b7f", "ta": "\u0b80-\u0bff", "te": "\u0c00-\u0c7f", "kn": "\u0c80-\u0cff",
           "ml": "\u0d00-\u0d7f", "si": "\u0d80-\u0dff", "my": "\u1000-\u109f", "km": "\u1780-\u17ff",
           "am": "\u1200-\u137f"}
# Frequent English words that are rare in other languages, and verbs that begin an instruction.
_ENGLISH = frozenset({
    "the", "of", "and", "that", "you", "this", "what", "how", "why", "which", "would", "your", "are", "from",
    "about", "could", "should", "there", "their", "who", "with", "when", "where", "does", "did", "because",
    "have", "been", "into", "than", "then", "these", "those", "it's", "don't", "is"})
_INSTRUCTIONS = frozenset({
    "write", "explain", "give", "make", "tell", "describe", "translate", "translation", "summarize", "summarise",
    "summary", "correct", "fix", "classify", "rewrite", "paraphrase", "answer", "list", "name", "identify",
    "extract", "complete", "continue", "convert", "proofread", "spell", "english", "please", "following",
    "sentence", "text", "question"})
_SMALL = frozenset({
    "it", "to", "for", "in", "on", "a", "an", "be", "by", "do", "me", "my", "i", "we", "he", "she", "was"})
_WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")
_SEGMENTS = re.compile(r"[\n:;.?!\u3002\uff1f\uff01\uff1a\uff1b\"\u201c\u201d\u201e\u00ab\u00bb\u300c\u300d()\[\]|]+"
                       r"|\s-\s")
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]+`|https?://\S+", re.DOTALL)


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def languages() -> list[str]:
    """The ISO 639 codes of the languages that can be told apart."""
    return sorted(set(_identifier().labels) - {"zxx"})


def foreign_language(text: str, language: str = "en") -> str:
    """The ISO 639 code of the text's language if it is certainly not `language`, "" if it is that or undecided.

    Code, names, numbers and short texts are undecided, and so is a text of which one sentence is in `language`. "?": in
    another alphabet, and the language is uncertain.
    """
    if language == "en" and _has_english_words(text[:READ_CHARS]):
        return ""
    head = _CODE.sub(" ", text[:READ_CHARS]) if "`" in text or "://" in text else text[:READ_CHARS]
    other = _other_language(head, language)
    if not other:
        return ""
    read = head if len(text) <= READ_CHARS else f"{head}\n{text[max(READ_CHARS, len(text) - READ_CHARS // 2):]}"
    return "" if any(_is_written_in(part, language, other) for part in _SEGMENTS.split(read)) else other


def _has_english_words(text: str) -> bool:
    words = _WORD.findall(text.lower())
    hits = [word for word in words if word in _ENGLISH]
    return len(set(hits)) > 1 and 5 * len(hits) >= len(words)


@cache
def _script(letters: str) -> re.Pattern[str]:
    return re.compile(f"[{letters}]")


def _other_language(text: str, language: str) -> str:
    """The language of the whole text if it is another, else ""."""
    letters = [character for character in text if character.isalpha()]
    beyond_latin = sum(character > "\u024f" and not "\u1e00" <= character <= "\u1eff" for character in letters)
    if language in SCRIPTS:
        own = len(_script(SCRIPTS[language]).findall(text))
        if own * 2 > len(letters):
            return _japanese_or_chinese(text, language, len(letters))
        foreign_script = (beyond_latin - own) * 2 > len(letters) > 1
    else:
        foreign_script = beyond_latin * 2 > len(letters) > 1
    if not foreign_script and len(letters) < MIN_LETTERS:
        return ""
    found, confidence = _identifier().classify(text)
    if foreign_script:
        return "?" if found in ACCEPTED.get(language, {language}) or found in ACCEPTED["en"] else str(found)
    accepted = ACCEPTED.get(language, {language})
    if found in accepted or (confidence < CONFIDENT and not _is_surely_other(text, accepted)):
        return ""
    return str(found)


def _is_surely_other(text: str, accepted: set[str]) -> bool:
    """Whether related languages, such as Spanish, Galician and Aragonese, share the probability without `accepted`."""
    ranked = _identifier().rank(text)
    own = sum(probability for code, probability in ranked if code in accepted)
    others = sum(probability for code, probability in ranked[:3] if code not in accepted)
    return bool(own < UNLIKELY and others >= 0.95 * CONFIDENT)


def _japanese_or_chinese(text: str, language: str, letters: int) -> str:
    """"zh" or "ja" if a text in the other one's letters is that; kana are in nearly every Japanese sentence."""
    if language not in ("ja", "zh") or letters < MIN_LETTERS:
        return ""
    kana = len(_script(_KANA).findall(text))
    if language == "zh":
        return "ja" if kana * 5 > letters else ""
    return "zh" if kana == 0 and _identifier().classify(text)[0] in ACCEPTED["zh"] else ""


def _is_written_in(part: str, language: str, other: str) -> bool:
    """Whether a sentence of a text in the language `other` is in `language`."""
    if language in SCRIPTS:
        own = _script(_KANA if language == "ja" else SCRIPTS[language])
        if language == "zh" and _script(_KANA).search(part):
            return False
        return len(own.findall(part)) >= (2 if language == "ja" else 4)
    words = [word for word in _WORD.findall(part.lower()) if word < "\u0250"]
    if language == "en":
        known = [word for word in words if word in _ENGLISH or word in _INSTRUCTIONS]
        small = [word for word in words if word in _SMALL]
        if other == "?" or other in SCRIPTS:  # any English word in a text of another alphabet was written with intent
            return bool(known)
        if not known or 4 * (len(known) + len(small)) < len(words):
            return False
    elif len(words) < 3:
        return False
    if other not in _identifier().labels:
        return True
    probability = dict(_identifier().rank(part))
    own_share = max(probability.get(code, 0.0) for code in ACCEPTED.get(language, {language}))
    return bool(own_share > probability.get(other, 0.0))
