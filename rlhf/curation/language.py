"""Detects prompts that are certainly not English (py3langid, offline)."""

from functools import cache
from typing import Any

CONFIDENT = 0.8  # minimum probability of a language other than English
ENGLISH = {"en", "pcm"}  # short English questions are often classified as Nigerian Pidgin
MIN_LETTERS = 12  # shorter texts are undecided
READ_CHARS = 1000  # the beginning of a long text is enough


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def foreign_language(text: str, language: str = "en") -> str:
    """The ISO 639 code of the text's language if it is confidently not English, "" if it is English or undecided.

    Code, names, numbers and short texts are undecided. Text in a non-Latin script is always foreign: "?" if its
    language is uncertain.
    """
    text = text[:READ_CHARS]
    letters = [character for character in text if character.isalpha()]
    other = sum(character > "\u024f" for character in letters)
    if other * 2 > len(letters) > 1:
        language, _ = _identifier().classify(text)
        return "?" if language in ENGLISH else str(language)
    if len(letters) < MIN_LETTERS:
        return ""
    language, confidence = _identifier().classify(text)
    return str(language) if language not in ENGLISH and confidence >= CONFIDENT else ""
