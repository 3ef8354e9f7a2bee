"""Compares base, SFT and PPO on held-out prompts, measures the alignment tax, writes the report.

    python -m tasks.evaluate
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from rlhf.data.schema import read_rows
from rlhf.evaluate import Answers, answer, mean_kl, outcomes, with_interval
from rlhf.models import load_policy
from rlhf.params import EvaluateParams
from rlhf.progress import StageProgress
from rlhf.seeding import generator, seed_everything
from rlhf.tax import measure_task
from rlhf.tokenizer import load_tokenizer
from rlhf.world.labeler import TOP, GoldLabeler, Grades, compare
from rlhf.world.tax import CHANCE
from tasks.gold import gold_labeler
from tasks.stage import Stage, run_stage

MODELS = {"base": Path("models/pretrain"), "sft": Path("models/sft"), "ppo": Path("models/ppo")}
RM = Path("models/rm")


def evaluate(stage: Stage) -> None:
    """Writes metrics/evaluate.json and reports/report.html."""
    params, seed = stage.params.stages.evaluate, stage.params.seed
    seed_everything(seed)
    rows = held_out(params, seed)
    prompts = [row["prompt"] for row in rows]
    labeler = gold_labeler(seed)
    answers: dict[str, Answers] = {}
    tax: dict[str, dict[str, list[float]]] = {}
    with StageProgress("evaluate", 2 * len(MODELS)) as progress:
        for name, folder in MODELS.items():
            answers[name] = answer(folder, RM, prompts, params, "fp32", seed, ends_at_newline=name == "base")
            progress.step()
            tax[name] = tax_scores(folder, params)
            progress.step()
    metrics: dict[str, Any] = {"eval/prompts": len(prompts), **model_metrics(answers)}
    grades: dict[str, list[Grades]] = {}
    if labeler:
        grades = {name: labeler.grades(prompts, found.texts) for name, found in answers.items()}
        metrics.update(gold_metrics(grades, params, seed))
        metrics.update(win_rates(rows, grades, labeler, params, seed))
    else:
        metrics.update(rm_preferences(answers, params, seed))
    metrics["eval/kl_ppo"] = mean_kl(MODELS["ppo"], MODELS["sft"], prompts, answers["ppo"], "fp32",
                                     params.temperature)
    metrics.update(tax_metrics(tax, params, seed))
    write_page(stage, metrics, samples(rows, answers, grades))
    stage.finish(metrics, ["reports/report.html"])


def held_out(params: EvaluateParams, seed: int) -> list[dict[str, Any]]:
    """Seeded choice of valid PPO prompts: about entities that no training prompt mentions."""
    rows = [row for row in read_rows(Path("data/ppo.jsonl")) if row["split"] == "valid"]
    chosen = torch.randperm(len(rows), generator=generator(seed, "held out"))[: params.prompts].tolist()
    return [rows[index] for index in sorted(chosen)]


def tax_scores(folder: Path, params: EvaluateParams) -> dict[str, list[float]]:
    """Right (1) or wrong (0) per item and task."""
    model, tokenizer = load_policy(folder), load_tokenizer(folder)
    found = {}
    for path in sorted(Path("data/tax").glob("*.jsonl")):
        items = list(read_rows(path))
        found[path.stem] = measure_task(model, tokenizer, items[: params.tax_items or None], "fp32")
    return found


def model_metrics(answers: dict[str, Answers]) -> dict[str, float]:
    """RM score and length of each model's responses."""
    metrics: dict[str, float] = {}
    for name, found in answers.items():
        metrics[f"eval/rm_score_{name}"] = sum(found.rm_scores) / len(found.rm_scores)
        metrics[f"eval/length_{name}"] = sum(map(len, found.ids)) / len(found.ids)
    return metrics


def gold_metrics(grades: dict[str, list[Grades]], params: EvaluateParams, seed: int) -> dict[str, float]:
    """Gold score and shares of fully helpful / truthful / harmless responses of each model."""
    metrics: dict[str, float] = {}
    for name, found in grades.items():
        metrics.update(with_interval(f"eval/gold_{name}", [item.score for item in found], params.bootstrap, seed))
        for dimension in ("helpful", "truthful", "harmless"):
            full = [float(getattr(item, dimension) == TOP) for item in found]
            metrics[f"eval/{dimension}_{name}"] = sum(full) / len(full)
    return metrics


def rm_preferences(answers: dict[str, Answers], params: EvaluateParams, seed: int) -> dict[str, float]:
    """How often the reward model prefers PPO's response: PPO was trained on it, so this shows learning, no more."""
    metrics: dict[str, float] = {}
    for other in ("sft", "base"):
        preferences = [(ours > theirs) - (ours < theirs) for ours, theirs in
                       zip(answers["ppo"].rm_scores, answers[other].rm_scores, strict=True)]
        metrics.update(with_interval(f"eval/rm_prefers_ppo_to_{other}", outcomes(preferences), params.bootstrap, seed))
    return metrics


def win_rates(rows: list[dict[str, Any]], grades: dict[str, list[Grades]], labeler: GoldLabeler,
              params: EvaluateParams, seed: int) -> dict[str, float]:
    """PPO against SFT and base by the noise-free labeler, ties half; by use case and slice against SFT."""
    metrics: dict[str, float] = {}
    groups: dict[str, list[float]] = defaultdict(list)
    slices = [labeler.slices(row["prompt"]) for row in rows]
    for other in ("sft", "base"):
        preferences = [compare(a, b, "high_stakes" in names)
                       for a, b, names in zip(grades["ppo"], grades[other], slices, strict=True)]
        results = outcomes(preferences)
        metrics.update(with_interval(f"eval/win_rate_vs_{other}", results, params.bootstrap, seed))
        if other == "sft":
            for row, names, result in zip(rows, slices, results, strict=True):
                for group in (row["use_case"], *names):
                    groups[group].append(result)
    for group, results in sorted(groups.items()):
        metrics.update(with_interval(f"eval/win_rate_vs_sft/{group}", results, params.bootstrap, seed))
        metrics[f"eval/win_rate_vs_sft/{group}_n"] = len(results)
    gains = [ppo.score - sft.score for ppo, sft in zip(grades["ppo"], grades["sft"], strict=True)]
    metrics.update(with_interval("eval/gold_gain_vs_sft", gains, params.bootstrap, seed))
    return metrics


def tax_metrics(tax: dict[str, dict[str, list[float]]], params: EvaluateParams, seed: int) -> dict[str, float]:
    """Tax per task = base - PPO, in the task's unit (share right), and the mean over tasks."""
    metrics: dict[str, float] = {}
    for task, base in tax["base"].items():
        metrics[f"tax_chance/{task}"] = CHANCE[task]
        for name, scores in tax.items():
            share = sum(scores[task]) / len(scores[task])
            metrics[f"tax_score/{name}/{task}"] = share
            metrics[f"tax_se/{name}/{task}"] = (share * (1 - share) / len(scores[task])) ** 0.5
        difference = [b - a for b, a in zip(base, tax["ppo"][task], strict=True)]
        metrics.update(with_interval(f"tax/{task}", difference, params.bootstrap, seed))
    if not tax["base"]:
        return metrics
    by_item = [[b - a for b, a in zip(tax["base"][task], tax["ppo"][task], strict=True)] for task in tax["base"]]
    means = [sum(column) / len(column) for column in zip(*by_item, strict=True)]
    metrics.update(with_interval("tax/mean", means, params.bootstrap, seed))
    return metrics


def samples(rows: list[dict[str, Any]], answers: dict[str, Answers],
            grades: dict[str, list[Grades]]) -> list[dict[str, Any]]:
    """Responses side by side, for the report."""
    return [{"use_case": row["use_case"], "prompt": row["prompt"],
             **{name: found.texts[index] for name, found in answers.items()},
             **{f"gold_{name}": found[index].score for name, found in grades.items()}}
            for index, row in enumerate(rows)]


def write_page(stage: Stage, metrics: dict[str, Any], side_by_side: list[dict[str, Any]]) -> None:
    from tasks.report import write_report  # matplotlib costs a second that a failing evaluation need not wait for

    page = stage.scratch / "report.html"
    write_report(stage.root, page, metrics, side_by_side, {})
    stage.publish("report.html", "reports/report.html")


if __name__ == "__main__":
    run_stage("evaluate", evaluate)
