"""The report's parts that set several models side by side: who beats whom, hard slices, tasks, best-of-n."""

import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from mlops.reporting import plots
from mlops.reporting.headline import DASH, NBSP, estimate, number, percent, score

ORDER = ("base", "base_prompted", "sft", "ppo")  # then the others by name
SLICES = ("false_premise", "ambiguous", "high_stakes")
SLICE_QUALITIES = ("truthful", "harmless", "refusal")
LIBRARIES = ("torch", "transformers", "tokenizers", "lm_eval")


def in_order(models: Iterable[str]) -> list[str]:
    """Base first, the line's models in their order, further ones by name."""
    found = set(models)
    return [model for model in ORDER if model in found] + sorted(found - set(ORDER))


def models_of(evaluation: Mapping[str, Any]) -> list[str]:
    """The models that were measured: those with a mean response length, or with a score on a task."""
    answered = {key.removeprefix("eval/length_") for key in evaluation if key.startswith("eval/length_")}
    taxed = {key.split("/")[1] for key in evaluation if key.startswith("tax_score/") and key.count("/") > 1}
    graded = {model for model in ORDER if f"eval/gold_{model}" in evaluation}
    return in_order(answered | taxed | graded)


def models_of_sample(sample: Mapping[str, Any]) -> list[str]:
    """The models whose text a sample holds."""
    return in_order(key for key in sample if key not in ("use_case", "prompt") and not key.startswith("gold_"))


def win_matrix(evaluation: Mapping[str, Any], models: Sequence[str]) -> list[dict[str, Any]]:
    """A row a model: its win rate against each other one, with the interval; empty where nothing was judged."""
    rows = []
    for one in models:
        cells = [_against(evaluation, one, other) for other in models]
        if any(cells):
            rows.append({"model": one, "cells": cells})
    return rows


def _against(evaluation: Mapping[str, Any], one: str, other: str) -> dict[str, str] | None:
    found = estimate(evaluation, f"eval/win_rate/{one}_vs_{other}")
    if found:
        values = [found.value, found.low, found.high]
    else:
        found = estimate(evaluation, f"eval/win_rate/{other}_vs_{one}")
        if not found:
            return None
        values = [None if value is None else 1 - value for value in (found.value, found.high, found.low)]
    middle, low, high = values
    return {"value": percent(middle), "range": "" if low is None else f"{percent(low)} to {percent(high)}"}


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
    """A row per task that is no tax: each model's score and standard error."""
    names = sorted({key.split("/", 2)[2] for key in evaluation if key.startswith("task_score/")})
    return [{"task": name, "cells": [_with_error(evaluation, model, name) for model in models]} for name in names]


def _with_error(evaluation: Mapping[str, Any], model: str, task: str) -> str:
    value, error = (number(evaluation, f"{stem}/{model}/{task}") for stem in ("task_score", "task_se"))
    return DASH if value is None else score(value) + (f" ± {1.96 * error:.3f}" if error else "")


def best_of_plot(rows: Sequence[Mapping[str, float]]) -> str:
    """Proxy and gold score of the best of n against KL; empty without rows."""
    if len(rows) < 2:
        return ""
    kl, proxy, gold = (np.array([row[name] for row in rows]) for name in ("kl", "rm_score", "gold"))
    return plots.against_kl(kl, proxy, gold, joined=True, name="best_of_n")


def turn_sentences(evaluation: Mapping[str, Any]) -> dict[str, str]:
    """Whether the gold score turned over the PPO run and over best-of-n, in words."""
    said = {}
    for run in ("ppo", "best_of_n"):
        turned, peak = (number(evaluation, f"overopt/{run}_{name}") for name in ("turned", "peak_kl"))
        drop, fitted = (number(evaluation, f"overopt/{run}_{name}") for name in ("drop", "fitted_turn_kl"))
        if turned is None:
            continue
        said[run] = (f"The gold score turned: highest at {score(peak)}{NBSP}nats, {score(drop)} lower at the end."
                     if turned else f"The gold score has not turned; it is highest at {score(peak)}{NBSP}nats.")
        if fitted is not None:
            said[run] += f" A fit of Gao's curve peaks at {score(fitted)}{NBSP}nats."
    return said


def machine() -> list[tuple[str, str]]:
    """The kind of machine and the libraries: what equal bytes depend on. No name, no date."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return [("device", f"{device}, {platform.machine()}"), ("python", platform.python_version()),
            *((name, version(name)) for name in LIBRARIES)]
