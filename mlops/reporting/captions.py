"""What stands below the report's plots: sentences computed from the curves that they describe."""

import math
from collections.abc import Mapping

import numpy as np

from mlops.reporting.headline import NBSP, score
from mlops.reporting.journals import KlRule, Rows, changes, column, ends, last, listed, measured
from mlops.reporting.plots import label

CLEAR = 0.02  # of the range of a curve: smaller differences are not called a rise or a fall
RULES = {
    "step": "Above the band beta is multiplied by {factor:g}, below it divided by {factor:g}.",
    "step_ahead": "beta is multiplied by {factor:g} where KL is heading above the band, and divided by {factor:g} "
                  "where it stays below.",
    "proportional": "beta moves at every iteration, in proportion to the distance from the goal.",
    "fixed": "beta is fixed: there is no goal.",
}


def of_scores(runs: Mapping[str, Rows]) -> str:
    """How the reward model's and the gold score moved in each arm."""
    return " ".join(filter(None, (_scores(arm, rows) for arm, rows in runs.items())))


def _scores(arm: str, rows: Rows) -> str:
    found = {name: ends(column(rows, f"ppo/{key}")) for name, key in (("RM score", "rm_score"), ("gold score", "gold"))}
    moved = {name: pair for name, pair in found.items() if pair}
    if not moved:
        return ""
    text = ", ".join(f"{name} {score(first)} → {score(final)}" for name, (first, final) in moved.items())
    text = f"{label(arm)}: {text} (means of the first and last tenth)."
    if "gold score" not in moved:
        return text + " A rising RM score shows that PPO optimises it, not that people would agree: read answers too."
    gold = column(rows, "ppo/gold")
    first, final = moved["gold score"]
    fell = first - final > CLEAR * float(np.nanmax(gold) - np.nanmin(gold))
    rose = "RM score" in moved and moved["RM score"][1] > moved["RM score"][0]
    return text + (" The RM score rose and the gold score fell: over-optimisation." if fell and rose else "")


def of_kl(runs: Mapping[str, Rows], rules: Mapping[str, KlRule]) -> str:
    """How many iterations each arm spent in its band, and where it was at the end."""
    return " ".join(filter(None, (_kl(arm, rows, rules[arm]) for arm, rows in runs.items())))


def _kl(arm: str, rows: Rows, rule: KlRule) -> str:
    values = column(rows, "ppo/kl")
    values = values[np.isfinite(values)]
    if not len(values):
        return ""
    final = float(values[-max(1, len(values) // 3):].mean())
    if rule.goal is None or rule.limits is None:
        return f"{label(arm)}: {score(final)}{NBSP}nats in the mean of the last third."
    low, high = rule.limits
    inside = int(((values >= low) & (values <= high)).sum())
    return (f"{label(arm)}: in the band in {inside} of {len(values)} iterations; the last third's mean is "
            f"{score(final)}{NBSP}nats, {score(final / rule.goal)} of the goal.")


def of_beta(runs: Mapping[str, Rows], rules: Mapping[str, KlRule]) -> str:
    """Where beta moved in each arm, then what moves it."""
    sentences = [_beta(arm, rows) for arm, rows in runs.items()]
    said = dict.fromkeys(RULES[rule.name].format(factor=rule.factor) for rule in rules.values() if rule.name in RULES)
    return " ".join(filter(None, [*sentences, *said]))


def _beta(arm: str, rows: Rows) -> str:
    steps, values = column(rows, "step"), column(rows, "ppo/beta")
    finite = values[np.isfinite(values)]
    if not len(finite):
        return ""
    moved = changes(steps, values)
    if not moved:
        return f"{label(arm)}: {finite[0]:.3g} throughout."
    where = f"changed {listed(moved)}" if len(moved) > 8 else f"changed at iteration{'s' * (len(moved) > 1)} " \
        + listed(moved)
    return f"{label(arm)}: {finite[0]:.3g} → {finite[-1]:.3g}, {where}."


def of_loss(stage: str, rows: Rows, final: Mapping[str, float]) -> str:
    """The validation loss of a stage along its training, and whether it turned."""
    name = f"{stage}/valid_loss"
    steps, values = column(rows, "step"), column(rows, name)
    if not measured(values):
        return f"On validation rows {score(final[name])} at the end." if name in final else ""
    found = [(int(step), float(value)) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
    before = final.get("sft/valid_loss_base") if stage == "sft" else None
    points = ([f"{score(before)} before training"] if before is not None else []) + [
        f"{score(value)} after step {step:,}" for step, value in _some(found)]
    lowest = min(found, key=lambda point: point[1])
    turned = lowest is not found[-1] and found[-1][1] - lowest[1] > CLEAR * abs(lowest[1])
    text = f"Validation rows: {', '.join(points)}."
    if turned:
        text += f" It was lowest after step {lowest[0]:,}: what followed overfits."
    kept = {"sft": ("sft/epoch_kept", "epoch"), "rm": ("rm/steps_kept", "step")}.get(stage)
    if kept and final.get(kept[0]) is not None:
        text += f" Kept: {kept[1]} {int(final[kept[0]]):,}."
    return text


def _some(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most four of the points: the first, the last and those a third of the way."""
    if len(points) <= 4:
        return points
    return [points[round(place * (len(points) - 1) / 3)] for place in range(4)]


def of_accuracy(rows: Rows, final: Mapping[str, float]) -> str:
    """The reward model's accuracy on validation rankings while it trained, and of the model that was kept."""
    values = column(rows, "rm/valid_accuracy")
    finite = values[np.isfinite(values)]
    shown = " → ".join(f"{100 * value:.1f}" for _, value in _some(list(enumerate(finite))))
    text = f"On validation rankings {shown}{NBSP}%." if shown else ""
    if "rm/accuracy" in final:
        text += f" Measured at the end: {100 * final['rm/accuracy']:.1f}{NBSP}%."
    train = last(rows, "rm/train_accuracy")
    return text.strip() + ("" if train is None else " The line is of the training batches, before each step.")
