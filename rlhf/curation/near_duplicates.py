"""Near-identical prompts: one definition for the rules that drop them and the checks that look for leaks.

Two prompts are near duplicates where, in lower case and without punctuation, they are equal, or share a prefix of at
least `chars` characters that is at least `share` of the longer one [InstructGPT §3.2: "a long common prefix"].
"""

import math
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

_NOISE = re.compile(r"[\W_]+")
_LAST = "\U0010ffff"


def normalised(prompt: str) -> str:
    """The prompt in lower case, everything but letters and digits one blank; as it is where nothing else is left."""
    return _NOISE.sub(" ", prompt.casefold()).strip() or prompt


def shared_prefix(one: str, other: str) -> int:
    """How many characters two texts have in common from the start."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # bisection over slices: compared in C
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


class PrefixIndex:
    """Finds near duplicates among `keys` (normalised prompts) in about n log n, however many share a prefix.

    Sorted, all prompts that begin like one prompt stand next to each other; so what a row must share with a shorter
    one (`head` characters) is a range of places. Rows whose neighbours share less are skipped at once.
    """

    def __init__(self, keys: Sequence[str], chars: int, share: float) -> None:
        self.size = len(keys)
        self.order = sorted(range(len(keys)), key=keys.__getitem__)
        self.sorted = [keys[index] for index in self.order]
        lengths = np.fromiter(map(len, self.sorted), np.int64, len(keys))
        # A head of the whole text and more can only be shared by equal texts.
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

        A row goes where a shorter one that stays is its near duplicate; between equal texts that of the lower `rank`
        stays.
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
        seen = bytearray(self.size)  # rows of `left` that are no longer than the one in hand
        open_ = bytearray(self.size)  # rows of `right`, likewise, that nothing has met yet
        found: list[int] = []
        for group in _runs_of_equal_length(self.by_length, self.sorted):
            for place in group:
                seen[place] |= sides[place] & 1
                open_[place] |= sides[place] >> 1
            for place in group:
                low, high = self._range(place)
                if sides[place] & 2 and open_[place] and seen.find(1, low, high) >= 0:
                    open_[place] = 0
                    found.append(self.order[place])
                if sides[place] & 1:
                    met = open_.find(1, low, high)
                    while met >= 0:
                        open_[met] = 0
                        found.append(self.order[met])
                        met = open_.find(1, met + 1, high)
        return sorted(found)


def _runs_of_equal_length(places: list[int], texts: list[str]) -> Iterator[list[int]]:
    start = 0
    for end in range(1, len(places) + 1):
        if end == len(places) or len(texts[places[end]]) != len(texts[places[start]]):
            yield places[start:end]
            start = end
