"""Near-duplicate prompts: one definition for the rules that drop them and for the leakage checks.

Two prompts are the same if `normalised` makes them equal: case, white space, Unicode form, characters without width,
look-alike letters of other alphabets and punctuation at the end do not count; symbols and digits do. They are near
duplicates if they share a prefix of at least `chars` characters that is at least `share` of the longer one
[InstructGPT §3.2: "a long common prefix"].
"""

import math
import re
import unicodedata
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

_LAST = "\U0010ffff"
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
_FILLERS = "\u034f\u115f\u1160\u2800\u3164\uffa0"  # blanks that are no white space to Unicode
_CLOSING = " .,;:!?\u3002\u3001\uff61\u061f\u061b\u06d4\u0964\u0965"
_OPENING = " \u00a1\u00bf"


def normalised(prompt: str) -> str:
    """The prompt as it is compared with others; prompts that ask the same have the same text.

    NFKC, lower case, one blank for white space; without characters of no width (format characters, variation
    selectors) and without punctuation at the end; Cyrillic, Greek and Armenian letters in Latin words become the Latin
    ones that they look like. Symbols and digits stay: C, C++ and C# differ. A text of punctuation only keeps it.
    """
    text = prompt if prompt.isascii() else _plain_letters(prompt)
    text = " ".join(text.casefold().split())
    return text.rstrip(_CLOSING).lstrip(_OPENING) or text


def same_user(user_id: str) -> str:
    """The user id as it is compared with others: NFKC, lower case, one blank for white space, none at the ends."""
    return " ".join(_visible(unicodedata.normalize("NFKC", user_id)).casefold().split())


def _visible(text: str) -> str:
    """The text without format characters (Cf) and variation selectors, which have no width."""
    if text.isascii():
        return text
    return "".join(character for character in text if not (
        unicodedata.category(character) == "Cf" or "\ufe00" <= character <= "\ufe0f" or character in _FILLERS
        or "\U000e0100" <= character <= "\U000e01ef"))


def _plain_letters(text: str) -> str:
    """NFKC of the visible text, with plain quotes and dashes and without look-alike letters in Latin words."""
    text = unicodedata.normalize("NFKC", _visible(text)).translate(_TYPOGRAPHY)
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


def shared_prefix(one: str, other: str) -> int:
    """The length of the common prefix of two texts."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # bisection: Python compares slices in C
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


class PrefixIndex:
    """Finds near duplicates among `keys` (normalised prompts) in about n log n, however many share a prefix.

    In sorted order all prompts with a common prefix are adjacent. A row's near duplicates that are no longer than it
    share its first `head` characters, so they lie in one range of places (positions in sorted order). Rows whose
    neighbours share less than that are skipped at once.
    """

    def __init__(self, keys: Sequence[str], chars: int, share: float) -> None:
        self.size = len(keys)
        self.order = sorted(range(len(keys)), key=keys.__getitem__)
        self.sorted = [keys[index] for index in self.order]
        lengths = np.fromiter(map(len, self.sorted), np.int64, len(keys))
        # A head of at least the whole text is shared by equal texts only.
        self.heads = [length if length < chars else max(chars, math.ceil(share * length))
                      for length in lengths.tolist()]
        common = np.zeros(len(keys) + 1, np.int64)
        for place in range(1, len(keys)):
            common[place] = shared_prefix(self.sorted[place - 1], self.sorted[place])
        neighbour = np.maximum(common[:-1], common[1:])
        candidates = np.flatnonzero(neighbour >= np.array(self.heads, np.int64))
        self.by_length = candidates[np.argsort(lengths[candidates], kind="stable")].tolist()
        self.place = np.empty(len(keys), np.int64)
        self.place[self.order] = np.arange(len(keys))

    def _range(self, place: int) -> tuple[int, int]:
        head = self.sorted[place][: self.heads[place]]
        return bisect_left(self.sorted, head, 0, place + 1), bisect_left(self.sorted, head + _LAST, place)

    def repeats(self, rank: "np.ndarray", among: Iterable[int]) -> list[int]:
        """Indices to drop so that no two of `among` are near duplicates of each other.

        A row is dropped if a shorter one that stays is its near duplicate; of equal texts the one with the lowest
        `rank` stays.
        """
        member = bytearray(self.size)
        for index in among:
            member[self.place[index]] = 1
        stays, dropped = bytearray(self.size), []
        places = [place for place in self.by_length if member[place]]
        places.sort(key=lambda place: (len(self.sorted[place]), self.sorted[place], rank[self.order[place]]))
        for place in places:
            low, high = self._range(place)
            if stays.find(1, low, high) >= 0:
                dropped.append(self.order[place])
            else:
                stays[place] = 1
        return sorted(dropped)

    def crossing(self, left: Iterable[int], right: Iterable[int]) -> list[int]:
        """Indices in `right` that are near duplicates of any row in `left`."""
        sides = bytearray(self.size)
        for index in left:
            sides[self.place[index]] |= 1
        for index in right:
            sides[self.place[index]] |= 2
        seen = bytearray(self.size)  # rows of `left` that are no longer than the current one
        unmatched = bytearray(self.size)  # rows of `right` that are no longer and have no near duplicate yet
        matched: list[int] = []
        for group in _runs_of_equal_length(self.by_length, self.sorted):
            for place in group:
                seen[place] |= sides[place] & 1
                unmatched[place] |= sides[place] >> 1
            for place in group:
                low, high = self._range(place)
                if sides[place] & 2 and unmatched[place] and seen.find(1, low, high) >= 0:
                    unmatched[place] = 0
                    matched.append(self.order[place])
                if sides[place] & 1:
                    match = unmatched.find(1, low, high)
                    while match >= 0:
                        unmatched[match] = 0
                        matched.append(self.order[match])
                        match = unmatched.find(1, match + 1, high)
        return sorted(matched)


def _runs_of_equal_length(places: list[int], texts: list[str]) -> Iterator[list[int]]:
    start = 0
    for end in range(1, len(places) + 1):
        if end == len(places) or len(texts[places[end]]) != len(texts[places[start]]):
            yield places[start:end]
            start = end
