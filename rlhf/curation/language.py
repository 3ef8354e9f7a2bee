"""Tells a prompt that is surely not English from one that is, or may be (py3langid, offline)."""

from functools import cache
from typing import Any

CONFIDENT = 0.8
ENGLISH = {"en", "pcm"}  # Nigerian Pidgin's model takes short English questions for its own
MIN_LETTERS = 12  # shorter texts could be anything
READ_CHARS = 1000  # of a long text its beginning is enough


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def foreign_language(text: str) -> str:
    """The code (ISO 639) of the language that the text is confidently in, "" for English and for what is undecided.

    Code, names, numbers and short texts are undecided. Text in other letters than Latin ones is always foreign:
    "?" where its language is not sure.
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
