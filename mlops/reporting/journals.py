"""A run's journals as columns of numbers: what the report draws and describes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlops.config.loader import load_params
from rlhf.errors import UserError
from rlhf.params import PpoParams
from rlhf.training.journal import read_journal

RUN_MARK = "<!-- run -->"  # in the report, where its upload to MLflow says which run it is of
Rows = list[dict[str, str]]


def read_rows(path: Path) -> Rows:
    """The rows of a journal; none without the file."""
    return read_journal(path) if path.exists() else []


def column(rows: Rows, name: str) -> np.ndarray:
    """A journal's column; NaN where it is absent, blank or not a number."""
    values = np.full(len(rows), math.nan)
    for i, row in enumerate(rows):
        try:
            values[i] = float(row.get(name) or math.nan)
        except ValueError:
            continue
    return np.where(np.isfinite(values), values, math.nan)


def columns(rows: Rows, *names: str) -> list[np.ndarray]:
    return [column(rows, name) for name in names]


def measured(values: np.ndarray) -> bool:
    """Whether there is a number at all."""
    return bool(np.isfinite(values).any())


def ends(values: np.ndarray) -> tuple[float, float] | None:
    """The means of the first and of the last tenth of the numbers; None of fewer than two."""
    finite = values[np.isfinite(values)]
    tenth = max(1, len(finite) // 10)
    return (float(finite[:tenth].mean()), float(finite[-tenth:].mean())) if len(finite) > 1 else None


@dataclass(frozen=True)
class KlRule:
    """What an arm's β follows. `goal`: nats, None where β is fixed; `band`: KL may be `band` times the goal, or the
    goal `band` times KL."""

    name: str = "step"
    goal: float | None = None
    band: float = 1.5
    factor: float = 2.0

    @property
    def limits(self) -> tuple[float, float] | None:
        """The lowest and highest KL of the band, nats."""
        return None if self.goal is None else (self.goal / self.band, self.goal * self.band)


def kl_rule(params: PpoParams, goal: float | None = None) -> KlRule:
    """The rule of an arm's parameters. `goal`: that of its journal, where there is one."""
    fixed = params.beta_rule == "fixed"
    return KlRule(params.beta_rule, None if fixed else goal or params.kl_goal, params.beta_band, params.beta_factor)


def rules_of(root: Path, runs: Mapping[str, Rows]) -> dict[str, KlRule]:
    """The rule of each arm, by the profile of `root`; the article's band where there is no profile to read."""
    try:
        arms = load_params(root).stages.arms
    except (OSError, UserError):
        arms = {}
    goals = {arm: last(rows, "ppo/kl_goal") for arm, rows in runs.items()}
    return {arm: kl_rule(arms[arm], goals[arm]) if arm in arms else KlRule(goal=goals[arm]) for arm in runs}


def last(rows: Rows, name: str) -> float | None:
    """The last number of a column."""
    values = column(rows, name)
    return float(values[np.isfinite(values)][-1]) if measured(values) else None


def changes(steps: np.ndarray, values: np.ndarray) -> list[int]:
    """The steps at which a column differs from the number before it."""
    keep = np.isfinite(values)
    steps, values = steps[keep], values[keep]
    return [int(step) for step, before, after in zip(steps[1:], values[:-1], values[1:], strict=True)
            if not math.isclose(before, after, rel_tol=1e-9)]


def listed(numbers: Sequence[int], most: int = 8) -> str:
    """ "3, 9 and 12"; of more than `most` the first and the last."""
    if len(numbers) > most:
        return f"{len(numbers)} times between {numbers[0]} and {numbers[-1]}"
    words = [str(number) for number in numbers]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
