"""Reward-model over-optimisation: proxy and gold score against the KL from the SFT policy, and the gold score's peak.

Gao, Schulman and Hilton 2022 (arXiv 2210.10760): with d = sqrt(KL), the gold score is d (a - b d) for best-of-n and
d (a - b ln d) for reinforcement learning; both fall after their peak.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def best_of_n(proxy: Sequence[Sequence[float]], gold: Sequence[Sequence[float]], sizes: Sequence[int]
              ) -> list[dict[str, float]]:
    """A row per n: n, kl, proxy and gold score of the sample with the highest proxy score among n, and standard errors
    of the gold score and of its difference from the highest gold score of the curve, paired by prompt.

    proxy, gold [prompts][N]: scores of N samples per prompt. Each n uses all N: the unbiased estimate over all subsets
    of size n [Nakano et al. 2021, App. I]. KL(best-of-n || policy) = ln n - (n - 1) / n nats.
    """
    rows, golds = [], []
    drawn = len(proxy[0])
    for n in sizes:
        weights = np.array([math.comb(rank, n - 1) / math.comb(drawn, n) for rank in range(drawn)])
        expected = []
        for ours, true in zip(proxy, gold, strict=True):
            order = np.argsort(np.asarray(ours), kind="stable")
            expected.append((float(weights @ np.asarray(ours)[order]), float(weights @ np.asarray(true)[order])))
        values = np.array(expected)
        golds.append(values[:, 1])
        rows.append({"n": n, "kl": math.log(n) - (n - 1) / n, "rm_score": float(values[:, 0].mean()),
                     "gold": float(values[:, 1].mean()), "gold_stderr": _stderr(values[:, 1])})
    highest = max(golds, key=lambda values: values.mean())
    for row, values in zip(rows, golds, strict=True):
        row["drop_stderr"] = _stderr(highest - values)
    return rows


def _stderr(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


@dataclass(frozen=True)
class Peak:
    """The peak of the gold score over KL.

    Observed: `peak_kl` of the smoothed scores, `drop` from there to the end, `turned` if the drop exceeds twice its
    standard error. From the fit of Gao's curve: `fitted_kl` of the peak and the `fitted_gain` there; infinite and NaN
    if the curve still rises at three times the largest observed distance.
    """

    peak_kl: float
    drop: float
    turned: bool
    drop_stderr: float
    fitted_kl: float
    fitted_gain: float


def find_peak(kl: Sequence[float], gold: Sequence[float], form: str, smooth: int = 5,
              drop_stderr: float | None = None) -> Peak:
    """The peak of the gold scores of a run, in its order; form: "rl" or "best_of_n".

    `smooth`: width of the moving average. `drop_stderr`: standard error of the drop if known; else estimated from the
    differences of neighbouring scores.
    """
    scores = np.asarray(gold, dtype=np.float64)
    width = min(smooth, len(scores))
    smoothed = np.convolve(scores, np.ones(width) / width, "valid")
    centres = np.convolve(np.asarray(kl, dtype=np.float64), np.ones(width) / width, "valid")
    if drop_stderr is None:  # of the difference of two means of `width` scores
        drop_stderr = float(np.diff(scores).std()) / math.sqrt(width)
    top = int(smoothed.argmax())
    drop = float(smoothed[top] - smoothed[-1])
    fitted_kl, gain = fit_peak(np.asarray(kl, dtype=np.float64), scores - scores[0], form)
    return Peak(float(centres[top]), drop, drop > 2 * drop_stderr, drop_stderr, fitted_kl, gain)


def fit_peak(kl: np.ndarray, gain: np.ndarray, form: str) -> tuple[float, float]:
    """(KL at the peak, gain there) of the least-squares fit of Gao's curve; (inf, NaN) without a peak in reach."""
    distance = np.sqrt(np.maximum(kl, 0))
    used = distance > 1e-3
    d = distance[used]
    if len(d) < 2:
        return math.inf, math.nan
    second = -d * d if form == "best_of_n" else -d * np.log(d)
    (a, b), *_ = np.linalg.lstsq(np.stack([d, second], 1), gain[used], rcond=None)
    if (a <= 0 and form == "best_of_n") or b <= 0:
        return math.inf, math.nan
    peak = a / (2 * b) if form == "best_of_n" else math.exp(min(50.0, a / b - 1))
    if peak > 3 * d.max():
        return math.inf, math.nan
    return float(peak * peak), float(peak * (a - b * (peak if form == "best_of_n" else math.log(peak))))
