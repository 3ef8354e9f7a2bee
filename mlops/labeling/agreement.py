"""Inter-labeler agreement: pairwise as InstructGPT counts it, Krippendorff's alpha, by labeler and use case; outliers
among the labelers, and the items to adjudicate.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from mlops.labeling.batch import Assignment, Item
from mlops.labeling.store import Label
from rlhf.curation.labelers import Count, Leaning, by_position, leanings, outliers_of


@dataclass(frozen=True)
class Agreement:
    """`alpha`: Krippendorff's, of the preferences in all pairs (worse, tie, better as an ordinal scale); NaN without an
    item that has two labels. `with_ties`: of all pairs, a tie being an answer as any other. `by_labeler`: each against
    all others. `adjudicate`: item ids."""

    overall: Count
    with_ties: Count
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

    An outlier agrees with the others less than they agree among themselves, by 10 percentage points at least, and the
    two 95 % intervals do not overlap; one labeler is taken out after the other. An item needs adjudication where its
    labelers say the same of less than `below` of the pairs: a tie is an answer too, so ties of all are agreement.
    """
    by_item: dict[str, list[Label]] = defaultdict(list)
    for label in labels:
        by_item[label.item_id].append(label)
    shared = {item_id: sorted(own, key=lambda label: label.labeler_id) for item_id, own in sorted(by_item.items())
              if len(own) > 1}
    overall, with_ties = Count(), Count()
    by_labeler: dict[str, Count] = defaultdict(Count)
    by_use_case: dict[str, Count] = defaultdict(Count)
    by_pair: dict[tuple[str, str], Count] = defaultdict(Count)
    adjudicate = []
    for item_id, own in shared.items():
        in_item = Count()
        for one, other in combinations(own, 2):
            for total in (overall, by_use_case[str(items[item_id].row.get("use_case", "other"))],
                          by_labeler[one.labeler_id], by_labeler[other.labeler_id],
                          by_pair[one.labeler_id, other.labeler_id]):
                total.add(_agreeing_pairs(one, other))
            in_item.add(_same_answers(one, other))
        with_ties.add(in_item)
        if in_item.share < below:
            adjudicate.append(item_id)
    outliers = [item.name for item in outliers_of(by_pair)]
    return Agreement(overall, with_ties, alpha(shared.values()), dict(sorted(by_labeler.items())),
                     dict(sorted(by_use_case.items())), outliers, adjudicate)


def positions(labels: Iterable[Label], assignments: Iterable[Assignment]) -> tuple[dict[str, Leaning], list[str]]:
    """How far each labeler's ranks follow the order in which the completions were shown: ({labeler: leaning}, those
    who rank by position). Labels without an assignment are left out."""
    order = {(item.item_id, item.labeler_id): item.order for item in assignments}
    shown = [(label.labeler_id, [label.ranks[index] for index in order[label.item_id, label.labeler_id]])
             for label in labels if (label.item_id, label.labeler_id) in order]
    return leanings(shown), sorted(by_position(shown, as_shown=True))


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


def _same_answers(one: Label, other: Label) -> Count:
    """All pairs, and on how many of them both say the same: the one, the other, or a tie."""
    mine, theirs = preferences(one), preferences(other)
    return Count(sum(mine[pair] == theirs[pair] for pair in mine), len(mine))


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
