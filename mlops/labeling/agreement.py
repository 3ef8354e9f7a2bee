"""How far labelers agree: pairwise as InstructGPT counts it, Krippendorff's alpha, by labeler and use case; who is an
outlier, which items someone should look at again.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from mlops.labeling.batch import Item
from mlops.labeling.store import Label

Z = 1.959963984540054  # 95 %


@dataclass
class Count:
    """Agreeing pairs of all that two labelers both have a preference on."""

    agreed: int = 0
    pairs: int = 0

    @property
    def share(self) -> float:
        return self.agreed / self.pairs if self.pairs else math.nan

    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the share."""
        if not self.pairs:
            return 0.0, 1.0
        share, weight = self.share, Z * Z / self.pairs
        middle = (share + weight / 2) / (1 + weight)
        half = Z * math.sqrt(share * (1 - share) / self.pairs + weight / (4 * self.pairs)) / (1 + weight)
        return middle - half, middle + half


@dataclass(frozen=True)
class Agreement:
    """`alpha`: Krippendorff's, of the preferences in all pairs (worse, tie, better as an ordinal scale); nan without an
    item that two have labeled. `by_labeler`: each against all others."""

    overall: Count
    alpha: float
    by_labeler: dict[str, Count]
    by_use_case: dict[str, Count]
    outliers: list[str]
    adjudicate: list[str]


def preferences(label: Label) -> dict[tuple[int, int], int]:
    """(i, j), i < j: 1 where completion i is better, -1 where j is, 0 for a tie."""
    return {(i, j): int(np.sign(label.ranks[j] - label.ranks[i])) for i, j in combinations(range(len(label.ranks)), 2)}


def agreement(labels: Iterable[Label], items: Mapping[str, Item], below: float = 0.5) -> Agreement:
    """Over all items with two labels or more.

    An outlier agrees with the others less than they do among themselves, beyond the 95 % intervals of both. An item is
    to be adjudicated where its labelers agree on less than `below` of the pairs, or on nothing at all.
    """
    by_item: dict[str, list[Label]] = defaultdict(list)
    for label in labels:
        by_item[label.item_id].append(label)
    shared = {name: sorted(found, key=lambda label: label.labeler_id) for name, found in sorted(by_item.items())
              if len(found) > 1}
    overall = Count()
    by_labeler: dict[str, Count] = defaultdict(Count)
    by_use_case: dict[str, Count] = defaultdict(Count)
    among_others: dict[str, Count] = defaultdict(Count)
    names = sorted({label.labeler_id for found in shared.values() for label in found})
    adjudicate = []
    for name, found in shared.items():
        here = Count()
        for one, other in combinations(found, 2):
            count = _agreed(one, other)
            mine = {one.labeler_id, other.labeler_id}
            groups = [overall, here, by_use_case[str(items[name].row["use_case"])], *(by_labeler[who] for who in mine),
                      *(among_others[who] for who in names if who not in mine)]
            for group in groups:
                group.agreed += count.agreed
                group.pairs += count.pairs
        if not here.pairs or here.share < below:
            adjudicate.append(name)
    outliers = [name for name in names if by_labeler[name].pairs and among_others[name].pairs
                and by_labeler[name].interval()[1] < among_others[name].interval()[0]]
    return Agreement(overall, alpha(shared.values()), dict(sorted(by_labeler.items())),
                     dict(sorted(by_use_case.items())), outliers, adjudicate)


def against(labels: Iterable[Label], truth: Mapping[str, Sequence[int]]) -> tuple[dict[str, Count], list[str]]:
    """Screens labelers against known rankings (item: ranks): (agreement by labeler, who is an outlier).

    An outlier agrees with the truth less than all others together do, beyond the 95 % intervals of both.
    """
    found: dict[str, Count] = defaultdict(Count)
    for label in labels:
        if label.item_id in truth:
            known = Label("", label.item_id, "", tuple(truth[label.item_id]))
            count = _agreed(label, known)
            found[label.labeler_id].agreed += count.agreed
            found[label.labeler_id].pairs += count.pairs
    outliers = []
    for name in sorted(found):
        others = Count(sum(item.agreed for other, item in found.items() if other != name),
                       sum(item.pairs for other, item in found.items() if other != name))
        if found[name].pairs and others.pairs and found[name].interval()[1] < others.interval()[0]:
            outliers.append(name)
    return dict(sorted(found.items())), outliers


def _agreed(one: Label, other: Label) -> Count:
    """Pairs that both have a preference on, and those where it is the same."""
    mine, theirs = preferences(one), preferences(other)
    both = [(mine[pair], theirs[pair]) for pair in mine if mine[pair] and theirs[pair]]
    return Count(sum(a == b for a, b in both), len(both))


def alpha(groups: Iterable[Sequence[Label]]) -> float:
    """Krippendorff's alpha: units are the pairs of every item, values -1, 0, 1 on an ordinal scale."""
    found = [[(label.labeler_id, preferences(label)) for label in group] for group in groups]
    labelers = sorted({name for group in found for name, _ in group})
    columns = []
    for group in found:
        for pair in group[0][1]:
            said = {name: wanted[pair] for name, wanted in group}
            columns.append([said.get(name, math.nan) for name in labelers])
    if not columns or len({value for column in columns for value in column if not math.isnan(value)}) < 2:
        return math.nan
    import krippendorff  # only needed here: the trainers run without it

    return float(krippendorff.alpha(np.array(columns, dtype=float).T, level_of_measurement="ordinal"))
