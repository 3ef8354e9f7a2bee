"""Near-duplicate prompts: one definition for the rules that drop them and for the leakage checks.

Two prompts are the same if `normalised` makes them equal: case, white space, Unicode form, characters without width,
look-alike letters of other alphabets and punctuation at the end do not count; symbols and digits do. They are near
duplicates if the longer one is the shorter one and a few words more (`adds_little`). InstructGPT drops prompts that
share "a long common prefix" [§3.2]; here the prefix must hold the whole question, since prompts in one frame share a
long prefix and ask different things.
"""

import re
import unicodedata
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Letters that look like a Latin one in most fonts, by the Latin letter [Unicode TR39, single letters only].
_LOOK_ALIKE = {
    "a": "\u0430\u03b1\u0251", "A": "\u0410\u0391", "b": "\u042c\u044c", "B": "\u0412\u0392", "c": "\u0441\u03f2",
    "C": "\u0421\u03f9", "d": "\u0501", "e": "\u0435\u04bd\u0454", "E": "\u0415\u0395", "F": "\u03dc",
    "g": "\u0261\u0581", "G": "\u050c", "h": "\u04bb\u0570", "H": "\u041d\u0397", "i": "\u0456\u03b9",
    "I": "\u0406\u0399\u04c0", "j": "\u0458\u03f3", "J": "\u0408\u037f", "k": "\u043a\u03ba", "K": "\u041a\u039a",
    "l": "\u04cf", "L": "\u053c", "M": "\u041c\u039c", "n": "\u0578", "N": "\u039d", "o": "\u043e\u03bf\u0585",
    "O": "\u041e\u039f\u0555", "p": "\u0440\u03c1", "P": "\u0420\u03a1", "q": "\u051b\u0566", "Q": "\u051a",
    "r": "\u0433", "s": "\u0455", "S": "\u0405\u054f", "t": "\u03c4", "T": "\u0422\u03a4", "u": "\u057d\u03c5",
    "U": "\u054d", "v": "\u03bd\u0475", "V": "\u0474", "w": "\u0461\u051d\u0561", "W": "\u051c", "x": "\u0445\u03c7",
    "X": "\u0425\u03a7", "y": "\u0443\u04af\u03b3", "Y": "\u0423\u04ae\u03a5", "z": "\u1d22", "Z": "\u0396"}
_TO_LATIN = {ord(other): latin for latin, others in _LOOK_ALIKE.items() for other in others}
_GREEK = re.compile("[\u0370-\u03ff]")
_WORD = re.compile(r"[^\W\d_]+")
# Typographic quotes and dashes, which NFKC leaves as they are.
_TYPOGRAPHY = str.maketrans({**dict.fromkeys("\u2018\u2019\u201a\u201b\u2032", "'"),
                             **dict.fromkeys("\u201c\u201d\u201e\u201f\u2033", '"'),
                             **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212", "-")})
_FLOAT_ID = re.compile(r"\A(\d+)\.0\Z")
# NFKC makes digits of superscripts and subscripts, and 22 is not two squared.
_RAISED = str.maketrans({**{mark: f"^{digit}" for digit, mark in enumerate("\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076"
                                                                           "\u2077\u2078\u2079")},
                         **{chr(0x2080 + digit): f"_{digit}" for digit in range(10)}, "\u207b": "^-", "\u208b": "_-"})
_FACTORIAL = re.compile(r"(?:[0-9]|[-+*/] ?[0-9a-z]+\))!+\Z")  # 5!, (n + 1)!
_FILLERS = "\u034f\u115f\u1160\u2800\u3164\uffa0"  # blanks that are no white space to Unicode
_CLOSING = " .,;:!?\u3002\u3001\uff61\u061f\u061b\u06d4\u0964\u0965"
_CLOSES = f"[{re.escape(_CLOSING)}]"
_TURN_ENDS = re.compile(rf"(?<!{_CLOSES}){_CLOSES}++(?=\n\n(?:Human|Assistant|System|Tool): )")  # of a conversation
_OPENING = " \u00a1\u00bf"


def normalised(prompt: str) -> str:
    """The prompt as it is compared with others; prompts that ask the same have the same text.

    NFKC, lower case, one blank for white space; without characters of no width (format characters, variation
    selectors) and without punctuation at the end; Cyrillic, Greek and Armenian letters in Latin words become the Latin
    ones that they look like. Symbols and digits stay: C, C++ and C# differ. A text of punctuation only keeps it.
    Of a conversation the punctuation at the end of each turn goes.
    """
    if "\n\nHuman: " in prompt or "\n\nAssistant: " in prompt:
        prompt = _TURN_ENDS.sub("", prompt)
    text = prompt if prompt.isascii() else _plain_letters(prompt)
    text = " ".join(text.casefold().split())
    factorial = _FACTORIAL.search(text)
    return (text if factorial else text.rstrip(_CLOSING)).lstrip(_OPENING) or text


def same_user(user_id: str) -> str:
    """The user id as it is compared with others: NFKC, lower case, one blank for white space, none at the ends, without
    characters of no width and look-alike letters of other alphabets; 17.0, as pandas writes 17, is 17."""
    plain = " ".join((user_id if user_id.isascii() else _plain_letters(user_id)).casefold().split())
    return _FLOAT_ID.sub(r"\1", plain)


def _visible(text: str) -> str:
    """The text without format characters (Cf) and variation selectors, which have no width."""
    if text.isascii():
        return text
    return "".join(character for character in text if not (
        unicodedata.category(character) == "Cf" or "\ufe00" <= character <= "\ufe0f" or character in _FILLERS
        or "\U000e0100" <= character <= "\U000e01ef"))


def _plain_letters(text: str) -> str:
    """NFKC of the visible text, with plain quotes and dashes and without look-alike letters in Latin words."""
    text = unicodedata.normalize("NFKC", _visible(text).translate(_RAISED)).translate(_TYPOGRAPHY)
    if text.isascii():
        return text
    other = sum(character > "\u024f" and character.isalpha() for character in text)
    latin = sum(character <= "\u024f" and character.isalpha() for character in text)
    if not other or not latin:
        return text
    mostly_latin = latin > other

    def replace(match: re.Match[str]) -> str:
        word = match.group()
        if word.isascii():
            return word
        plain = word.translate(_TO_LATIN)
        own, greek = sum(character <= "\u024f" for character in word), bool(_GREEK.search(word))
        # A Greek letter beside one other is a symbol of mathematics. A word of look-alikes only is in disguise if the
        # text's own alphabet is Latin.
        mixed = own > 1 or (own == 1 and not greek)
        disguised = own == 0 and plain.isascii() and mostly_latin and (len(word) > 2 or not greek)
        return plain if mixed or disguised else word

    return unicodedata.normalize("NFKC", _WORD.sub(replace, text).casefold())


_SENTENCE_ENDS = (". ", "? ", "! ", ": ", "; ", "\u3002", "\uff1f", "\uff01")
NEAREST = 20  # prefixes of a text that are compared with it, so that a chain of growing texts costs no square
# Words that are added to a prompt: no digits and no symbols, which make another question of it.
_ADDED = re.compile(r"[.,;!?]*(?: [^\W\d_]+(?:['-][^\W\d_]+)*[.,;!?]*)+")


def adds_little(shorter: str, longer: str, chars: int, share: float) -> bool:
    """Whether the normalised prompt `longer` is `shorter` and a few words more, so that both ask the same.

    Compared is the last sentence of `shorter` with what `longer` has in its place: a system turn, a frame or examples
    before it do not make two questions alike. It must have at least `chars` characters, which must be at least `share`
    of the longer one.
    """
    if not longer.startswith(shorter) or not _ADDED.fullmatch(longer, len(shorter)):
        return False
    start = max((place + len(end) for end in _SENTENCE_ENDS if (place := shorter.rfind(end)) >= 0), default=0)
    length = len(shorter) - start
    return length >= chars and length >= share * (len(longer) - start)


class PrefixIndex:
    """Equal prompts and near duplicates among `keys` (normalised prompts), in n log n.

    `group[i]`: the number of the distinct text keys[i] in sorted order. `near[g]`: the groups of shorter texts that
    group g adds little to (`adds_little`), nearest first, of its NEAREST prefixes; only groups that have any. In sorted
    order a text comes after all its prefixes, so one pass with a stack of the prefixes of the current text finds them.
    """

    def __init__(self, keys: Sequence[str], chars: int, share: float) -> None:
        order = sorted(range(len(keys)), key=keys.__getitem__)
        self.group = np.zeros(len(keys), np.int64)
        self.near: dict[int, list[int]] = {}
        prefixes: list[tuple[str, int]] = []
        number, last = -1, None
        for index in order:
            key = keys[index]
            if key != last:
                number, last = number + 1, key
                while prefixes and not key.startswith(prefixes[-1][0]):
                    prefixes.pop()
                for shorter, other in prefixes[:-NEAREST - 1:-1]:
                    if len(shorter) < chars or len(shorter) < share * len(key):
                        break
                    if adds_little(shorter, key, chars, share):
                        self.near.setdefault(number, []).append(other)
                prefixes.append((key, number))
            self.group[index] = number
        self.groups = number + 1

    def repeats(self, rank: NDArray[np.uint64], among: Sequence[int] | NDArray[np.int64]) -> list[int]:
        """Indices to drop so that no two of `among` are equal or near duplicates of each other.

        A row is dropped if a shorter one that stays is its near duplicate; of equal texts the one with the lowest
        `rank` stays.
        """
        rows = np.asarray(among, np.int64)
        rows = rows[np.lexsort((rank[rows], self.group[rows]))]
        groups = self.group[rows]
        first = np.ones(len(rows), bool)
        first[1:] = groups[1:] != groups[:-1]
        stays = np.zeros(self.groups, bool)
        stays[groups] = True
        for number, shorter in self.near.items():  # in sorted order: shorter texts first
            stays[number] &= not stays[shorter].any()
        return sorted(rows[~(first & stays[groups])].tolist())

    def crossing(self, left: Sequence[int] | NDArray[np.int64], right: Sequence[int] | NDArray[np.int64]) -> list[int]:
        """Indices in `right` that are equal to or near duplicates of any row in `left`."""
        there = np.zeros(self.groups, bool)
        there[self.group[np.asarray(left, np.int64)]] = True
        hit = there.copy()
        for number, shorter in self.near.items():
            hit[number] |= there[shorter].any()
            if there[number]:
                hit[shorter] = True
        rows = np.asarray(right, np.int64)
        return sorted(rows[hit[self.group[rows]]].tolist())
