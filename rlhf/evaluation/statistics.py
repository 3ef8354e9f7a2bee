"""Bootstrap intervals."""

from collections.abc import Sequence

import numpy as np


def bootstrap(values: Sequence[float], resamples: int, seed: int) -> tuple[float, float, float]:
    """(mean, low, high): the mean and its 95 % percentile bootstrap interval over the values."""
    data = np.asarray(values, dtype=np.float64)
    random = np.random.default_rng(seed)
    means = np.array([data[random.integers(0, len(data), len(data))].mean() for _ in range(resamples)])
    low, high = np.percentile(means, [2.5, 97.5])
    return float(data.mean()), float(low), float(high)


def with_interval(name: str, values: Sequence[float], resamples: int, seed: int) -> dict[str, float]:
    """{name, name_low, name_high}: mean and interval of one value per prompt."""
    mean, low, high = bootstrap(values, resamples, seed)
    return {name: mean, f"{name}_low": low, f"{name}_high": high}
