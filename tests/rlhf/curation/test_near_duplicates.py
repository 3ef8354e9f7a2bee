"""Near duplicates, compared with the definition applied to every pair."""

import math
import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.curation.near_duplicates import PrefixIndex, normalised, shared_prefix

CHARS, SHARE = 4, 0.7
keys = st.lists(st.text(alphabet="ab", max_size=14), max_size=40)


def near(one: str, other: str) -> bool:
    common = next((place for place, (x, y) in enumerate(zip(one, other, strict=False)) if x != y),
                  min(len(one), len(other)))
    longest = max(len(one), len(other))
    return one == other or (common >= CHARS and common >= SHARE * longest)


@settings(max_examples=400, deadline=None)
@given(keys, st.integers(0, 2**31))
def test_a_row_is_dropped_exactly_if_it_is_near_a_shorter_row_that_stays(texts: list[str], seed: int) -> None:
    rank = np.array(random.Random(seed).sample(range(1000), len(texts)))
    among = [index for index in range(len(texts)) if index % 3 or len(texts) < 5]
    dropped = set(PrefixIndex(texts, CHARS, SHARE).repeats(rank, among))
    stay = [index for index in among if index not in dropped]
    assert dropped <= set(among)
    for place, one in enumerate(stay):
        assert not any(near(texts[one], texts[other]) for other in stay[:place])
    for index in dropped:
        assert any(near(texts[index], texts[other]) and len(texts[other]) <= len(texts[index]) for other in stay)
        twins = [other for other in among if texts[other] == texts[index]]
        assert len([other for other in twins if other in stay]) <= 1
        assert not any(other in stay and rank[other] > rank[index] for other in twins)


@settings(max_examples=400, deadline=None)
@given(keys, st.data())
def test_crossing_finds_every_pair_between_the_sides(texts: list[str], data: st.DataObject) -> None:
    sides = data.draw(st.lists(st.sampled_from("lr-"), min_size=len(texts), max_size=len(texts)))
    left = [index for index, side in enumerate(sides) if side == "l"]
    right = [index for index, side in enumerate(sides) if side == "r"]
    expected = [index for index in right if any(near(texts[index], texts[other]) for other in left)]
    assert PrefixIndex(texts, CHARS, SHARE).crossing(left, right) == expected


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="abc", max_size=30), st.text(alphabet="abc", max_size=30))
def test_the_shared_prefix_is_that_of_a_count(one: str, other: str) -> None:
    counted = next((place for place, (x, y) in enumerate(zip(one, other, strict=False)) if x != y),
                   min(len(one), len(other)))
    assert shared_prefix(one, other) == counted


def test_a_longer_row_between_two_near_duplicates_does_not_hide_them() -> None:
    base = "p" * 50
    texts = [base, base + "a" * 100, base + "b"]
    assert PrefixIndex(texts, 40, 0.9).repeats(np.arange(3), range(3)) == [2]
    assert math.ceil(0.9 * 51) <= 50


def test_case_punctuation_and_blanks_do_not_count_but_prompts_of_symbols_only_stay_unchanged() -> None:
    assert normalised("What  is\tTHAT?!") == normalised("what is that") == "what is that"
    assert normalised("???") != normalised("!!!")
    assert normalised("日本語、です") == "日本語 です"
