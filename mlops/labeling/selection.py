"""Selects prompts for labeling: those on whose completions an ensemble of reward models disagrees most.

Query by committee [Seung et al. 1992], with the variance of the predicted preference as disagreement [Christiano et al.
2017, arXiv 1706.03741, §2.2.4].
"""

from collections.abc import Sequence
from itertools import combinations

import numpy as np


def disagreement(scores: Sequence[Sequence[float]]) -> float:
    """Mean over all pairs of completions of the ensemble's variance of P(one is preferred to the other).

    scores [members][completions], at least two of each; between 0 and 0.25. P is the sigmoid of the scores' difference.
    """
    table = np.asarray(scores, dtype=np.float64)
    pairs = np.array(list(combinations(range(table.shape[1]), 2)))
    preferred = 1 / (1 + np.exp(table[:, pairs[:, 1]] - table[:, pairs[:, 0]]))
    return float(preferred.var(axis=0).mean())


def most_disputed(scores: Sequence[Sequence[Sequence[float]]], count: int) -> list[int]:
    """Indices of the `count` items with the largest disagreement, ascending; ties go to the earlier item.

    scores [items][members][completions].
    """
    values = [disagreement(item) for item in scores]
    return sorted(sorted(range(len(values)), key=lambda index: (-values[index], index))[:count])
