"""Which prompts an ensemble of reward models disagrees on most."""

import math
from itertools import combinations
from statistics import pvariance

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlops.labeling.selection import disagreement, most_disputed

SCORES = st.floats(-20, 20)


def by_hand(scores: list[list[float]]) -> float:
    pairs = list(combinations(range(len(scores[0])), 2))
    found = [pvariance([1 / (1 + math.exp(member[b] - member[a])) for member in scores]) for a, b in pairs]
    return sum(found) / len(found)


@given(st.integers(2, 5).flatmap(lambda k: st.lists(st.lists(SCORES, min_size=k, max_size=k), min_size=2, max_size=5)))
def test_disagreement_is_the_mean_variance_of_the_preference(scores: list[list[float]]) -> None:
    assert disagreement(scores) == pytest.approx(by_hand(scores), abs=1e-12)
    assert 0 <= disagreement(scores) <= 0.25
    shifted = [[value + member for value in row] for member, row in enumerate(scores)]
    assert disagreement(shifted) == pytest.approx(disagreement(scores), abs=1e-9)  # a model's zero says nothing


def test_the_most_disputed_in_their_order() -> None:
    sure, unsure, torn = [[5.0, 0.0], [6.0, 0.0]], [[1.0, 0.0], [0.0, 0.5]], [[9.0, 0.0], [0.0, 9.0]]
    assert disagreement(torn) == pytest.approx(0.25, abs=1e-3)
    assert most_disputed([unsure, sure, torn, sure], 2) == [0, 2]
    assert most_disputed([sure, sure, sure], 2) == [0, 1]
