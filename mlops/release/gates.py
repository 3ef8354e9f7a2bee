"""The gates between a trained policy and its release: each compares one metric with its bound."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rlhf.params import PromoteParams


@dataclass(frozen=True)
class Gate:
    """One gate: a measured value, its bound, and `rule`, which is "at least" or "at most"."""

    name: str
    value: float
    rule: str
    bound: float
    other_end: float | None = None  # of an interval whose worse end is `value`

    @property
    def passed(self) -> bool:
        return self.value >= self.bound if self.rule == "at least" else self.value <= self.bound

    def text(self) -> str:
        """The gate in words; a failed one with the distance to its bound."""
        text = f"{self.name} {self.value:.4g}, {self.rule} {self.bound:.4g}"
        if self.undecided:
            return f"{text}: undecided, its interval reaches to {self.other_end:.4g}; more held-out prompts decide"
        return text if self.passed else f"{text}: missed by {abs(self.value - self.bound):.4g}"

    @property
    def undecided(self) -> bool:
        """Whether a gate that was missed might be passed with more items: its bound lies inside the interval."""
        if self.passed or self.other_end is None:
            return False
        return self.other_end >= self.bound if self.rule == "at least" else self.other_end <= self.bound

    def record(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None} | {"passed": self.passed}


def gates(metrics: Mapping[str, Any], kl_goal: float, params: PromoteParams) -> list[Gate]:
    """The gates for which metrics/evaluate.json has the values.

    They are the promoted arm's. Of an interval, the end that is worse for the policy counts. Without an independent
    judge only the reward model's preference is known, which proves nothing: the win-rate gate is then missing, and
    `promote` refuses the policy.
    """
    arm = metrics.get("eval/arm", "ppo")
    checks = [
        Gate("KL to the SFT policy / goal", metrics[f"eval/kl_{arm}"] / kl_goal, "at least", 1 / params.kl_band),
        Gate("KL to the SFT policy / goal", metrics[f"eval/kl_{arm}"] / kl_goal, "at most", params.kl_band),
        Gate("toxic responses, share", metrics[f"eval/toxic_{arm}"], "at most", params.max_toxic),
    ]
    if "eval/win_rate_vs_sft_low" in metrics:
        checks.insert(0, Gate("win rate against SFT, low end of its interval", metrics["eval/win_rate_vs_sft_low"],
                             "at least", params.min_win_rate, metrics.get("eval/win_rate_vs_sft_high")))
    for key in sorted(metrics):
        task = key.removeprefix("tax/")
        if not key.startswith("tax/") or task.endswith(("_low", "_high")):
            continue
        unit = metrics.get(f"tax_unit/{task}", 1.0)
        bound = params.max_mean_tax if task == "mean" else params.max_tax
        checks.append(Gate(f"alignment tax, {task}", metrics[key] / unit, "at most", bound))
    return checks


def against_champion(win_rate_low: float, params: PromoteParams) -> Gate:
    """Not worse than the champion by more than a margin: the low end of the win rate's 95 % interval is at least
    0.5 - champion_margin. With few prompts the interval is wide, and the gate stays shut."""
    return Gate("win rate against the champion, low end of its interval", win_rate_low, "at least",
                0.5 - params.champion_margin)
