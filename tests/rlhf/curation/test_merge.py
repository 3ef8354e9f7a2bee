"""Rankings of one prompt that become one."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.curation.merge import merged_ranking


def test_pairs_that_agree_become_one_ranking() -> None:
    assert merged_ranking([(["b", "c"], [1, 2]), (["a", "b"], [1, 2])]) == (["a", "b", "c"], [1, 2, 3])
    assert merged_ranking([(["a", "b"], [1, 1]), (["b", "c"], [1, 2])]) == (["a", "b", "c"], [1, 1, 2])


def test_rankings_that_contradict_each_other_or_leave_a_pair_open_stay_apart() -> None:
    assert merged_ranking([(["a", "b"], [1, 2]), (["b", "a"], [1, 2])]) is None
    assert merged_ranking([(["a", "b"], [1, 2]), (["a", "b"], [1, 1])]) is None
    assert merged_ranking([(["a", "b"], [1, 2]), (["a", "c"], [1, 2])]) is None
    assert merged_ranking([(["a", "b"], [1, 2]), (["b", "c"], [1, 2]), (["c", "a"], [1, 2])]) is None


def test_more_than_nine_completions_are_not_merged() -> None:
    chain = [([f"{n:02}", f"{n + 1:02}"], [1, 2]) for n in range(9)]
    assert merged_ranking(chain) is None
    assert merged_ranking(chain[1:]) is not None


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=3, max_size=6))
def test_the_pairs_of_a_ranking_give_the_ranking_back(values: list[int]) -> None:
    ranks = [sorted(set(values)).index(value) + 1 for value in values]
    texts = [f"t{place}" for place in range(len(ranks))]
    pairs = [([texts[a], texts[b]], [1 + (ranks[a] > ranks[b]), 1 + (ranks[b] > ranks[a])])
             for a, b in itertools.combinations(range(len(ranks)), 2)]
    merged = merged_ranking(pairs)
    assert merged is not None
    assert dict(zip(*merged, strict=True)) == dict(zip(texts, ranks, strict=True))
