"""The report's plots: matplotlib figures as inline SVG with colours from the page's CSS.

Each colour below is a placeholder that `svg` replaces by a CSS variable, so that a plot works in light and dark mode.
Equal input gives equal bytes: ids are salted with the plot's name, and no date or version is written.
"""

import html
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK, MUTED, GRID = "#010101", "#010102", "#010103"
BASE, SFT, PPO, RM, GOLD, GOAL = "#010104", "#010105", "#010106", "#010107", "#010108", "#010109"
CSS = {INK: "currentColor", MUTED: "var(--muted)", GRID: "var(--line)", BASE: "var(--base)", SFT: "var(--sft)",
       PPO: "var(--ppo)", RM: "var(--rm)", GOLD: "var(--gold)", GOAL: "var(--goal)",
       "#01010a": "var(--base_prompted)", "#01010b": "var(--other1)", "#01010c": "var(--other2)",
       "#01010d": "var(--other3)"}
MODEL_COLOURS = {"base": BASE, "base_prompted": "#01010a", "sft": SFT, "ppo": PPO}
OTHER_COLOURS = ("#01010b", "#01010c", "#01010d")  # of further models, in turn

WIDTH = 420  # CSS pixels at scale 1; a card is 340 to 400 wide
POINTS = 300  # per curve; a longer journal is averaged in buckets to keep the file small
RULES = {
    "svg.fonttype": "none", "font.size": 9.5, "text.color": INK, "axes.labelcolor": MUTED, "axes.edgecolor": GRID,
    "xtick.color": MUTED, "ytick.color": MUTED, "xtick.major.size": 0, "ytick.major.size": 0,
    "xtick.minor.size": 0, "ytick.minor.size": 0,
    "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.7, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
    "lines.linewidth": 1.8, "figure.dpi": 96, "legend.frameon": False,
    "text.parse_math": False,  # a $ in the name of a model or use case is a $
}


Curve = tuple[np.ndarray, np.ndarray, str]  # x, y, colour


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval (None where not measured) and the sample size."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None


@dataclass(frozen=True)
class TaxRow:
    """One task of the alignment tax: score and standard error of each model, chance level, tax of the promoted arm."""

    task: str
    scores: dict[str, float]
    errors: dict[str, float]
    chance: float | None
    tax: float | None


def model_colours(models: Sequence[str]) -> dict[str, str]:
    """A placeholder colour for each model."""
    others = [model for model in models if model not in MODEL_COLOURS]
    return {model: MODEL_COLOURS.get(model) or OTHER_COLOURS[others.index(model) % len(OTHER_COLOURS)]
            for model in models}


def css_colour(model: str, models: Sequence[str]) -> str:
    """The name of a model's CSS variable, without the dashes."""
    return CSS[model_colours(models)[model]].removeprefix("var(--").removesuffix(")")


def svg(name: str, label: str, height: int, draw: Callable[[Figure], None], width: int = WIDTH) -> str:
    """Draws a figure of `width` x `height` CSS pixels; returns an <svg> element that scales to its container."""
    with style.context(["default", {**RULES, "svg.hashsalt": f"instructflow {name}"}]):
        figure = Figure(figsize=(width / 96, height / 96), dpi=96, layout="constrained")
        draw(figure)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True,
                       metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    view = re.search(r'viewBox="([^"]+)"', text)
    assert view
    body = text[text.index(">", text.index("<svg")) + 1:].replace(' xlink:href="', ' href="')
    body = re.sub(r'<g id="[^"]*"', "<g", re.sub(r"<!--.*?-->\s*", "", body, flags=re.DOTALL))
    body = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", body)
    body = re.sub("#01010[1-9a-d]", lambda match: CSS[match.group()], body)
    start = f'<svg viewBox="{view.group(1)}" role="img" aria-label="{html.escape(label)}">'
    return start + re.sub(r"\n\s*", "\n", body).strip()


LABELS = {"base_prompted": "prompted base", "sft": "SFT", "ppo": "PPO", "ppo_ptx": "PPO-ptx"}


def label(model: str) -> str:
    """A model's name as people write it; that of an unknown one as words."""
    return LABELS.get(model) or words(model)


def words(name: str) -> str:
    """An identifier as words: closed_qa becomes closed QA."""
    return " ".join("QA" if word == "qa" else word for word in str(name).split("_"))


def thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The finite points, averaged in at most POINTS buckets of equal size (the last may be smaller)."""
    keep = np.isfinite(x) & np.isfinite(y)
    x, y = x[keep], y[keep]
    if len(x) <= POINTS:
        return x, y
    starts = range(0, len(x), size := math.ceil(len(x) / POINTS))
    return np.array([x[i:i + size].mean() for i in starts]), np.array([y[i:i + size].mean() for i in starts])


def smooth(y: np.ndarray) -> np.ndarray:
    """Centred moving average over a twentieth of the points; the window shrinks at the ends."""
    half = max(1, len(y) // 40)
    return np.array([y[max(0, i - half):i + half + 1].mean() for i in range(len(y))])


def _curve(axes: Axes, x: np.ndarray, y: np.ndarray, colour: str, noisy: bool = True) -> None:
    """A curve; a long and noisy one as faint values with a strong moving average."""
    x, y = thin(x, y)
    if len(x) == 1:
        axes.plot(x, y, "o", color=colour, markersize=5)
    elif noisy and len(x) >= 20:
        axes.plot(x, y, color=colour, linewidth=1, alpha=0.35)
        axes.plot(x, smooth(y), color=colour)
    else:
        axes.plot(x, y, color=colour)


def _axis(axes: Axes, ylabel: str, xlabel: str = "", ticks: int = 5) -> None:
    axes.set_ylabel(ylabel)
    axes.set_xlabel(xlabel)
    axes.margins(x=0.02)
    if axes.get_yscale() == "linear":
        axes.yaxis.set_major_locator(MaxNLocator(ticks))
        axes.ticklabel_format(axis="y", useOffset=False)


def stacked(name: str, label: str, panels: Sequence[tuple[str, Sequence[Curve]]], xlabel: str) -> str:
    """Panels (y label, curves) one above the other over the same x axis, each with its own y axis."""
    def draw(figure: Figure) -> None:
        column = np.atleast_1d(figure.subplots(len(panels), 1, sharex=True))
        for axes, (ylabel, curves) in zip(column, panels, strict=True):
            for curve in curves:
                _curve(axes, *curve)
            _axis(axes, ylabel, xlabel if axes is column[-1] else "", ticks=4)
        figure.align_ylabels(list(column))
    return svg(name, label, 270 if len(panels) > 1 else 240, draw)


@dataclass(frozen=True)
class KlRun:
    """KL of each iteration of a run, the moving average that sets beta, the goal (None: there is none) and its band:
    KL may be `band` times the goal, or the goal `band` times KL."""

    colour: str
    step: np.ndarray
    measured: np.ndarray
    smoothed: np.ndarray
    goal: float | None
    band: float = 1.5


def kl(runs: Sequence[KlRun]) -> str:
    """KL of each iteration and its moving average; the goal of all runs with its band, else a line for each's goal."""
    goals = {(run.goal, run.band) for run in runs}

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for run in runs:
            if np.isfinite(run.smoothed).any():
                axes.plot(*thin(run.step, run.measured), color=run.colour, linewidth=1, alpha=0.45)
                axes.plot(*thin(run.step, run.smoothed), color=run.colour)
            else:
                _curve(axes, run.step, run.measured, run.colour)
        for goal, band in goals if len(goals) == 1 else ():
            if goal is not None:
                axes.axhspan(goal / band, goal * band, color=GOAL, alpha=0.18, linewidth=0)
                axes.axhline(goal, color=GOAL, linestyle=(0, (5, 3)), linewidth=1.4)
        for run in runs if len(goals) > 1 else ():
            if run.goal is not None:
                axes.axhline(run.goal, color=run.colour, linestyle=(0, (5, 3)), linewidth=1.2)
        _axis(axes, "nats per response", "iteration")
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    return svg("kl", "KL to the SFT policy with its goal band", 270, draw)


def beta(curves: Sequence[Curve]) -> str:
    """The KL coefficient as a step plot on a logarithmic axis."""
    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        drawn = []
        for step, values, colour in curves:
            x, y = thin(step, np.where(values > 0, values, math.nan))
            axes.step(x, y, color=colour, where="post")
            drawn.append(y)
        axes.set_yscale("log")
        every = np.log10(np.concatenate(drawn))
        low, high = float(every.min()), float(every.max())
        margin = max(0.1 * (high - low), 0.3)
        axes.set_ylim(10 ** (low - margin), 10 ** (high + margin))
        candidates = [m * 10.0 ** e for e in range(math.floor(low) - 1, math.ceil(high) + 2) for m in (1, 2, 5)]
        shown = [tick for tick in candidates if low - margin <= math.log10(tick) <= high + margin]
        if len(shown) > 6:
            shown = [tick for tick in shown if math.log10(tick) % 1 < 1e-9] or shown
        axes.set_yticks(shown, [f"{tick:g}" for tick in shown])
        axes.minorticks_off()
        _axis(axes, "beta (log scale)", "iteration")
    return svg("beta", "beta over the iterations", 270, draw)


@dataclass(frozen=True)
class ScoredRun:
    """KL, reward-model score and gold score of the points of a run, with the colours of the scores."""

    colours: tuple[str, str]
    kl: np.ndarray
    rm_score: np.ndarray
    gold: np.ndarray


def against_kl(runs: Sequence[ScoredRun], joined: bool, name: str = "against_kl") -> str:
    """RM score and gold score against KL (square-root scale): points with a line or with their means per bin."""
    def draw(figure: Figure) -> None:
        column = figure.subplots(2, 1, sharex=True)
        for run in runs:
            x = np.sqrt(np.maximum(run.kl, 0))
            for axes, values, colour in zip(column, (run.rm_score, run.gold), run.colours, strict=True):
                keep = np.isfinite(x) & np.isfinite(values)
                order = np.argsort(x[keep], kind="stable")
                a, b = thin(x[keep][order], values[keep][order])
                axes.plot(a, b, "o", color=colour, markersize=3.5, alpha=1 if joined else 0.4, markeredgewidth=0)
                if joined:
                    axes.plot(a, b, color=colour)
                elif len(a) >= 16:
                    bins = [piece for piece in np.array_split(np.arange(len(a)), min(10, len(a) // 4)) if len(piece)]
                    axes.plot([a[piece].mean() for piece in bins], [b[piece].mean() for piece in bins], color=colour)
        for axes, ylabel in zip(column, ("RM score", "gold score"), strict=True):
            _axis(axes, ylabel, ticks=4)
        _square_root_ticks(column[-1], max(float(np.sqrt(max(0.0, np.nanmax(run.kl)))) for run in runs))
        column[-1].set_xlabel("KL to the SFT policy, nats (square-root scale)")
        figure.align_ylabels(list(column))
    return svg(name, "reward-model score and gold score against KL", 270, draw)


def _square_root_ticks(axes: Axes, top: float) -> None:
    """Ticks at round KL values on an axis of square roots."""
    largest = max(top * top, 1e-6)
    unit = 10 ** math.floor(math.log10(largest))
    steps = [s * unit for s in ((0.05, 0.2, 0.5, 1) if largest < 2 * unit else (0.1, 0.5, 1, 2, 4))]
    ticks = [0.0, *[tick for tick in (*steps, largest) if tick < 0.85 * largest], largest]
    axes.set_xticks([math.sqrt(tick) for tick in ticks], [f"{tick:.2g}" for tick in ticks])


def trained(name: str, ylabel: str, train: Curve, valid: tuple[np.ndarray, np.ndarray],
            chance: float | None = None) -> str:
    """A training's loss or accuracy, the same on validation rows (points) where measured, and that of guessing
    (dashes). `name`: what it is, as the label of the plot."""
    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        step, values, colour = train
        _curve(axes, step, values, colour)
        x, y = thin(*valid)
        if len(x):
            axes.plot(x, y, color=INK, linewidth=1, marker="o", markersize=3.5)
        if chance is not None:
            axes.axhline(chance, color=MUTED, linewidth=1, linestyle=(0, (2, 2)))
        _axis(axes, ylabel, "step")
        finite = np.sort(values[np.isfinite(values)])
        if ylabel.startswith("loss") and len(finite) >= 20:  # a high first loss must not flatten the curve
            low, high = axes.get_ylim()
            axes.set_ylim(low, min(high, finite[0] + 2.5 * (finite[int(0.95 * len(finite))] - finite[0]) + 0.05))
    return svg(name, name, 240, draw)


def signal(name: str, curves: Sequence[Curve]) -> str:
    """A small plot of one PPO health signal."""
    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for curve in curves:
            _curve(axes, *curve)
        _axis(axes, "", "", ticks=4)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    return svg(f"signal {name}", name, 150, draw, width=380)


def tax(rows: Sequence[TaxRow]) -> str:
    """Grouped bars, one group per task: each model with 95 % error bars, chance level as a dashed mark."""
    models = list(dict.fromkeys(model for row in rows for model in row.scores))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        step = 0.78 / max(1, len(models))
        for place, row in enumerate(rows):
            for number, (model, colour) in enumerate(model_colours(models).items()):
                offset = step * (number - (len(models) - 1) / 2)
                score, error = row.scores.get(model, math.nan), row.errors.get(model, math.nan)
                if math.isfinite(score):
                    axes.barh(place + offset, 100 * score, 0.92 * step, color=colour)
                if math.isfinite(score) and math.isfinite(error):
                    axes.errorbar(100 * score, place + offset, xerr=196 * error, color=INK, elinewidth=1.1, capsize=2)
            if row.chance is not None:
                axes.plot([100 * row.chance] * 2, [place - 0.45, place + 0.45], color=INK, linewidth=1.3,
                          linestyle=(0, (2, 1.5)))
        _names(axes, [words(row.task) for row in rows])
        axes.set_xlim(0, 102)
        axes.set_xlabel("score, %")
    return svg("tax", "scores on the alignment-tax tasks", 56 + (20 + 12 * len(models)) * len(rows), draw)


def win_rates(name: str, rows: Sequence[Estimate], model: str, colour: str) -> str:
    """A dot with its interval per use case, and a line at 50 %. `model`: whose win rate it is."""
    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.axvline(50, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
        for place, row in enumerate(rows):
            if row.low is not None and row.high is not None:
                axes.plot([100 * row.low, 100 * row.high], [place, place], color=colour, linewidth=2.2, alpha=0.55)
            axes.plot(100 * row.value, place, "o", color=colour, markersize=6, markeredgewidth=0)
        _names(axes, [words(row.name) + ("" if row.n is None else f" ({row.n:,})") for row in rows])
        axes.set_xlim(0, 100)
        axes.set_xticks([0, 25, 50, 75, 100])
        axes.set_xlabel(f"win rate of {label(model)} against SFT, %")
    return svg(name, "win rate by use case", 52 + 26 * len(rows), draw)


def _names(axes: Axes, names: Sequence[str]) -> None:
    """Row names on the left, the first row at the top, no horizontal grid."""
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", colors=INK)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.grid(visible=False, axis="y")


def strengths(rows: Sequence[Estimate], colours: Sequence[str]) -> str:
    """A dot with its interval per model: Bradley-Terry strength, in log-odds."""
    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.axvline(0, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
        for place, (row, colour) in enumerate(zip(rows, colours, strict=True)):
            if row.low is not None and row.high is not None:
                axes.plot([row.low, row.high], [place, place], color=colour, linewidth=2.2, alpha=0.55)
            axes.plot(row.value, place, "o", color=colour, markersize=6, markeredgewidth=0)
        _names(axes, [label(row.name) for row in rows])
        axes.set_xlabel("strength, log-odds (0: the mean model)")
    return svg("strengths", "Bradley-Terry strength of each model", 60 + 26 * len(rows), draw)
