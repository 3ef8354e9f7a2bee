"""Best-of-n against every subset, its KL, and the peak of curves whose peak is known."""

import itertools
import math

import numpy as np
import pytest

from rlhf.evaluation.overoptimisation import best_of_n, find_peak


def test_best_of_n_is_the_mean_over_all_subsets() -> None:
    rng = np.random.default_rng(1)
    proxy, gold = rng.standard_normal((3, 6)), rng.standard_normal((3, 6))
    rows = best_of_n(proxy.tolist(), gold.tolist(), [1, 2, 4, 6])
    golds = {}
    for row in rows:
        n = int(row["n"])
        subsets = [list(subset) for subset in itertools.combinations(range(6), n)]
        chosen = [[(ours[subset].max(), true[subset[int(ours[subset].argmax())]]) for subset in subsets]
                  for ours, true in zip(proxy, gold, strict=True)]
        means = np.array([np.mean(pairs, axis=0) for pairs in chosen])
        assert row["rm_score"] == pytest.approx(means[:, 0].mean())
        assert row["gold"] == pytest.approx(means[:, 1].mean())
        assert row["gold_stderr"] == pytest.approx(means[:, 1].std(ddof=1) / math.sqrt(3))
        golds[n] = means[:, 1]
        assert row["kl"] == pytest.approx(math.log(n) - (n - 1) / n)
    best = max(golds.values(), key=lambda values: values.mean())
    for row in rows:
        assert row["drop_stderr"] == pytest.approx((best - golds[int(row["n"])]).std(ddof=1) / math.sqrt(3))


def test_kl_of_best_of_n_is_that_of_the_chosen_distribution() -> None:
    """The best of n uniform draws from m ranked outcomes, m large: the sum over outcomes itself."""
    m, n = 4000, 8
    edges = (np.arange(m + 1) / m) ** n
    shares = np.diff(edges)
    assert best_of_n([[0.0] * n], [[0.0] * n], [n])[0]["kl"] == pytest.approx((shares * np.log(shares * m)).sum(),
                                                                              abs=1e-3)


@pytest.mark.parametrize(("form", "a", "b"), [("rl", 1.0, 0.9), ("best_of_n", 1.0, 0.4)])
def test_the_peak_of_a_known_curve(form: str, a: float, b: float) -> None:
    kl = np.linspace(0, 6, 80)
    d = np.sqrt(kl)
    curve = d * (a - b * d) if form == "best_of_n" else d * (a - b * np.log(np.maximum(d, 1e-12)))
    true = (a / (2 * b)) ** 2 if form == "best_of_n" else math.exp(a / b - 1) ** 2
    noisy = 5 + curve + np.random.default_rng(1).normal(0, 0.02, len(kl))
    peak = find_peak(kl.tolist(), noisy.tolist(), form)
    assert peak.turned
    assert peak.fitted_kl == pytest.approx(true, rel=0.1)
    assert peak.peak_kl == pytest.approx(true, abs=0.6)
    assert peak.fitted_gain == pytest.approx(curve.max(), abs=0.05)


def test_a_rising_curve_has_no_peak() -> None:
    kl = np.linspace(0, 2, 30)
    noisy = 5 + np.sqrt(kl) + np.random.default_rng(1).normal(0, 0.05, 30)
    peak = find_peak(kl.tolist(), noisy.tolist(), "rl")
    assert not peak.turned
    assert math.isinf(peak.fitted_kl)
