"""The rules for β, the coefficient of the KL to the reference policy. Each reads the KL once an iteration, before the
update, and returns the β of that iteration.

| rule | what | source |
|---|---|---|
| step | KL > 3/2·KL_goal doubles β, KL < 2/3·KL_goal halves it | the seed article, after Schulman et al. 2017 §4 |
| step_ahead | the same, for the KL that the run is heading for | this project |
| proportional | β·(1 + gain·clip((KL - KL_goal)/KL_goal, ±limit)) | Ziegler et al. 2019 §2.2 |
| fixed | β stays | InstructGPT App. C.4: 0.02 |

KL is the mean over an iteration's responses of log π - log π_ref, nats per response
(`rlhf/model/responses.py:response_kl`; docs/notebook.md says why not k3). All keep β within [beta_min, beta_max].
"""

import math
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from rlhf.params import PpoParams


@dataclass
class Rule:
    """What all rules have: β, its bounds, the goal, the KL that was read last (smoothed where the rule smooths it).

    A rule's memory is what `state` returns: a checkpoint keeps it, and the next round goes on from it.
    """

    kl_goal: float
    beta: float
    beta_min: float
    beta_max: float
    smoothed: float = 0.0

    MEMORY: ClassVar[tuple[str, ...]] = ("beta", "smoothed")

    def update(self, kl: float) -> float:
        """Reads an iteration's mean KL, nats; returns the β to use in it."""
        raise NotImplementedError

    def scale(self, factor: float) -> None:
        """Multiplies β, within its bounds."""
        self.beta = min(self.beta_max, max(self.beta_min, self.beta * factor))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {name: getattr(self, name) for name in self.MEMORY}

    def restore(self, state: dict[str, Any]) -> None:
        for name in self.MEMORY:
            setattr(self, name, state[name])


@dataclass
class StepBeta(Rule):
    """The article's rule to the letter: β times `factor` where KL > band·goal, β / `factor` where KL < goal/band.

    KL answers a change of β only after many updates, so this rule goes on halving while KL is still on its way up and
    then overshoots (docs/algorithms.md has a picture). Bounds of β limit the damage.
    """

    band: float = 1.5
    factor: float = 2.0

    def update(self, kl: float) -> float:
        self.smoothed = kl
        if kl > self.band * self.kl_goal:
            self.scale(self.factor)
        elif kl < self.kl_goal / self.band:
            self.scale(1 / self.factor)
        return self.beta


@dataclass
class StepAheadBeta(Rule):
    """The step rule, made to settle: it applies to where KL is heading.

    A policy moves away from its reference at a roughly constant pace and KL grows with the square of the distance, so
    sqrt(KL), smoothed, is carried forward along its recent slope:

    * raise β where KL is past `start` of its goal and would be above band·goal in `brake` iterations,
    * lower β where KL is below goal/band and would still be in `patience` iterations,

    looking every `interval` iterations. For a KL that stands still this is the rule as written. The horizons are those
    that settled most simulated policies (docs/notebook.md).
    """

    band: float = 1.5
    factor: float = 2.0
    interval: int = 2
    smoothing: float = 0.4
    brake: int = 8
    patience: int = 25
    window: int = 6
    start: float = 0.25
    count: int = 0
    distances: list[float] = field(default_factory=list)

    MEMORY = ("beta", "smoothed", "count", "distances")

    def update(self, kl: float) -> float:
        kl = max(kl, 0.0)
        self.smoothed = kl if self.count == 0 else self.smoothing * kl + (1 - self.smoothing) * self.smoothed
        self.count += 1
        self.distances = [*self.distances, math.sqrt(self.smoothed)][-self.window:]
        if self.count % self.interval == 0 and len(self.distances) >= min(4, self.window):
            if self.smoothed > self.start * self.kl_goal and self.heading(self.brake) > self.band * self.kl_goal:
                self.scale(self.factor)
            elif max(self.smoothed, self.heading(self.patience)) < self.kl_goal / self.band:
                self.scale(1 / self.factor)
        return self.beta

    def heading(self, iterations: int) -> float:
        """KL expected in so many iterations: sqrt(KL) continued along its least-squares slope."""
        middle = (len(self.distances) - 1) / 2
        times = [index - middle for index in range(len(self.distances))]
        slope = sum(t * d for t, d in zip(times, self.distances, strict=True)) / sum(t * t for t in times)
        return max(0.0, self.distances[-1] + iterations * slope) ** 2


@dataclass
class ProportionalBeta(Rule):
    """β·(1 + gain·clip((KL - KL_goal)/KL_goal, ±limit)) at every iteration [Ziegler §2.2: gain 0.1, limit 0.2].

    Their released code has gain = batch/horizon, horizon 10,000. β moves by at most limit·gain an iteration, so a short
    run needs a larger gain, or a β near the right one to start from.
    """

    gain: float = 0.1
    limit: float = 0.2

    def update(self, kl: float) -> float:
        self.smoothed = kl
        self.scale(1 + self.gain * max(-self.limit, min(self.limit, kl / self.kl_goal - 1)))
        return self.beta


@dataclass
class FixedBeta(Rule):
    """β as it is [InstructGPT App. C.4: 0.02]."""

    def update(self, kl: float) -> float:
        self.smoothed = kl
        return self.beta


RULES: dict[str, type[Rule]] = {"step": StepBeta, "step_ahead": StepAheadBeta, "proportional": ProportionalBeta,
                                "fixed": FixedBeta}


def beta_rule(params: PpoParams) -> Rule:
    """The rule that the parameters name; its constants are those that they call beta_<constant>."""
    rule = RULES[params.beta_rule]
    own = {item.name for item in fields(rule)} - {item.name for item in fields(Rule)}
    constants = {name: getattr(params, f"beta_{name}") for name in sorted(own) if hasattr(params, f"beta_{name}")}
    return rule(params.kl_goal, params.beta, params.beta_min, params.beta_max, **constants)
