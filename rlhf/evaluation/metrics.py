"""The metrics of metrics/evaluate.json, computed from answers, grades, outcomes and task scores."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from rlhf.data.prompts import prompt_text
from rlhf.evaluation.generate import Answers, Kl
from rlhf.evaluation.held_out import HeldOut
from rlhf.evaluation.lm_eval import TaskScore
from rlhf.evaluation.preference import Outcomes, length_controlled, outcome, ranking
from rlhf.evaluation.safety import CLOSED, TOXIC_AT, refuses, repetition, toxicity, unsupported
from rlhf.evaluation.statistics import with_interval
from rlhf.params import EvaluateParams
from rlhf.world.labeler import TOP, Grades

RANKING_RESAMPLES = 200  # one Bradley-Terry fit each
Metrics = dict[str, float]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def safety_metrics(held_out: HeldOut, answers: Mapping[str, Answers]) -> Metrics:
    """Score, length, toxicity, repetition, refusals and unsupported words of each model's responses.

    `eval/toxicity_<model>` is the mean probability, `eval/toxic_<model>` the share of responses that are toxic.
    """
    metrics: Metrics = {}
    slices = held_out.slices()
    for name, own in answers.items():
        refusals = [float(refuses(text)) for text in own.texts]
        toxic = toxicity(own.texts)
        invented = [unsupported(prompt_text(row["prompt"]), text)
                    for row, text in zip(held_out.rows, own.texts, strict=True)
                    if row["use_case"] in CLOSED]
        metrics |= {f"eval/rm_score_{name}": mean(own.rm_scores), f"eval/length_{name}": mean([*map(len, own.ids)]),
                    f"eval/toxicity_{name}": mean(toxic),
                    f"eval/toxic_{name}": mean([float(value >= TOXIC_AT) for value in toxic]),
                    f"eval/repetition_{name}": mean([repetition(text) for text in own.texts]),
                    f"eval/refusal_{name}": mean(refusals)}
        if invented:
            metrics[f"eval/unsupported_words_{name}"] = mean(invented)
        for group, indices in _indices_by_slice(slices).items():
            metrics[f"eval/refusal_{name}/{group}"] = mean([refusals[index] for index in indices])
    return metrics


def _indices_by_slice(slices: Sequence[Sequence[str]]) -> dict[str, list[int]]:
    """{slice: indices of its prompts}, sorted by slice."""
    groups: dict[str, list[int]] = defaultdict(list)
    for index, names in enumerate(slices):
        for name in names:
            groups[name].append(index)
    return dict(sorted(groups.items()))


def gold_metrics(held_out: HeldOut, grades: Mapping[str, Sequence[Grades]], params: EvaluateParams, seed: int,
                 arms: Sequence[str] = ("ppo",), promoted: str = "ppo") -> Metrics:
    """Gold score, shares of fully helpful / truthful / harmless responses, also by slice, and of hallucinations.

    A hallucination is a response to a closed task (the prompt contains the answer) that is not fully truthful.
    `eval/gold_gain/<a>_vs_<b>`: each arm's gain over SFT and over the arms before it, paired by prompt;
    `eval/gold_gain_vs_sft` is the promoted arm's.
    """
    metrics: Metrics = {}
    slices = _indices_by_slice(held_out.slices())
    closed = [index for index, row in enumerate(held_out.rows) if row["use_case"] in CLOSED]
    for name, own in grades.items():
        metrics |= with_interval(f"eval/gold_{name}", [item.score for item in own], params.bootstrap, seed)
        for dimension in ("helpful", "truthful", "harmless"):
            full = [float(getattr(item, dimension) == TOP) for item in own]
            metrics[f"eval/{dimension}_{name}"] = mean(full)
            for group, indices in slices.items():
                metrics[f"eval/{dimension}_{name}/{group}"] = mean([full[index] for index in indices])
        if closed:
            metrics[f"eval/hallucination_{name}"] = mean([float(own[index].truthful < TOP) for index in closed])
    pairs = {f"eval/gold_gain/{to}_vs_{start}": (start, to) for start, to in steps(arms)}
    for key, (start, to) in {**pairs, "eval/gold_gain_vs_sft": ("sft", promoted)}.items():
        if {start, to} <= grades.keys():
            gains = [ours.score - theirs.score for ours, theirs in zip(grades[to], grades[start], strict=True)]
            metrics |= with_interval(key, gains, params.bootstrap, seed)
    return metrics


def steps(arms: Sequence[str]) -> list[tuple[str, str]]:
    """(from, to) for what PPO changes: SFT to each arm, and each arm to those after it."""
    return [("sft", arm) for arm in arms] + [(one, other) for place, one in enumerate(arms)
                                             for other in arms[place + 1:]]


def preference_metrics(held_out: HeldOut, answers: Mapping[str, Answers], outcomes: Outcomes,
                       params: EvaluateParams, seed: int, word: str, promoted: str = "ppo") -> Metrics:
    """Win rates of every pair of models, the promoted arm's in detail, and Bradley-Terry strengths; a tie counts half.

    `word`, the name of the metric: "win_rate" if the judge is independent; "rm_prefers" if it is the reward model that
    PPO was trained on, which only shows that PPO optimised it.
    """
    metrics: Metrics = {}
    for one, other in outcomes:
        metrics |= with_interval(f"eval/{word}/{other}_vs_{one}", outcome(outcomes, other, one), params.bootstrap, seed)
    lengths = {name: [len(ids) for ids in own.ids] for name, own in answers.items()}
    for other in (name for name in answers if name != promoted):
        values = outcome(outcomes, promoted, other)
        metrics |= with_interval(f"eval/{word}_vs_{other}", values, params.bootstrap, seed)
        equal, weight = length_controlled(values, lengths[promoted], lengths[other])
        metrics |= {f"eval/{word}_vs_{other}_equal_length": equal, f"eval/{word}_vs_{other}_length_weight": weight}
    groups: dict[str, list[float]] = defaultdict(list)
    for row, names, value in zip(held_out.rows, held_out.slices(), outcome(outcomes, promoted, "sft"), strict=True):
        for group in (row["use_case"], *names):
            groups[group].append(value)
    for group, results in sorted(groups.items()):
        metrics |= with_interval(f"eval/{word}_vs_sft/{group}", results, params.bootstrap, seed)
        metrics[f"eval/{word}_vs_sft/{group}_n"] = len(results)
    for name, (middle, low, high) in ranking(outcomes, list(answers), RANKING_RESAMPLES, seed).items():
        metrics |= {f"eval/strength_{name}": middle, f"eval/strength_{name}_low": low,
                    f"eval/strength_{name}_high": high}
    return metrics


def kl_metrics(found: Mapping[str, Kl], params: EvaluateParams, seed: int) -> Metrics:
    """`eval/kl_<arm>` with its interval: mean KL to the SFT policy over responses, nats; `eval/kl_k1_<arm>` and
    `eval/kl_k3_<arm>`: the estimates of it from the sampled tokens alone."""
    metrics: Metrics = {}
    for arm, kl in found.items():
        for name, values in ((f"eval/kl_{arm}", kl.exact), (f"eval/kl_k1_{arm}", kl.k1), (f"eval/kl_k3_{arm}", kl.k3)):
            metrics |= with_interval(name, values, params.bootstrap, seed)
    return metrics


def tax_metrics(tasks: Mapping[str, Mapping[str, TaskScore]], others: Mapping[str, Mapping[str, TaskScore]],
                params: EvaluateParams, seed: int, arms: Sequence[str] = (), promoted: str = "ppo") -> Metrics:
    """Scores of every model on every task, and the alignment tax: base minus model, in the task's unit.

    `tax/<task>` and `tax/mean` are the promoted arm's, `tax_of/<model>/...` every model's, `tax_between/<a>/<b>/...`
    what the step from a to b costs: SFT to each arm, and between arms. The mean is over tasks, each as a share of a
    perfect score. The intervals are paired bootstraps if scores are means over items, else normal approximations.
    """
    metrics: Metrics = {}
    for name, scores in tasks.items():
        for task, score in scores.items():
            metrics |= {f"tax_score/{name}/{task}": score.value, f"tax_se/{name}/{task}": score.stderr}
            if score.chance is not None:
                metrics[f"tax_chance/{task}"] = score.chance
    for name, scores in others.items():
        for task, score in scores.items():
            metrics |= {f"task_score/{name}/{task}": score.value, f"task_se/{name}/{task}": score.stderr}
    base = tasks["base"]
    metrics |= {f"tax_unit/{task}": score.unit for task, score in base.items() if score.unit != 1}
    pairs = {f"tax_of/{name}": ("base", name) for name in tasks if name != "base" and base}
    pairs |= {f"tax_between/{start}/{to}": (start, to) for start, to in steps(arms) if base}
    for pair, (start, name) in pairs.items():
        draws = []
        for task, score in tasks[start].items():
            random = np.random.default_rng([seed, *task.encode()])  # each task has its own items, so its own draws
            value, low, high, drawn = _tax(score, tasks[name][task], params.bootstrap, random)
            draws.append(drawn / score.unit)
            metrics |= {f"{pair}/{task}": value, f"{pair}/{task}_low": low, f"{pair}/{task}_high": high}
        means = np.mean(draws, axis=0)
        low, high = np.percentile(means[1:], [2.5, 97.5])
        metrics |= {f"{pair}/mean": float(means[0]), f"{pair}/mean_low": float(low), f"{pair}/mean_high": float(high)}
    prefix = f"tax_of/{promoted}/"
    return metrics | {"tax/" + key.removeprefix(prefix): value for key, value in metrics.items()
                      if key.startswith(prefix)}


def _tax(base: TaskScore, model: TaskScore, resamples: int, random: np.random.Generator
         ) -> tuple[float, float, float, np.ndarray]:
    """(tax, low, high, [tax, draws...]); a worse model has a positive tax, also if lower scores are better."""
    sign = 1 if base.higher_is_better else -1
    tax = sign * (base.value - model.value)
    if base.items and len(base.items) == len(model.items):
        difference = sign * (np.asarray(base.items) - np.asarray(model.items))
        drawn = np.array([difference[random.integers(0, len(difference), len(difference))].mean()
                          for _ in range(resamples)])
    else:
        drawn = tax + random.standard_normal(resamples) * math.hypot(base.stderr, model.stderr)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return tax, float(low), float(high), np.append(tax, drawn)
