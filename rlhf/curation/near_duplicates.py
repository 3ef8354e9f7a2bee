"""Near-duplicate prompts: one definition for the rules that drop them and for the leakage checks.

Two prompts are near duplicates if, in lower case and without punctuation, they are equal or share a prefix of at least
`chars` characters that is at least `share` of the longer one [InstructGPT §3.2: "a long common prefix"].
"""

import math
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

_NOISE = re.compile(r"[\W_]+")
_LAST = "\U0010ffff"


def normalised(prompt: str) -> str:
    """The prompt in lower case with one blank for all but letters and digits; unchanged if it has neither."""
    return _NOISE.sub(" ", prompt.casefold()).strip() or prompt


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
