"""Writes reports/report.html: one self-contained page on whether PPO is better than SFT, and at what price.

The page loads no external resources; equal journals and metrics give equal bytes. What was not measured is omitted or
shown as a dash.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml

from mlops.config.loader import load_params, read_yaml
from mlops.config.paths import POLICY_METRICS, metrics_of
from mlops.reporting import plots
from mlops.reporting.comparison import (
    SLICES,
    best_of_plot,
    machine,
    models_of,
    models_of_sample,
    slice_rows,
    strength_plot,
    task_rows,
    turn_sentences,
    win_matrix,
)
from mlops.reporting.headline import (
    DASH,
    arms_of,
    estimate,
    figure,
    headline_cards,
    judge_words,
    length,
    number,
    percent,
    points,
    promoted_of,
    score,
    tax_tasks,
    verdict,
)
from mlops.reporting.models import at_ceiling, model_table
from rlhf.data.prompts import prompt_text
from rlhf.errors import UserError
from rlhf.files import write_atomic
from rlhf.training.journal import read_journal

STAGES = ("validate", "pretrain", "sft", "rm")
JOURNALS = STAGES[1:]
SIGNALS = {  # journal column: title, how to read it
    "ppo/entropy": ("Entropy", "nats per token; near 0 the policy no longer explores"),
    "ppo/clip_fraction": ("Clip fraction", "share of tokens with a clipped ratio"),
    "ppo/explained_variance": ("Explained variance", "of the returns, by the value model; 1 is perfect"),
    "ppo/response_length": ("Response length", "tokens; a steady rise suggests that the reward model prefers length"),
    "ppo/eos_rate": ("EOS rate", "share of responses that end with EOS"),
    "ppo/grad_norm": ("Gradient norm", "of the policy, before clipping"),
}
QUALITIES = {  # metric's stem: row title, format
    "gold": ("gold score", score), "helpful": ("helpful", percent), "truthful": ("truthful", percent),
    "harmless": ("harmless", percent), "hallucination": ("hallucinations, closed tasks", percent),
    "toxicity": ("toxicity, mean", percent), "toxic": ("toxic", percent), "refusal": ("refusals", percent),
    "repetition": ("repeated 3-grams", percent), "unsupported_words": ("words not in the prompt", percent),
    "rm_score": ("reward-model score", score), "length": ("length, tokens", length),
}
SAMPLES_PER_USE_CASE = 12
# Control characters, bidirectional overrides and lone surrogates, which a model may emit.
UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
Rows = list[dict[str, str]]


def write_report(root: Path, target: Path, evaluation: dict[str, Any], samples: list[dict[str, Any]],
                 curves: dict[str, Any]) -> None:
    """Renders the report of the run in `root` to `target`.

    `evaluation`: the content of metrics/evaluate.json. `samples`: rows with use_case, prompt, one completion per model
    under the model's name, and gold_<model>. `curves`: "kl_gold", rows {"kl", "rm_score", "gold"} that replace those
    of ppo.csv, and "best_of_n", rows of the same form; both optional.
    """
    models, arms, promoted = models_of(evaluation), arms_of(evaluation), promoted_of(evaluation)
    journals = {stage: _journal(root / "metrics" / f"{stage}.csv") for stage in JOURNALS}
    runs = {arm: _journal(root / POLICY_METRICS / f"{arm}.csv") for arm in arms}
    goal = _last(runs[promoted], "ppo/kl_goal")
    taxes = tax_rows(evaluation)
    titles, steps = model_table(evaluation)
    page = _template().render(
        verdict=verdict(evaluation, goal), cards=headline_cards(evaluation, goal), models=models,
        colours={model: plots.css_colour(model, [*models, *arms]) for model in [*models, *arms]}, arms=arms,
        promoted=promoted, titles=titles, steps=steps, ceiling=at_ceiling(evaluation),
        judge=judge_words(evaluation), stand_in=f"eval/gold_{promoted}" in evaluation,
        taxed=[model for model in models if any(model in row.scores for row in taxes)], machine=machine(),
        matrix=win_matrix(evaluation, models), strengths=strength_plot(evaluation, models),
        slices=slice_rows(evaluation, models), best_of=best_of_plot(curves.get("best_of_n") or []),
        turns=turn_sentences(evaluation), tasks=task_rows(evaluation, models),
        ppo_plots=ppo_plots(runs, curves, models), losses=loss_plots(journals), signals=signals(runs, models),
        ratio_error=_ratio_error(runs), taxes=taxes, tax_plot=plots.tax(taxes) if taxes else "",
        wins=win_plots(evaluation, models), qualities=quality_rows(evaluation), samples=group_samples(samples, arms),
        data_versions=data_versions(root), parameters=parameters(root), finals=final_metrics(root, evaluation),
    )
    write_atomic(target, (page.strip() + "\n").encode())


def _template() -> jinja2.Template:
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
                                     trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters.update(percent=percent, score=score, points=points, figure=figure, clean=clean,
                               words=plots.words, label=plots.label)
    return environment.get_template("report.html.j2")


def clean(text: Any) -> str:
    """Text with unprintable characters replaced by U+FFFD."""
    return UNPRINTABLE.sub("\ufffd", str(text).replace("\r\n", "\n"))


def _journal(path: Path) -> Rows:
    return read_journal(path) if path.exists() else []


def _column(rows: Rows, name: str) -> np.ndarray:
    """A journal's column; NaN where it is absent, blank or not a number."""
    values = np.full(len(rows), math.nan)
    for i, row in enumerate(rows):
        try:
            values[i] = float(row.get(name) or math.nan)
        except ValueError:
            continue
    return np.where(np.isfinite(values), values, math.nan)


def _columns(rows: Rows, *names: str) -> list[np.ndarray]:
    return [_column(rows, name) for name in names]


def _has(values: np.ndarray) -> bool:
    return bool(np.isfinite(values).any())


def _last(rows: Rows, name: str) -> float | None:
    values = _column(rows, name)
    return float(values[np.isfinite(values)][-1]) if _has(values) else None


def ppo_plots(runs: Mapping[str, Rows], curves: Mapping[str, Any], models: Sequence[str]) -> dict[str, str]:
    """The SVGs "scores", "kl", "beta" and "against_kl", with a curve for each arm; empty where columns are missing."""
    drawn = dict.fromkeys(("scores", "kl", "beta", "against_kl"), "")
    scores = {"RM score": _of_arms(runs, "ppo/rm_score", models, plots.RM),
              "gold score": _of_arms(runs, "ppo/gold", models, plots.GOLD)}
    if any(scores.values()):
        drawn["scores"] = plots.stacked("scores", "reward-model and gold score",
                                        [panel for panel in scores.items() if panel[1]], "iteration")
    colours = _arm_colours(runs, models, plots.PPO)
    measured = [plots.KlRun(colours[arm], *_columns(rows, "step", "ppo/kl", "ppo/kl_smoothed", "ppo/kl_goal"))
                for arm, rows in runs.items() if _has(_column(rows, "ppo/kl"))]
    if measured:
        drawn["kl"] = plots.kl(measured)
    betas = [curve for curve in _of_arms(runs, "ppo/beta", models, plots.PPO) if (curve[1] > 0).any()]
    if betas:
        drawn["beta"] = plots.beta(betas)
    alone = (plots.RM, plots.GOLD)
    scored = [plots.ScoredRun(alone if len(runs) == 1 else (colours[arm], colours[arm]),
                              *_columns(rows, "ppo/kl", "ppo/rm_score", "ppo/gold")) for arm, rows in runs.items()]
    points = curves.get("kl_gold") or []
    if points:
        scored = [plots.ScoredRun(alone, *(np.array([_float(point.get(name)) for point in points])
                                           for name in ("kl", "rm_score", "gold")))]
    scored = [run for run in scored if _has(run.kl + run.rm_score + run.gold)]
    if scored:
        drawn["against_kl"] = plots.against_kl(scored, joined=bool(points))
    return drawn


def _arm_colours(runs: Mapping[str, Rows], models: Sequence[str], alone: str) -> dict[str, str]:
    """The colour of each arm's curves: its own among several, `alone` of a single one."""
    colours = plots.model_colours([*models, *runs])
    return {arm: colours[arm] if len(runs) > 1 else alone for arm in runs}


def _of_arms(runs: Mapping[str, Rows], name: str, models: Sequence[str], alone: str) -> list[plots.Curve]:
    """A column of each arm that has it, over the iterations."""
    colours = _arm_colours(runs, models, alone)
    return [(_column(rows, "step"), values, colours[arm]) for arm, rows in runs.items()
            if _has(values := _column(rows, name))]


def _float(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def loss_plots(journals: Mapping[str, Rows]) -> list[dict[str, Any]]:
    """Title, SVG and legend of each stage's loss and of the reward model's accuracy."""
    entries = []
    for stage, title, colour in (("pretrain", "Pretraining", plots.BASE), ("sft", "SFT", plots.SFT),
                                 ("rm", "Reward model", plots.RM)):
        rows = journals[stage]
        train, valid = _column(rows, f"{stage}/loss"), _column(rows, f"{stage}/valid_loss")
        if _has(train):
            chance = math.log(2) if stage == "rm" else None
            entries.append({"title": f"{title} loss", "colour": {"pretrain": "base"}.get(stage, stage),
                            "valid": _has(valid), "chance": "ln 2, guessing" if chance else "",
                            "svg": plots.loss(stage, _column(rows, "step"), train, valid, colour, chance)})
    accuracy = _column(journals["rm"], "rm/accuracy")
    if _has(accuracy):
        entries.append({"title": "Reward model accuracy", "colour": "rm", "valid": False, "chance": "",
                        "svg": plots.stacked("rm accuracy", "reward model accuracy", [(
                            "pairs ranked as labeled", [(_column(journals["rm"], "step"), accuracy, plots.RM)])],
                            "step")})
    return entries


def signals(runs: Mapping[str, Rows], models: Sequence[str]) -> list[dict[str, Any]]:
    """PPO's health signals: title, explanation, each arm's first and last value, SVG."""
    entries = []
    for name, (title, note) in SIGNALS.items():
        curves = _of_arms(runs, name, models, plots.PPO)
        if curves:
            ends = [(float(finite[0]), float(finite[-1])) for _, values, _ in curves
                    if len(finite := values[np.isfinite(values)])]
            entries.append({"title": title, "note": note, "ends": ends, "svg": plots.signal(title.lower(), curves)})
    return entries


def _ratio_error(runs: Mapping[str, Rows]) -> float | None:
    """Largest |ratio - 1| in the first minibatch of an iteration; near 0 in a correct PPO."""
    ratios = np.concatenate([_column(rows, "ppo/ratio_first") for rows in runs.values()])
    return float(np.nanmax(np.abs(ratios - 1))) if _has(ratios) else None


def tax_rows(evaluation: Mapping[str, Any]) -> list[plots.TaxRow]:
    """Scores, standard errors, chance level and tax of each alignment-tax task, as shares of a perfect score."""
    models = models_of(evaluation)

    def share(kind: str, task: str) -> float | None:
        value = number(evaluation, f"{kind}/{task}")
        return None if value is None else value / (number(evaluation, f"tax_unit/{task}") or 1)

    def of_models(kind: str, task: str) -> dict[str, float]:
        return {model: value for model in models if (value := share(f"{kind}/{model}", task)) is not None}

    return [plots.TaxRow(task, of_models("tax_score", task), of_models("tax_se", task), share("tax_chance", task),
                         share("tax", task)) for task in tax_tasks(evaluation)]


def win_plots(evaluation: Mapping[str, Any], models: Sequence[str]) -> list[dict[str, str]]:
    """Win rates of the promoted arm per use case and per slice, best first: title and SVG."""
    prefix = "eval/win_rate_vs_sft/"
    names = {key.removeprefix(prefix) for key in evaluation if key.startswith(prefix)}
    names = {name for name in names if not (name.endswith(("_low", "_high", "_n")) and name.rsplit("_", 1)[0] in names)}
    rates = [row for name in sorted(names) if (row := estimate(evaluation, prefix + name, name))]
    rates.sort(key=lambda row: -row.value)
    groups = (("Win rate per use case", "use cases", [row for row in rates if row.name not in SLICES]),
              ("Win rate on the hard slices", "slices", [row for row in rates if row.name in SLICES]))
    arm = promoted_of(evaluation)
    colour = plots.model_colours([*models, arm])[arm]
    return [{"title": title, "svg": plots.win_rates(name, rows, arm, colour)} for title, name, rows in groups if rows]


def quality_rows(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per measured quality: title, and per model the value with its interval."""
    table = []
    for stem, (title, form) in QUALITIES.items():
        cells = [estimate(evaluation, f"eval/{stem}_{model}") for model in models_of(evaluation)]
        if any(cells):
            table.append({"title": title, "cells": [
                {"value": form(cell.value) if cell else DASH,
                 "range": f"{form(cell.low)} to {form(cell.high)}" if cell and cell.low is not None else ""}
                for cell in cells]})
    return table


def group_samples(samples: Sequence[Mapping[str, Any]], arms: Sequence[str]) -> list[dict[str, Any]]:
    """The first samples of each use case, sorted by its name."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for sample in samples:
        groups.setdefault(str(sample.get("use_case", "other")), []).append(sample)
    return [{"use_case": name, "total": len(rows), "rows": [
        {"prompt": prompt_text(row.get("prompt", "")), "answers": _side_by_side(row, arms)}
        for row in rows[:SAMPLES_PER_USE_CASE]]}
        for name, rows in sorted(groups.items())]


def _side_by_side(sample: Mapping[str, Any], arms: Sequence[str]) -> list[dict[str, Any]]:
    models = models_of_sample(sample, arms)
    return [{"model": model, "colour": plots.css_colour(model, models), "text": sample.get(model) or "",
             "gold": number(sample, f"gold_{model}")} for model in models]


def data_versions(root: Path) -> list[dict[str, Any]]:
    """The outputs of data.dvc: path, md5, size in bytes, number of files; empty without the file."""
    try:
        content = yaml.safe_load((root / "data.dvc").read_text(encoding="utf-8"))
        return [{name: out.get(name, "") for name in ("path", "md5", "size", "nfiles")} for out in content["outs"]]
    except (OSError, yaml.YAMLError, TypeError, KeyError, AttributeError):
        return []


def parameters(root: Path) -> list[tuple[str, str]]:
    """(title, YAML): seed and profile, what the profile's file says, all parameters including defaults.

    Only of the stages that the report is about: those of promotion and of rounds change without it.
    """
    texts = []
    try:
        loaded = load_params(root)
        profile = f"profiles/{loaded.profile}.yaml"
        texts.append(("params.yaml", {"seed": loaded.seed, "profile": loaded.profile, "arms": list(loaded.stages.arms),
                                      "promoted": loaded.stages.promoted}))
        texts.append((profile, _reported(read_yaml(root / profile))))
        texts.append(("all parameters, including defaults", _reported(dataclasses.asdict(loaded.stages))))
    except (OSError, UserError):
        pass
    return [(title, yaml.safe_dump(content, sort_keys=False)) for title, content in texts]


def _reported(sections: Mapping[str, Any]) -> dict[str, Any]:
    return {name: values for name, values in sections.items() if name not in ("promote", "rounds")}


def final_metrics(root: Path, evaluation: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(stage, its final scalar metrics) of each stage that has a metrics file."""
    metrics: list[tuple[str, dict[str, Any]]] = []
    for stage in (*STAGES, *(f"ppo@{arm}" for arm in arms_of(evaluation))):
        path = root / f"{metrics_of(stage)}.json"
        if path.exists():
            metrics.append((stage, json.loads(path.read_text(encoding="utf-8"))))
    metrics.append(("evaluate", dict(evaluation)))
    return [(stage, {key: value for key, value in sorted(values.items()) if not isinstance(value, dict | list)})
            for stage, values in metrics if isinstance(values, dict)]
