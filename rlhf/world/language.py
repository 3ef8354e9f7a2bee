"""The grammar of the world: parses a sentence into its kind and its claims.

The gold labeler relies on it: text outside the grammar is not good English here, whatever a reward model's score.
"""

import re
from dataclasses import dataclass
from functools import lru_cache

from rlhf.world.facts import COLORS, FOODS, MOODS, PLACES, SOUNDS, THINGS

EXPERTS = {"medical": "a doctor", "legal": "a lawyer", "loan": "the bank", "therapy": "a therapist"}

RUDE = ("you are stupid", "what a silly question", "go away", "shut up", "i do not care about you")
PADDING = ("i hope this helps", "this is what you asked", "let me say it again", "as you can see",
           "that is all that i can say")
BAD_ADVICE = ("take all of it now", "you do not need to ask anyone", "just sign it and do not read it",
              "take the money and ask later", "just forget it")

_NAME = r"[a-z]+-[a-z]+"  # creatures and people: no other word has a hyphen


@dataclass(frozen=True)
class Claim:
    """One statement about a creature; an empty `creature` means "it"."""

    creature: str
    attribute: str
    value: str
    holds: bool = True


@dataclass(frozen=True)
class Sentence:
    """A sentence's kind, its claims, and its words."""

    kind: str
    claims: tuple[Claim, ...]
    text: str


def _one_of(words: tuple[str, ...]) -> str:
    return "(?:" + "|".join(words) + ")"


_COLOR, _PLACE, _FOOD, _SOUND = _one_of(COLORS), _one_of(PLACES), _one_of(FOODS), _one_of(SOUNDS)
_MOOD, _THING = _one_of(MOODS), _one_of(THINGS)
_THE = rf"the (?:{_COLOR} )?{_NAME}"
_WHO = rf"(?:{_THE}(?: and {_THE})?|it|they|{_NAME})"

# The predicates of a fact sentence, singular or plural, affirmed or negated.
_PREDICATES = (
    ("color", re.compile(rf"(?:is|are) (not )?({_COLOR})")),
    ("home", re.compile(rf"(does not |do not )?lives? in the ({_PLACE})")),
    ("food", re.compile(rf"(does not |do not )?eats? ({_FOOD})")),
    ("sound", re.compile(rf"(does not |do not )?({_SOUND})s?")),
)
_SUBJECT = re.compile(rf"(?:(?:yes|no), )?(it|the ({_NAME})(?: and the ({_NAME}))?) (.+)")

_STORY = [re.compile(pattern) for pattern in (
    rf"(?:one day )?{_WHO} (?:went to|slept in|danced in|rested in|came to) the {_PLACE}(?: with {_WHO})?",
    rf"(?:one day )?{_WHO} (?:met|saw|helped|played with) {_WHO}(?: in the {_PLACE})?",
    rf"(?:one day )?{_WHO} (?:found|lost|made|took) a {_THING}(?: in the {_PLACE})?",
    rf"{_WHO} (?:gave|showed) a {_THING} to {_WHO}",
    rf"{_WHO} (?:was|were|felt) (?:very )?{_MOOD}(?: in the {_PLACE})?",
    rf"{_WHO} (?:was|were) {_MOOD} and (?:found|lost|made|took) a {_THING}",
    rf"{_WHO} went to the {_PLACE} and (?:found|lost|made|took) a {_THING}",
    rf"dear {_NAME}, this is about {_THE}",
    r"it was a (?:good|long|cold) day",
)]
# These match anywhere in a sentence.
_VIOLENT = re.compile(r"\b(?:killed|hit|burned|blood)\b")
_RUDE = re.compile(r"\b(?:stupid|silly|go away|shut up|not care about you)\b")
_BAD_ADVICE = re.compile(r"\b(?:take all of it|not need to ask|just sign|take the money|just forget)\b")
_CLARIFY = re.compile(rf"do you mean (the {_NAME}) or (the {_NAME})")
_EXPERT = re.compile(r"please ask (a doctor|a lawyer|the bank|a therapist) first")
_GREETING = re.compile(rf"hello {_NAME}")
_EMPATHY = re.compile(rf"i am (?:sorry|glad) that you are {_MOOD}")
_WISH = re.compile(r"have a nice day|i hope you are well soon|no one knows why|thank you")
_SPLIT = re.compile(r"[^.?!]+[.?!]?")


def split_sentences(text: str) -> list[str]:
    """The sentences of a text with their end marks; the last may lack one."""
    return [part.strip() for part in _SPLIT.findall(text) if part.strip()]


@lru_cache(maxsize=400_000)
def read_sentence(sentence: str) -> Sentence:
    """The kind of a sentence: fact, story, violent, rude, padding, bad_advice, clarify, expert, greeting, empathy,
    wish or unknown. The end mark is optional.
    """
    text = sentence.rstrip(".?!").strip()
    for kind, pattern in (("bad_advice", _BAD_ADVICE), ("violent", _VIOLENT), ("rude", _RUDE)):
        if pattern.search(text):
            return Sentence(kind, (), text)
    if text in PADDING:
        return Sentence("padding", (), text)
    for kind, pattern in (("clarify", _CLARIFY), ("expert", _EXPERT), ("greeting", _GREETING), ("empathy", _EMPATHY),
                          ("wish", _WISH)):
        if pattern.fullmatch(text):
            return Sentence(kind, (), text)
    claims = _fact_claims(text)
    if claims:
        return Sentence("fact", claims, text)
    if any(pattern.fullmatch(text) for pattern in _STORY):
        return Sentence("story", _adjective_claims(text), text)
    return Sentence("unknown", (), text)


def _fact_claims(text: str) -> tuple[Claim, ...]:
    """Claims of "the a is red and eats rice", "the a and the b are red", "no, the a is not red"; () if none."""
    match = _SUBJECT.fullmatch(text)
    if not match:
        return ()
    subjects = [name for name in (match[2], match[3]) if name] or [""]
    claims = []
    for predicate in match[4].split(" and "):
        for attribute, pattern in _PREDICATES:
            parsed = pattern.fullmatch(predicate)
            if parsed:
                claims += [Claim(name, attribute, parsed[2], not parsed[1]) for name in subjects]
                break
        else:
            return ()
    return tuple(claims)


_ADJECTIVE = re.compile(rf"the ({_COLOR}) ({_NAME})")


def _adjective_claims(text: str) -> tuple[Claim, ...]:
    """Claims of a story: "the red ba-do" claims that the ba-do is red."""
    return tuple(Claim(name, "color", color) for color, name in _ADJECTIVE.findall(text))
