"""Writes reports/report.html: one self-contained page on whether PPO is better than SFT, and at what price.

The page loads no external resources; equal journals and metrics give equal bytes. What was not measured is omitted or
shown as a dash.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml

from mlops.config.loader import load_params, read_yaml
from mlops.config.paths import POLICY_METRICS, metrics_of
from mlops.reporting import captions, plots
from mlops.reporting.comparison import (
    SLICES,
    best_of_plot,
    machine,
    models_of,
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
from mlops.reporting.journals import RUN_MARK, KlRule, Rows, column, columns, measured, read_rows, rules_of
from mlops.reporting.models import at_ceiling, model_table, task_taxes
from mlops.reporting.samples import group_samples
from rlhf.errors import UserError
from rlhf.files import write_atomic

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
# Control characters, bidirectional overrides and lone surrogates, which a model may emit.
UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def write_report(root: Path, target: Path, evaluation: dict[str, Any], samples: list[dict[str, Any]],
                 curves: dict[str, Any], code: str = "") -> None:
    """Renders the report of the run in `root` to `target`.

    `evaluation`: the content of metrics/evaluate.json. `samples`: rows with use_case, prompt, answers: {model: {text,
    gold, rm_score}}, and `preferred`, the judge's preference for the promoted arm over SFT, 0 to 1. `curves`:
    "kl_gold", rows {"kl", "rm_score", "gold"} that replace those of ppo.csv, and "best_of_n", rows of the same form;
    both optional. `code`: the version of the code.
    """
    models, arms, promoted = models_of(evaluation), arms_of(evaluation), promoted_of(evaluation)
    journals = {stage: read_rows(root / "metrics" / f"{stage}.csv") for stage in JOURNALS}
    runs = {arm: read_rows(root / POLICY_METRICS / f"{arm}.csv") for arm in arms}
    rules, finals = rules_of(root, runs), final_metrics(root, evaluation)
    taxes = tax_rows(evaluation)
    titles, steps = model_table(evaluation, tasks=False)
    page = _template().render(
        facts=run_facts(root, code), run_mark=RUN_MARK,
        verdict=verdict(evaluation, rules[promoted]), cards=headline_cards(evaluation, rules[promoted]), models=models,
        colours={model: plots.css_colour(model, [*models, *arms]) for model in [*models, *arms]}, arms=arms,
        promoted=promoted, titles=titles, steps=steps, task_taxes=task_taxes(evaluation),
        ceiling=at_ceiling(evaluation),
        judge=judge_words(evaluation), stand_in=f"eval/gold_{promoted}" in evaluation,
        taxed=[model for model in models if any(model in row.scores for row in taxes)], machine=machine(),
        matrix=win_matrix(evaluation, models), strengths=strength_plot(evaluation, models),
        slices=slice_rows(evaluation, models), best_of=best_of_plot(curves.get("best_of_n") or []),
        turns=turn_sentences(evaluation), tasks=task_rows(evaluation, models),
        ppo_plots=ppo_plots(runs, curves, models, rules), losses=loss_plots(journals, dict(finals)),
        signals=signals(runs, models),
        captions={"scores": captions.of_scores(runs), "kl": captions.of_kl(runs, rules),
                  "beta": captions.of_beta(runs, rules)},
        one_goal=len({(rule.goal, rule.band) for rule in rules.values()}) == 1 and rules[promoted].goal is not None,
        rule=rules[promoted],
        ratio_error=_ratio_error(runs), taxes=taxes, tax_plot=plots.tax(taxes) if taxes else "",
        wins=win_plots(evaluation, models), qualities=quality_rows(evaluation),
        samples=group_samples(samples, arms, promoted),
        data_versions=data_versions(root), parameters=parameters(root), finals=finals,
    )
    write_atomic(target, (page.strip() + "\n").encode())


def _template() -> jinja2.Template:
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
                                     trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters.update(percent=percent, score=score, points=points, figure=figure, clean=clean, fixed=fixed,
                               words=plots.words, label=plots.label)
    return environment.get_template("report.html.j2")


def fixed(value: float) -> str:
    """A score with two decimals."""
    return f"{value:.2f}".replace("-", "\N{MINUS SIGN}")


def clean(text: Any) -> str:
    """Text with unprintable characters replaced by U+FFFD."""
    return UNPRINTABLE.sub("\ufffd", str(text).replace("\r\n", "\n"))


def ppo_plots(runs: Mapping[str, Rows], curves: Mapping[str, Any], models: Sequence[str],
              rules: Mapping[str, KlRule]) -> dict[str, str]:
    """The SVGs "scores", "kl", "beta" and "against_kl", with a curve for each arm; empty where columns are missing."""
    drawn = dict.fromkeys(("scores", "kl", "beta", "against_kl"), "")
    scores = {"RM score": _of_arms(runs, "ppo/rm_score", models, plots.RM),
              "gold score": _of_arms(runs, "ppo/gold", models, plots.GOLD)}
    if any(scores.values()):
        drawn["scores"] = plots.stacked("scores", "reward-model and gold score",
                                        [panel for panel in scores.items() if panel[1]], "iteration")
    colours = _arm_colours(runs, models, plots.PPO)
    distances = [plots.KlRun(colours[arm], column(rows, "step"), column(rows, "ppo/kl"),
                             column(rows, "ppo/kl_smoothed"), rules[arm].goal, rules[arm].band)
                 for arm, rows in runs.items() if measured(column(rows, "ppo/kl"))]
    if distances:
        drawn["kl"] = plots.kl(distances)
    betas = [curve for curve in _of_arms(runs, "ppo/beta", models, plots.PPO) if (curve[1] > 0).any()]
    if betas:
        drawn["beta"] = plots.beta(betas)
    alone = (plots.RM, plots.GOLD)
    scored = [plots.ScoredRun(alone if len(runs) == 1 else (colours[arm], colours[arm]),
                              *columns(rows, "ppo/kl", "ppo/rm_score", "ppo/gold")) for arm, rows in runs.items()]
    points = curves.get("kl_gold") or []
    if points:
        scored = [plots.ScoredRun(alone, *(np.array([_float(point.get(name)) for point in points])
                                           for name in ("kl", "rm_score", "gold")))]
    scored = [run for run in scored if measured(run.kl + run.rm_score + run.gold)]
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
    return [(column(rows, "step"), values, colours[arm]) for arm, rows in runs.items()
            if measured(values := column(rows, name))]


def _float(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def loss_plots(journals: Mapping[str, Rows], finals: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    """Title, SVG, legend and caption of each stage's loss and of the reward model's accuracy."""
    entries = []
    for stage, title, colour in (("pretrain", "Pretraining", plots.BASE), ("sft", "SFT", plots.SFT),
                                 ("rm", "Reward model", plots.RM)):
        rows, final = journals[stage], finals.get(stage, {})
        step, train, valid = columns(rows, "step", f"{stage}/loss", f"{stage}/valid_loss")
        before = final.get("sft/valid_loss_base") if stage == "sft" else None
        points = (step, valid) if before is None else (np.append([0.0], step), np.append([before], valid))
        if measured(train):
            chance = math.log(2) if stage == "rm" else None
            entries.append({"title": f"{title} loss", "colour": {"pretrain": "base"}.get(stage, stage),
                            "valid": measured(points[1]), "chance": "ln 2, guessing" if chance else "",
                            "caption": captions.of_loss(stage, rows, final),
                            "svg": plots.trained(f"{stage} loss", "loss, nats", (step, train, colour), points, chance)})
    step, train, valid = columns(journals["rm"], "step", "rm/train_accuracy", "rm/valid_accuracy")
    if measured(train):
        entries.append({"title": "Reward model accuracy", "colour": "rm", "valid": measured(valid),
                        "chance": "guessing", "caption": captions.of_accuracy(journals["rm"], finals.get("rm", {})),
                        "svg": plots.trained("rm accuracy", "pairs as labeled", (step, train, plots.RM), (step, valid),
                                             0.5)})
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
    ratios = np.concatenate([column(rows, "ppo/ratio_first") for rows in runs.values()])
    return float(np.nanmax(np.abs(ratios - 1))) if measured(ratios) else None


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


def run_facts(root: Path, code: str) -> list[tuple[str, str]]:
    """(name, value) of what tells this run from others. Its name, time and commit come with the upload (RUN_MARK):
    the page of equal code, data and parameters has equal bytes."""
    facts = []
    with suppress(OSError, UserError):
        loaded = load_params(root)
        facts = [("profile", loaded.profile), ("seed", str(loaded.seed)), ("policies", ", ".join(loaded.stages.arms))]
    facts += [(f"md5 of {out['path']}/", str(out["md5"])[:8]) for out in data_versions(root)]
    return facts + ([("code of the evaluation", code)] if code else [])


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
