"""The pipeline's models in the order of its stages: base, SFT, each arm of PPO, with what each step gained and cost.

The same table stands in the report, the model card and at the end of a run.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from mlops.reporting.headline import (
    DASH,
    Form,
    arms_of,
    estimate,
    number,
    percent,
    points,
    promoted_of,
    score,
    signed,
    tax_tasks,
)
from mlops.reporting.plots import Estimate, label, words

CEILING = 0.97  # of a perfect score


class Cell(NamedTuple):
    """A formatted number with its 95 % interval, which may be empty."""

    value: str
    range: str = ""

    def __str__(self) -> str:
        return f"{self.value} ({self.range})" if self.range else self.value


class ModelRow(NamedTuple):
    """One model: `promoted` marks the arm that the gates take."""

    model: str
    label: str
    promoted: bool
    cells: list[Cell]


def model_table(evaluation: Mapping[str, Any], tasks: bool = True) -> tuple[list[str], list[ModelRow]]:
    """(titles of the columns, a row for each model that was evaluated); what was measured of no model is left out.

    In points of a perfect score, tax is base - model, and that of PPO is SFT - model; in bits it is model - base.
    `tasks`: also each task's tax.
    """
    arms = arms_of(evaluation)
    names = tax_tasks(evaluation) if tasks else []
    found = {model: {
        "gold score": _cell(estimate(evaluation, f"eval/gold_{model}"), score),
        "win rate against SFT": _cell(win_rate(evaluation, model, "sft"), percent),
        "KL to SFT, nats": _cell(estimate(evaluation, f"eval/kl_{model}"), score),
        "tax, mean": _tax(evaluation, f"tax_of/{model}", "mean"),
        "tax of PPO, mean": _tax(evaluation, f"tax_between/sft/{model}", "mean"),
        "tax, bits per answer": _cell(estimate(evaluation, f"answer_bits_tax/{model}/mean"), signed),
        "tax, bits per token of text": _cell(estimate(evaluation, f"corpus_bits_tax/{model}"), signed),
        **{f"tax, {words(task)}": _tax(evaluation, f"tax_of/{model}", task) for task in names},
    } for model in ("base", "sft", *arms)}
    shown = [title for title in found["base"] if any(cells[title].value != DASH for cells in found.values())]
    several = len(arms) > 1
    return shown, [ModelRow(model, label(model), several and model == promoted_of(evaluation),
                            [cells[title] for title in shown])
                   for model, cells in found.items() if any(cells[title].value != DASH for title in shown)]


def task_taxes(evaluation: Mapping[str, Any]) -> tuple[list[str], list[ModelRow]]:
    """(names of the tasks, a row for each model after the base): tax on each task, points of a perfect score."""
    arms, tasks = arms_of(evaluation), tax_tasks(evaluation)
    rows = [ModelRow(model, label(model), len(arms) > 1 and model == promoted_of(evaluation),
                     [_tax(evaluation, f"tax_of/{model}", task) for task in tasks]) for model in ("sft", *arms)]
    return [words(task) for task in tasks], [row for row in rows if any(cell.value != DASH for cell in row.cells)]


def at_ceiling(evaluation: Mapping[str, Any]) -> list[str]:
    """The tasks on which the base has (nearly) a perfect score: their tax says little, only a large loss shows."""
    def share(task: str) -> float:
        return (number(evaluation, f"tax_score/base/{task}") or 0.0) / (number(evaluation, f"tax_unit/{task}") or 1.0)

    return [words(task) for task in tax_tasks(evaluation) if share(task) >= CEILING]


def win_rate(evaluation: Mapping[str, Any], one: str, other: str) -> Estimate | None:
    """Of one model against another, in whichever order the pair was measured."""
    if rate := estimate(evaluation, f"eval/win_rate/{one}_vs_{other}"):
        return rate
    if rate := estimate(evaluation, f"eval/win_rate/{other}_vs_{one}"):
        low, high = (None if value is None else 1 - value for value in (rate.high, rate.low))
        return Estimate(rate.name, 1 - rate.value, low, high, rate.n)
    return None


def _tax(evaluation: Mapping[str, Any], pair: str, task: str) -> Cell:
    """In points of a perfect score."""
    unit = number(evaluation, f"tax_unit/{task}") or 1.0
    found = estimate(evaluation, f"{pair}/{task}")
    return _cell(found, lambda value: points(None if value is None else value / unit))


def _cell(value: Estimate | None, form: Form) -> Cell:
    if value is None:
        return Cell(DASH)
    return Cell(form(value.value), "" if value.low is None else f"{form(value.low)} to {form(value.high)}")
