"""Inter-labeler agreement: pairwise as InstructGPT counts it, Krippendorff's alpha, by labeler and use case; outliers
among the labelers, and the items to adjudicate.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from mlops.labeling.batch import Item
from mlops.labeling.store import Label

Z = 1.959963984540054  # two-sided 95 %


@dataclass
class Count:
    """Agreeing pairs among those on which both labelers have a preference."""

    agreed: int = 0
    pairs: int = 0

    @property
    def share(self) -> float:
        return self.agreed / self.pairs if self.pairs else math.nan

    def add(self, other: "Count") -> None:
        self.agreed += other.agreed
        self.pairs += other.pairs

    def clearly_below(self, other: "Count") -> bool:
        """Whether both have pairs and this one's 95 % interval lies below the other's."""
        return bool(self.pairs and other.pairs) and self.interval()[1] < other.interval()[0]

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
    """`alpha`: Krippendorff's, of the preferences in all pairs (worse, tie, better as an ordinal scale); NaN without an
    item that has two labels. `by_labeler`: each against all others. `adjudicate`: item ids."""

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

    An outlier agrees with the others less than they agree among themselves, and the two 95 % intervals do not overlap.
    An item needs adjudication where its labelers agree on less than `below` of the pairs, or have no pair in common.
    """
    by_item: dict[str, list[Label]] = defaultdict(list)
    for label in labels:
        by_item[label.item_id].append(label)
    shared = {item_id: sorted(own, key=lambda label: label.labeler_id) for item_id, own in sorted(by_item.items())
              if len(own) > 1}
    overall = Count()
    by_labeler: dict[str, Count] = defaultdict(Count)
    by_use_case: dict[str, Count] = defaultdict(Count)
    among_others: dict[str, Count] = defaultdict(Count)
    names = sorted({label.labeler_id for own in shared.values() for label in own})
    adjudicate = []
    for item_id, own in shared.items():
        in_item = Count()
        for one, other in combinations(own, 2):
            pair = {one.labeler_id, other.labeler_id}
            for total in (overall, in_item, by_use_case[str(items[item_id].row["use_case"])],
                          *(by_labeler[name] for name in pair),
                          *(among_others[name] for name in names if name not in pair)):
                total.add(_agreeing_pairs(one, other))
        if not in_item.pairs or in_item.share < below:
            adjudicate.append(item_id)
    outliers = [name for name in names if by_labeler[name].clearly_below(among_others[name])]
    return Agreement(overall, alpha(shared.values()), dict(sorted(by_labeler.items())),
                     dict(sorted(by_use_case.items())), outliers, adjudicate)


def agreement_with(truth: Mapping[str, Sequence[int]], labels: Iterable[Label]) -> tuple[dict[str, Count], list[str]]:
    """Screens labelers against known rankings {item: ranks}: (agreement by labeler, outliers).

    An outlier agrees with the truth less than all others together, and the two 95 % intervals do not overlap.
    """
    by_labeler: dict[str, Count] = defaultdict(Count)
    for label in labels:
        if label.item_id in truth:
            known = Label("", label.item_id, "", tuple(truth[label.item_id]))
            by_labeler[label.labeler_id].add(_agreeing_pairs(label, known))
    outliers = []
    for name in sorted(by_labeler):
        others = Count()
        for other, count in by_labeler.items():
            if other != name:
                others.add(count)
        if by_labeler[name].clearly_below(others):
            outliers.append(name)
    return dict(sorted(by_labeler.items())), outliers


def _agreeing_pairs(one: Label, other: Label) -> Count:
    """Pairs on which both have a preference, and how many of them agree."""
    mine, theirs = preferences(one), preferences(other)
    both = [(mine[pair], theirs[pair]) for pair in mine if mine[pair] and theirs[pair]]
    return Count(sum(a == b for a, b in both), len(both))


def alpha(groups: Iterable[Sequence[Label]]) -> float:
    """Krippendorff's alpha: units are the pairs of every item, values -1, 0, 1 on an ordinal scale."""
    by_item = [[(label.labeler_id, preferences(label)) for label in group] for group in groups]
    labelers = sorted({name for item in by_item for name, _ in item})
    columns = []
    for item in by_item:
        for pair in item[0][1]:
            values = {name: preference[pair] for name, preference in item}
            columns.append([values.get(name, math.nan) for name in labelers])
    if not columns or len({value for column in columns for value in column if not math.isnan(value)}) < 2:
        return math.nan
    import krippendorff  # not installed on a bare GPU machine

    return float(krippendorff.alpha(np.array(columns, dtype=float).T, level_of_measurement="ordinal"))
