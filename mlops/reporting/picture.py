"""A run's curves as one PNG, for the Prefect UI, which shows no page: equal journals give equal bytes."""

import io
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mlops.config.paths import POLICY_METRICS
from mlops.reporting.journals import KlRule, Rows, column, measured, read_rows, rules_of
from mlops.reporting.plots import label, smooth

COLOURS = ("#cf4a12", "#b0307f", "#0f8a8a", "#6f7f10", "#2f74d0", "#7a4bc4")  # of the arms, in turn
BAND, POINTS, TRAIN = "#17845f", "#1b1f27", "#2f74d0"
OF_ARMS = (  # a journal's column, the panel's title
    ("ppo/kl", "KL to the SFT policy, nats per response"), ("ppo/beta", "beta, the KL coefficient"),
    ("ppo/rm_score", "Reward-model score"), ("ppo/gold", "Gold score"))
Panel = tuple[str, partial[None]]


def picture(root: Path) -> bytes:
    """Losses with those on validation rows; KL of each arm with the goal's band; beta; reward-model and gold score,
    each on an axis of its own. Empty where there are no journals."""
    runs = {path.stem: read_rows(path) for path in sorted((root / POLICY_METRICS).glob("*.csv"))}
    panels = [*_trainings(root), *_of_arms(runs, rules_of(root, runs))]
    if not panels:
        return b""
    rows = (len(panels) + 1) // 2
    with style.context("default"):
        figure = Figure(figsize=(9, 2.6 * rows), layout="constrained")
        for place, (title, draw) in enumerate(panels, 1):
            axes = figure.add_subplot(rows, 2, place)
            draw(axes)
            axes.set_title(title, fontsize=10)
            axes.set_xlabel("iteration" if draw.keywords.get("runs") else "step", fontsize=8)
            axes.spines[["top", "right"]].set_visible(False)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize=8, frameon=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=90, metadata={"Software": None})
    return buffer.getvalue()


def _trainings(root: Path) -> list[Panel]:
    sft, rm = (read_rows(root / "metrics" / f"{stage}.csv") for stage in ("sft", "rm"))
    panels = [("SFT: loss, nats", sft, "sft/loss", "sft/valid_loss"),
              ("Reward model: loss, nats", rm, "rm/loss", "rm/valid_loss"),
              ("Reward model: accuracy", rm, "rm/train_accuracy", "rm/valid_accuracy")]
    return [(title, partial(_training, rows=rows, train=train, valid=valid))
            for title, rows, train, valid in panels if measured(column(rows, train))]


def _training(axes: Axes, rows: Rows, train: str, valid: str) -> None:
    _line(axes, rows, train, TRAIN, "training batches")
    step, values = column(rows, "step"), column(rows, valid)
    if measured(values):
        keep = np.isfinite(values)
        axes.plot(step[keep], values[keep], color=POINTS, marker="o", markersize=4, linewidth=1,
                  label="validation rows")


def _of_arms(runs: dict[str, Rows], rules: dict[str, KlRule]) -> list[Panel]:
    return [(title, partial(_arms, runs=runs, rules=rules, name=name))
            for name, title in OF_ARMS if any(measured(column(rows, name)) for rows in runs.values())]


def _arms(axes: Axes, runs: dict[str, Rows], rules: dict[str, KlRule], name: str) -> None:
    for place, (arm, rows) in enumerate(runs.items()):
        colour = COLOURS[place % len(COLOURS)]
        if name == "ppo/beta":
            axes.step(column(rows, "step"), column(rows, name), color=colour, where="post", label=label(arm))
        else:
            _line(axes, rows, name, colour, label(arm))
        goal, limits = rules[arm].goal, rules[arm].limits
        if name != "ppo/kl" or goal is None or limits is None:
            continue
        if len({(rule.goal, rule.limits) for rule in rules.values()}) > 1:
            axes.axhline(goal, color=colour, linestyle="--", linewidth=1)
        elif place == len(runs) - 1:
            axes.axhspan(*limits, color=BAND, alpha=0.15, linewidth=0, label=f"band {limits[0]:.3g} to {limits[1]:.3g}")
            axes.axhline(goal, color=BAND, linestyle="--", linewidth=1, label=f"goal {goal:g}")


def _line(axes: Axes, rows: Rows, name: str, colour: str, text: str) -> None:
    """A long curve as its faint values with a strong moving average."""
    step, values = column(rows, "step"), column(rows, name)
    keep = np.isfinite(values)
    if not keep.any():
        return
    long = keep.sum() >= 100
    axes.plot(step[keep], values[keep], color=colour, linewidth=1 if long else 1.4, alpha=0.3 if long else 1,
              label="_" if long else text)
    if long:
        axes.plot(step[keep], smooth(values[keep]), color=colour, linewidth=1.4, label=text)
