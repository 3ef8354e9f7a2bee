"""Signals that a PPO run goes wrong: runs out of bounds, or the reward model is being fooled."""

import math
from collections.abc import Sequence

import numpy as np

from rlhf.errors import TrainingFailed
from rlhf.params import PpoParams

WINDOW = 10  # iterations that the alarm looks at, and that the share of ended responses is taken of
LEAST_RESPONSES = 256  # fewer do not show that share
SURE = 2.0  # standard errors by which a slope must differ from 0


def check_bounds(values: dict[str, float], history: Sequence[dict[str, float]], params: PpoParams, iteration: int
                 ) -> None:
    """Raises TrainingFailed, which says why, where an iteration is beyond what a sound run shows.

    `history`: the iterations before.
    """
    wrong = [name for name, value in values.items() if not math.isfinite(value)]
    if wrong:
        raise TrainingFailed(f"iteration {iteration}: {', '.join(wrong)}: not a finite number")
    kl, entropy = values["ppo/kl"], values["ppo/entropy"]
    if params.kl_limit and kl > params.kl_limit * params.kl_goal:
        raise TrainingFailed(f"iteration {iteration}: KL {kl:.3g} nats is beyond ppo.kl_limit = {params.kl_limit:g} "
                             f"times the goal {params.kl_goal:g}; raise ppo.beta or lower ppo.lr")
    first_entropy = (*history, values)[0]["ppo/entropy"]
    if entropy < params.entropy_floor * first_entropy:
        raise TrainingFailed(f"iteration {iteration}: entropy fell from {first_entropy:.3g} to {entropy:.3g} nats, "
                             f"below ppo.entropy_floor = {params.entropy_floor:g} of it: too sure of itself")
    if entropy < params.min_entropy:
        raise TrainingFailed(f"iteration {iteration}: entropy is {entropy:.2g} nats a token, below ppo.min_entropy = "
                             f"{params.min_entropy:g}: the policy gives one answer only; look at models/sft")
    rates = [row["ppo/eos_rate"] for row in (*history, values)[-WINDOW:]]
    if len(rates) * params.batch_size >= LEAST_RESPONSES and sum(rates) / len(rates) < params.min_eos_rate:
        raise TrainingFailed(f"iteration {iteration}: {sum(rates) / len(rates):.1%} of the responses end, fewer than "
                             f"ppo.min_eos_rate = {params.min_eos_rate:g}: raise ppo.max_new_tokens, or train "
                             "models/sft longer")


def length_controlled(scores: Sequence[float], lengths: Sequence[float], at: float) -> float:
    """Mean score that responses of length `at` would have, by a line fitted to scores over lengths."""
    y, x = np.asarray(scores, np.float64), np.asarray(lengths, np.float64)
    spread = ((x - x.mean()) ** 2).sum()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / spread if spread > 0 else 0.0
    return float(y.mean() + slope * (at - x.mean()))


def trend(values: Sequence[float]) -> float:
    """Slope over the index in standard errors: +3 is a rise nobody would call chance. 0 for fewer than 4 values."""
    y = np.asarray(values, np.float64)
    if len(y) < 4:
        return 0.0
    x = np.arange(len(y)) - (len(y) - 1) / 2
    slope = (x * y).sum() / (x * x).sum()
    rest = y - y.mean() - slope * x
    error = math.sqrt((rest**2).sum() / (len(y) - 2) / (x * x).sum())
    return float(slope / error) if error > 0 else math.copysign(math.inf, slope) if slope else 0.0


def hacking_alarm(history: Sequence[dict[str, float]]) -> float:
    """1 where the reward model's score rises while the gold score (where there is one) or the length-controlled score
    falls over the newest iterations, both beyond chance; else 0."""
    newest = history[-WINDOW:]
    if trend([row["ppo/rm_score"] for row in newest]) < SURE:
        return 0.0
    watched = [name for name in ("ppo/gold", "ppo/rm_score_length_controlled") if name in newest[0]]
    return float(any(trend([row[name] for row in newest]) < -SURE for name in watched))
