"""Compares the models on held-out prompts: preference, alignment tax, safety, over-optimisation; writes the report.

    python -m tasks.evaluate
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlops.config.arms import refuse_leftovers
from mlops.config.paths import BENCHMARKS, CORPUS, JUDGE, MODELS, POLICIES, POLICY_METRICS, PROMPTS, RM, TAX
from rlhf.data.corpus import corpus_texts
from rlhf.data.schema import read_rows
from rlhf.errors import UserError
from rlhf.evaluation.generate import Answers, answer, kl_to_reference
from rlhf.evaluation.graded import bits_metrics
from rlhf.evaluation.held_out import HeldOut, best_of_curve, held_out_rows, judge_of
from rlhf.evaluation.lm_eval import TaskScore, TaskSuite, local_tasks, measure
from rlhf.evaluation.metrics import gold_metrics, kl_metrics, preference_metrics, safety_metrics, tax_metrics
from rlhf.evaluation.overoptimisation import find_peak
from rlhf.evaluation.perplexity import document_bits
from rlhf.evaluation.preference import compare_all, outcome, reward_judge
from rlhf.files import is_writer, write_csv
from rlhf.params import EvaluateParams
from rlhf.training import distributed
from rlhf.training.journal import read_journal
from rlhf.training.progress import StageProgress
from rlhf.training.seeding import seed_everything
from rlhf.world.gold import gold_labeler
from rlhf.world.labeler import Grades
from tasks.stage import Stage, code_hash, run_stage

PROMPTED = "base_prompted"
KEPT = Path("scratch/evaluate/kept")  # results of tasks, by code, then by the contents of model and task
BEST_OF = "best_of_n.csv"


def evaluate(stage: Stage) -> None:
    """Writes metrics/evaluate.json, metrics/best_of_n.csv and reports/report.html."""
    params, seed = stage.params.stages.evaluate, stage.params.seed
    arms, promoted = list(stage.params.stages.arms), stage.params.stages.promoted
    refuse_leftovers(stage.root, arms)
    seed_everything(seed)
    held_out = HeldOut(held_out_rows(PROMPTS, params.prompts, seed), gold_labeler(seed))
    folders = MODELS | {arm: POLICIES / arm for arm in arms}
    folders |= {name: _folder(name, path) for name, path in params.others.items()}
    kept = KEPT / code_hash(stage.name, stage.root)
    answers: dict[str, Answers] = {}
    tasks: dict[str, dict[str, TaskScore]] = {}
    texts, documents = list(corpus_texts(CORPUS, held_out=True)), dict[str, list[float]]()
    others: dict[str, dict[str, TaskScore]] = {}
    with StageProgress("evaluate", 2 * len(folders) + 2) as progress:
        for name, folder in folders.items():
            answers[name] = answer(folder, RM, held_out.prompts, params, seed, ends_at_newline=name == "base")
            if name == "base" and (params.shots or params.prompt_form):
                answers[PROMPTED] = answer(folder, RM, held_out.prompts, params, seed, ends_at_newline=True,
                                           shots=demonstrations(params.shots), form=params.prompt_form)
            progress.step()
            tasks[name] = measure(folder, tax_harness(params), kept)
            if params.other_tasks:
                others[name] = measure(folder, harness(params, params.other_tasks), kept)
            if texts and name not in params.others:  # tokens of another tokenizer are not comparable
                documents[name] = document_bits(folder, texts, params.precision)
            progress.step()
        metrics: dict[str, Any] = {"eval/prompts": len(held_out.rows), "eval/arm": promoted, "eval/arms": arms,
                                   **safety_metrics(held_out, answers)}
        grades: dict[str, list[Grades]] = {}
        if held_out.labeler:
            grades = {name: distributed.by_rows(held_out.labeler.grades, held_out.prompts, found.texts)
                      for name, found in answers.items()}
            metrics |= gold_metrics(held_out, grades, params, seed, arms, promoted)
        judged, preferred = preferences(stage, held_out, answers)
        metrics |= judged
        kl = {arm: kl_to_reference(folders[arm], MODELS["sft"], held_out.prompts, answers[arm], params.precision,
                                   params.temperature) for arm in arms}
        metrics |= kl_metrics(kl, params, seed)
        metrics |= tax_metrics(tasks, others, params, seed, arms, promoted)
        metrics |= bits_metrics(tasks, documents, params.bootstrap, seed)
        progress.step()
        curve = best_of_curve(MODELS["sft"], RM, held_out, params, seed)
        metrics |= turn_metrics(arms, curve)
        progress.step()
    write_csv(stage.scratch / BEST_OF, curve)
    stage.publish(BEST_OF, f"metrics/{BEST_OF}")
    if is_writer():  # the others need not draw
        write_page(stage, metrics, samples(held_out.rows, answers, grades, preferred), curve)
    stage.finish(metrics, ["reports/report.html"])


def preferences(stage: Stage, held_out: HeldOut, answers: dict[str, Answers]) -> tuple[dict[str, Any], list[float]]:
    """(metrics, preference for the promoted arm over SFT on each prompt, 0 to 1).

    Win rates by the judge; beside those of a judge trained on comparisons, what the run's own reward model prefers,
    which PPO has optimised. No preference on each prompt where that model alone judges.
    """
    params, seed, promoted = stage.params.stages.evaluate, stage.params.seed, stage.params.stages.promoted
    texts = {name: found.texts for name, found in answers.items()}
    metrics: dict[str, Any] = {}
    judge, kind = judge_of(params, held_out.labeler, RM, JUDGE)
    if kind == "held_out":
        own = compare_all(held_out.prompts, texts, reward_judge(RM, params.precision))
        metrics |= preference_metrics(held_out, answers, own, params, seed, "rm_prefers", promoted)
        measured = json.loads(Path("metrics/judge.json").read_text(encoding="utf-8"))
        metrics["eval/judge_accuracy"] = measured["judge/accuracy"]
    outcomes = compare_all(held_out.prompts, texts, judge)
    metrics |= preference_metrics(held_out, answers, outcomes, params, seed,
                                  "rm_prefers" if kind == "own" else "win_rate", promoted)
    return metrics | {"eval/judge": kind}, [] if kind == "own" else outcome(outcomes, promoted, "sft")


def demonstrations(count: int) -> list[dict[str, str]]:
    """The first of the labelers' demonstrations: what the prompted base is shown."""
    rows = [row for row in read_rows(Path("data/sft.jsonl")) if row["split"] == "train"]
    return ([row for row in rows if row["source"] == "labeler"] or rows)[:count]


def _folder(name: str, path: str) -> Path:
    if name in {*MODELS, PROMPTED} or not name.replace("_", "").isalnum():
        raise UserError(f"evaluate.others: {name!r} cannot be a model's name; use letters, digits and _, and none of "
                        f"{', '.join([*MODELS, PROMPTED])}")
    if not (Path(path) / "config.json").is_file():
        raise UserError(f"evaluate.others: {name}: {path} is no model folder (it has no config.json)")
    return Path(path)


def harness(params: EvaluateParams, tasks: Sequence[str]) -> TaskSuite:
    return TaskSuite(tasks, [TAX, BENCHMARKS], params.task_data, params.tax_items, params.few_shot,
                   params.task_batch_size, params.precision, params.chat_tasks)


def tax_harness(params: EvaluateParams) -> TaskSuite:
    """The tasks of data/tax and those that the parameters name."""
    return harness(params, [*local_tasks([TAX]), *params.tax_tasks])


def turn_metrics(arms: Sequence[str], curve: Sequence[dict[str, float]]) -> dict[str, float]:
    """Where the gold score peaks over each arm's PPO run and over best-of-n; a fitted turn only where Gao's curve has
    one."""
    metrics: dict[str, float] = {}
    runs = {"best_of_n": ([row["kl"] for row in curve], [row["gold"] for row in curve], "best_of_n")}
    for arm in arms:
        journal = [row for row in read_journal(POLICY_METRICS / f"{arm}.csv") if row.get("ppo/gold")]
        runs[arm] = ([float(row["ppo/kl"]) for row in journal], [float(row["ppo/gold"]) for row in journal], "rl")
    for name, (kl, gold, form) in runs.items():
        if len(kl) < 3:
            continue
        turn = find_peak(kl, gold, form) if form == "rl" else find_peak(kl, gold, form, 1, curve[-1]["drop_stderr"])
        metrics |= {f"overopt/{name}_peak_kl": turn.peak_kl, f"overopt/{name}_drop": turn.drop,
                    f"overopt/{name}_turned": float(turn.turned)}
        if math.isfinite(turn.fitted_kl):
            metrics |= {f"overopt/{name}_fitted_turn_kl": turn.fitted_kl,
                        f"overopt/{name}_fitted_gain": turn.fitted_gain}
    return metrics


def samples(rows: list[dict[str, Any]], answers: dict[str, Answers], grades: dict[str, list[Grades]],
            preferred: Sequence[float]) -> list[dict[str, Any]]:
    """Responses side by side, for the report (mlops/reporting/report.py:write_report)."""
    found = []
    for index, row in enumerate(rows):
        sides = {name: {"text": own.texts[index], "rm_score": own.rm_scores[index],
                        **({"gold": grades[name][index].score} if name in grades else {})}
                 for name, own in answers.items()}
        found.append({"use_case": row["use_case"], "prompt": row["prompt"], "answers": sides,
                      **({"preferred": preferred[index]} if preferred else {})})
    return found


def write_page(stage: Stage, metrics: dict[str, Any], side_by_side: list[dict[str, Any]],
               best_of: list[dict[str, float]]) -> None:
    from mlops.reporting.report import (
        write_report,  # matplotlib costs a second that a failing evaluation need not wait for
    )

    page = stage.scratch / "report.html"
    write_report(stage.root, page, metrics, side_by_side, {"best_of_n": best_of}, code_hash(stage.name, stage.root))
    stage.publish("report.html", "reports/report.html")


if __name__ == "__main__":
    run_stage("evaluate", evaluate)
