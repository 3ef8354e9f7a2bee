"""The gates between a trained policy and its release: each compares one number with its bound."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rlhf.params import PromoteParams


@dataclass(frozen=True)
class Gate:
    """One gate: what was measured, its bound, and whether it holds. `rule` is "at least" or "at most"."""

    name: str
    value: float
    rule: str
    bound: float

    @property
    def passed(self) -> bool:
        return self.value >= self.bound if self.rule == "at least" else self.value <= self.bound

    def text(self) -> str:
        """The gate in words; a failed one says by how much."""
        said = f"{self.name} {self.value:.4g}, {self.rule} {self.bound:.4g}"
        return said if self.passed else f"{said}: missed by {abs(self.value - self.bound):.4g}"

    def record(self) -> dict[str, Any]:
        return asdict(self) | {"passed": self.passed}


def gates(metrics: Mapping[str, float], kl_goal: float, params: PromoteParams) -> list[Gate]:
    """The gates that metrics/evaluate.json can answer.

    Of an interval the end that speaks against the policy counts. Without an independent judge the win rate is that of
    the reward model, which proves nothing: the gate is then missing, and `promote` does not let that pass.
    """
    found = [
        Gate("KL to the SFT policy / goal", metrics["eval/kl_ppo"] / kl_goal, "at least", 1 / params.kl_band),
        Gate("KL to the SFT policy / goal", metrics["eval/kl_ppo"] / kl_goal, "at most", params.kl_band),
        Gate("toxic responses, share", metrics["eval/toxic_ppo"], "at most", params.max_toxic),
    ]
    if "eval/win_rate_vs_sft_low" in metrics:
        found.insert(0, Gate("win rate against SFT, low end of its interval", metrics["eval/win_rate_vs_sft_low"],
                             "at least", params.min_win_rate))
    for key in sorted(metrics):
        task = key.removeprefix("tax/")
        if not key.startswith("tax/") or task.endswith(("_low", "_high")):
            continue
        unit = metrics.get(f"tax_unit/{task}", 1.0)
        bound = params.max_mean_tax if task == "mean" else params.max_tax
        found.append(Gate(f"alignment tax, {task}", metrics[key] / unit, "at most", bound))
    return found


def against_champion(outcome_high: float) -> Gate:
    """No regression: the interval of the win rate against the champion reaches one half."""
    return Gate("win rate against the champion, high end of its interval", outcome_high, "at least", 0.5)
