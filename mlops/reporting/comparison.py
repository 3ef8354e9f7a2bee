"""The report's comparisons of several models: win matrix, strengths, hard slices, tasks, best-of-n."""

import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from mlops.reporting import plots
from mlops.reporting.headline import DASH, NBSP, arms_of, estimate, number, percent, score
from mlops.reporting.models import win_rate

ORDER = ("base", "base_prompted", "sft")  # the arms follow in their order, then further models by name
SLICES = ("false_premise", "ambiguous", "high_stakes")
SLICE_QUALITIES = ("truthful", "harmless", "refusal")
LIBRARIES = ("torch", "transformers", "tokenizers", "lm_eval")


def in_order(models: Iterable[str], arms: Sequence[str]) -> list[str]:
    """The pipeline's models in the order of their stages, then further ones by name."""
    names, first = set(models), [*ORDER, *arms]
    return [model for model in first if model in names] + sorted(names - set(first))


def models_of(evaluation: Mapping[str, Any]) -> list[str]:
    """The evaluated models: those with a mean response length, a gold score, or a score on a task."""
    answered = {key.removeprefix("eval/length_") for key in evaluation if key.startswith("eval/length_")}
    taxed = {key.split("/")[1] for key in evaluation if key.startswith("tax_score/") and key.count("/") > 1}
    arms = arms_of(evaluation)
    graded = {model for model in (*ORDER, *arms) if f"eval/gold_{model}" in evaluation}
    return in_order(answered | taxed | graded, arms)


def win_matrix(evaluation: Mapping[str, Any], models: Sequence[str]) -> list[dict[str, Any]]:
    """One row per model: its win rates against the others with intervals; a cell is None where nothing was judged."""
    rows = []
    for one in models:
        cells = [_against(evaluation, one, other) for other in models]
        if any(cells):
            rows.append({"model": one, "cells": cells})
    return rows


def _against(evaluation: Mapping[str, Any], one: str, other: str) -> dict[str, str] | None:
    rate = win_rate(evaluation, one, other)
    if rate is None:
        return None
    return {"value": percent(rate.value),
            "range": "" if rate.low is None else f"{percent(rate.low)} to {percent(rate.high)}"}


def strength_plot(evaluation: Mapping[str, Any], models: Sequence[str]) -> str:
    """The SVG of the Bradley-Terry strengths, best first; empty without them."""
    rows = [row for model in models if (row := estimate(evaluation, f"eval/strength_{model}", model))]
    rows.sort(key=lambda row: -row.value)
    colours = plots.model_colours(models)
    return plots.strengths(rows, [colours[row.name] for row in rows]) if len(rows) > 1 else ""


def slice_rows(evaluation: Mapping[str, Any], models: Sequence[str]) -> list[dict[str, Any]]:
    """A row per hard slice and quality: the share for each model."""
    rows = []
    for group in SLICES:
        for quality in SLICE_QUALITIES:
            values = [number(evaluation, f"eval/{quality}_{model}/{group}") for model in models]
            if any(value is not None for value in values):
                rows.append({"title": f"{plots.words(group)}: {'refused' if quality == 'refusal' else quality}",
                             "cells": [percent(value) for value in values]})
    return rows


def task_rows(evaluation: Mapping[str, Any], models: Sequence[str]) -> list[dict[str, Any]]:
    """A row per task outside the alignment tax: each model's score with its 95 % half-width."""
    names = sorted({key.split("/", 2)[2] for key in evaluation if key.startswith("task_score/")})
    return [{"task": name, "cells": [_with_error(evaluation, model, name) for model in models]} for name in names]


def _with_error(evaluation: Mapping[str, Any], model: str, task: str) -> str:
    value, error = (number(evaluation, f"{stem}/{model}/{task}") for stem in ("task_score", "task_se"))
    return DASH if value is None else score(value) + (f" ± {1.96 * error:.3f}" if error else "")


def best_of_plot(rows: Sequence[Mapping[str, float]]) -> str:
    """The SVG of proxy and gold score of best-of-n against KL; empty with fewer than two rows."""
    if len(rows) < 2:
        return ""
    kl, proxy, gold = (np.array([row[name] for row in rows]) for name in ("kl", "rm_score", "gold"))
    return plots.against_kl([plots.ScoredRun((plots.RM, plots.GOLD), kl, proxy, gold)], joined=True, name="best_of_n")


def turn_sentences(evaluation: Mapping[str, Any]) -> dict[str, str]:
    """{arm or "best_of_n": a sentence on whether the gold score peaked and fell}."""
    sentences = {}
    for run in (*arms_of(evaluation), "best_of_n"):
        turned, peak = (number(evaluation, f"overopt/{run}_{name}") for name in ("turned", "peak_kl"))
        drop, fitted = (number(evaluation, f"overopt/{run}_{name}") for name in ("drop", "fitted_turn_kl"))
        if turned is None:
            continue
        sentences[run] = (f"The gold score peaks at {score(peak)}{NBSP}nats and is {score(drop)} lower at the end."
                          if turned else f"The gold score does not fall; it is highest at {score(peak)}{NBSP}nats.")
        if fitted is not None:
            sentences[run] += f" The fitted curve of Gao et al. peaks at {score(fitted)}{NBSP}nats."
    return sentences


def machine() -> list[tuple[str, str]]:
    """Device and library versions, on which byte equality depends; no host name, no date."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return [("device", f"{device}, {platform.machine()}"), ("python", platform.python_version()),
            *((name, version(name)) for name in LIBRARIES)]
