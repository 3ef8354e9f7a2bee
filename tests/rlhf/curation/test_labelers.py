"""Labelers who rank by position or at random are named with the statistic; careful ones are not."""

import random

import pytest

from rlhf.curation.labelers import (
    Comparison,
    Count,
    agreement_by_pair,
    by_position,
    doubtful_labelers,
    leanings,
    order_correlation,
    outliers_of,
)


def pairs(name: str, count: int, first: float, rng: random.Random) -> list[Comparison]:
    """Pairs of which the labeler prefers the one written first in a share of `first`."""
    return [(name, f"{name} prompt {n}", ("a", "b"), (1, 2) if rng.random() < first else (2, 1)) for n in range(count)]


def test_order_correlation_is_kendall_s_tau() -> None:
    assert [order_correlation(ranks) for ranks in ((1, 2, 3, 4), (2, 1), (1, 2, 2), (3, 1, 2))] == [
        1, -1, pytest.approx(2 / 3), pytest.approx(-1 / 3)]


@pytest.mark.parametrize(("share", "sign"), [(1.0, "+"), (0.97, "+"), (0.0, "-")])
def test_one_who_ranks_by_position_is_named_with_the_statistic(share: float, sign: str) -> None:
    rng = random.Random(1)
    rows = [*pairs("ann", 40, 0.5, rng), *pairs("bo", 40, share, rng), *pairs("cy", 40, 0.5, rng)]
    [said] = doubtful_labelers(rows)
    assert said.startswith(f"labeler bo ranks by position: mean order correlation {sign}")
    assert "z = " in said


def test_rankings_of_many_completions_too() -> None:
    rng = random.Random(2)
    rows = [(name, f"{name}{n}", tuple("abcdef"), tuple(range(1, 7) if name == "bo" else rng.sample(range(1, 7), 6)))
            for n in range(25) for name in ("ann", "bo")]
    assert list(by_position((name, ranks) for name, _, _, ranks in rows)) == ["bo"]


def test_data_that_is_written_best_first_says_nothing_of_its_labelers() -> None:
    rng = random.Random(3)
    assert doubtful_labelers([row for name in ("ann", "bo", "cy") for row in pairs(name, 60, 1.0, rng)]) == []
    assert doubtful_labelers(pairs("ann", 60, 1.0, rng)) == []  # nobody to compare with
    assert doubtful_labelers([*pairs("ann", 60, 1.0, rng), *pairs("unknown", 60, 0.5, rng)]) == []


def test_a_source_that_writes_the_better_one_first_beside_another_says_nothing_of_its_labelers() -> None:
    rng = random.Random(5)
    rows = [*pairs("ann", 60, 1.0, rng), *pairs("bo", 60, 1.0, rng), *pairs("cy", 60, 0.5, rng)]
    assert doubtful_labelers(rows) == []
    assert list(by_position(((name, ranks) for name, _, _, ranks in rows), as_shown=True)) == ["ann", "bo"]


def test_few_rankings_and_a_slight_leaning_say_nothing() -> None:
    rng = random.Random(4)
    assert doubtful_labelers([*pairs("ann", 60, 0.5, rng), *pairs("bo", 15, 1.0, rng)]) == []
    assert doubtful_labelers([*pairs("ann", 200, 0.5, rng), *pairs("bo", 200, 0.7, rng)]) == []


def ranked(names: dict[str, float], count: int, seed: int) -> list[Comparison]:
    """The same pairs by each labeler, who finds the better one in a share of them; written in a random order."""
    rng = random.Random(seed)
    rows: list[Comparison] = []
    for n in range(count):
        texts = ("good", "bad") if rng.random() < 0.5 else ("bad", "good")
        for name, right in names.items():
            best = "good" if rng.random() < right else "bad"
            rows.append((name, f"prompt {n}", texts, tuple(1 if text == best else 2 for text in texts)))
    return rows


def test_one_who_answers_at_random_is_named_and_the_others_are_not() -> None:
    [said] = doubtful_labelers(ranked({"ann": 0.95, "bo": 0.95, "cy": 0.95, "dice": 0.5}, 40, 1))
    assert said.startswith("labeler dice agrees with the others on ")
    assert said.endswith("50 % is chance")


def test_two_who_answer_at_random_are_both_named() -> None:
    said = doubtful_labelers(ranked({"a": 0.97, "b": 0.97, "c": 0.97, "d": 0.97, "x": 0.5, "y": 0.5}, 80, 2))
    assert [sentence.split()[1] for sentence in said] == ["x", "y"]


def test_people_who_agree_as_people_do_are_not_named() -> None:
    for seed in range(20):
        assert doubtful_labelers(ranked(dict.fromkeys("abcde", 0.84), 60, seed)) == []
    assert doubtful_labelers(ranked(dict.fromkeys("abcdefghijklmnopqrst", 0.84), 60, 1)) == []


def test_completions_in_another_order_are_the_same_pair() -> None:
    rows: list[Comparison] = [("a", "p", ("x", "y"), (1, 2)), ("b", "p", ("y", "x"), (2, 1)),
                              ("c", "p", ("x", "y"), (2, 1)), ("d", "q", ("x", "y"), (2, 1)),
                              ("e", "p", ("x", "y"), (1, 1))]
    assert agreement_by_pair(rows) == (
        {("a", "b"): Count(1, 1), ("a", "c"): Count(0, 1), ("b", "c"): Count(0, 1)}, {"a": 1, "b": 1, "c": 1})


def test_outliers_are_taken_out_one_after_the_other() -> None:
    counts = {("a", "b"): Count(95, 100), ("a", "x"): Count(50, 100), ("b", "x"): Count(50, 100),
              ("a", "y"): Count(20, 100), ("b", "y"): Count(20, 100), ("x", "y"): Count(50, 100)}
    assert [item.name for item in outliers_of(counts)] == ["x", "y"]
    assert outliers_of({}) == []
    assert leanings([]) == {}
