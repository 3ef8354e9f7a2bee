"""The rules for β, the coefficient of the KL to the reference policy.

*step* is the seed article's (after Schulman et al. 2017 §4, but with the KL to the policy before fine-tuning):
KL > 1.5·KL_goal doubles β, KL < KL_goal/1.5 halves it. *proportional* is Ziegler et al.'s, *fixed* InstructGPT's.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from rlhf.params import PpoParams

UPPER, LOWER = 1.5, 1 / 1.5
FACTOR = 2.0
ERROR_LIMIT = 0.2


@dataclass
class StepBeta:
    """The step rule, made to settle.

    KL answers a change of β only after many updates. The rule applied to the newest KL at every iteration
    therefore runs away: it halves β ever further while KL is still on its way up, then overshoots. Here it
    applies to where KL is heading. A policy moves away from its reference at a roughly constant pace and KL grows
    with the square of the distance, so sqrt(KL), smoothed, is carried forward along its recent slope:

    * double β where KL is past a quarter of its goal and would be above 1.5·KL_goal in `brake` iterations,
    * halve β where KL is below KL_goal/1.5 and would still be in `patience` iterations,

    looking every `interval` iterations, within bounds. For a KL that stands still this is the rule as written.
    The horizons are those that settled most simulated policies (docs/notebook.md).

    kl_goal in nats per response; `update` takes the mean KL of an iteration's rollouts and returns the β for it.
    """

    kl_goal: float
    beta: float
    beta_min: float
    beta_max: float
    interval: int = 2
    smoothing: float = 0.4
    brake: int = 8
    patience: int = 25
    window: int = 6
    count: int = 0
    smoothed: float = 0.0
    distances: list[float] = field(default_factory=list)

    def update(self, kl: float) -> float:
        """Reads an iteration's mean KL; returns the β to use in it."""
        kl = max(kl, 0.0)  # a mean of k1 estimates may be slightly negative
        self.smoothed = kl if self.count == 0 else self.smoothing * kl + (1 - self.smoothing) * self.smoothed
        self.count += 1
        self.distances = [*self.distances, math.sqrt(self.smoothed)][-self.window:]
        if self.count % self.interval == 0 and len(self.distances) >= 4:
            if self.smoothed > self.kl_goal / 4 and self.heading(self.brake) > UPPER * self.kl_goal:
                self.beta = min(self.beta_max, self.beta * FACTOR)
            elif max(self.smoothed, self.heading(self.patience)) < LOWER * self.kl_goal:
                self.beta = max(self.beta_min, self.beta / FACTOR)
        return self.beta

    def heading(self, iterations: int) -> float:
        """KL expected in so many iterations: sqrt(KL) continued along its least-squares slope."""
        middle = (len(self.distances) - 1) / 2
        times = [index - middle for index in range(len(self.distances))]
        slope = sum(t * d for t, d in zip(times, self.distances, strict=True)) / sum(t * t for t in times)
        return max(0.0, self.distances[-1] + iterations * slope) ** 2

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"beta": self.beta, "count": self.count, "smoothed": self.smoothed, "distances": self.distances}

    def restore(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


@dataclass
class ProportionalBeta:
    """β·(1 + gain·clip((KL - KL_goal)/KL_goal, ±0.2)) at every iteration [Ziegler §2.2, gain 0.1].

    Their released code has gain = batch/horizon, horizon 10,000. β moves by at most 0.2·gain an iteration, so a short
    run needs a larger gain, or a β near the right one to start from.
    """

    kl_goal: float
    beta: float
    beta_min: float
    beta_max: float
    gain: float = 0.1
    smoothed: float = 0.0

    def update(self, kl: float) -> float:
        """Reads an iteration's mean KL; returns the β to use in it."""
        self.smoothed = kl
        error = max(-ERROR_LIMIT, min(ERROR_LIMIT, kl / self.kl_goal - 1))
        self.beta = min(self.beta_max, max(self.beta_min, self.beta * (1 + self.gain * error)))
        return self.beta

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"beta": self.beta, "smoothed": self.smoothed}

    def restore(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


@dataclass
class FixedBeta:
    """β as it is [InstructGPT App. C.4: 0.02]."""

    beta: float
    smoothed: float = 0.0

    def update(self, kl: float) -> float:
        self.smoothed = kl
        return self.beta

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"smoothed": self.smoothed}

    def restore(self, state: dict[str, Any]) -> None:
        self.smoothed = state["smoothed"]


BetaRule = StepBeta | ProportionalBeta | FixedBeta


def beta_rule(params: PpoParams) -> BetaRule:
    """The rule that the parameters name."""
    if params.beta_rule == "fixed":
        return FixedBeta(params.beta)
    if params.beta_rule == "proportional":
        return ProportionalBeta(params.kl_goal, params.beta, params.beta_min, params.beta_max, params.beta_gain)
    return StepBeta(params.kl_goal, params.beta, params.beta_min, params.beta_max, params.beta_interval,
                    params.beta_smoothing)
