"""The metrics of metrics/evaluate.json against small cases computed by hand."""

import math
from typing import Any

import numpy as np
import pytest

from rlhf.evaluation.generate import Answers
from rlhf.evaluation.held_out import HeldOut
from rlhf.evaluation.lm_eval import TaskScore
from rlhf.evaluation.metrics import gold_metrics, preference_metrics, safety_metrics, tax_metrics
from rlhf.params import EvaluateParams
from rlhf.world.labeler import Grades

PARAMS = EvaluateParams(bootstrap=400)
ROWS: list[dict[str, Any]] = [{"use_case": "closed_qa", "prompt": "anna met ben."},
                              {"use_case": "chat", "prompt": "hello"}, {"use_case": "closed_qa", "prompt": "x y z"}]
HELD_OUT = HeldOut(ROWS, None)


def said(*texts: str) -> Answers:
    return Answers([[1] * len(text.split()) for text in texts], list(texts), [float(len(text)) for text in texts])


def score(items: list[float], higher_is_better: bool = True) -> TaskScore:
    return TaskScore("acc", sum(items) / len(items), 0.1, higher_is_better, 1.0, 0.25, items)


def bleu(value: float) -> TaskScore:
    """A corpus-level score, without values of items."""
    return TaskScore("bleu", value, 1.0, True, 100.0, None, [])


def test_tax_is_paired_by_item() -> None:
    rng = np.random.default_rng(1)
    base = rng.integers(0, 2, 400).astype(float)
    worse = base.copy()
    worse[:40] = 0
    metrics = tax_metrics({"base": {"t": score(base.tolist())}, "ppo": {"t": score(worse.tolist())},
                         "sft": {"t": score(base.tolist())}}, {}, PARAMS, 1)
    lost = (base - worse).mean()
    assert metrics["tax/t"] == metrics["tax/mean"] == metrics["tax_of/ppo/t"] == pytest.approx(lost)
    spread = (base - worse).std() / math.sqrt(400)
    assert metrics["tax/t_high"] - metrics["tax/t_low"] == pytest.approx(2 * 1.96 * spread, rel=0.15)
    assert (metrics["tax_of/sft/t"], metrics["tax_of/sft/t_low"], metrics["tax_of/sft/t_high"]) == (0, 0, 0)
    assert metrics["tax_chance/t"] == 0.25


def test_tax_in_other_units_and_if_lower_scores_are_better() -> None:
    tasks = {"base": {"bleu": bleu(40.0), "toxic": score([0.2, 0.2], False)},
             "ppo": {"bleu": bleu(30.0), "toxic": score([0.4, 0.2], False)}}
    metrics = tax_metrics(tasks, {"ppo": {"truth": score([1.0, 0.0])}}, EvaluateParams(bootstrap=4000), 1)
    assert metrics["tax/bleu"] == 10
    assert metrics["tax/bleu_high"] - metrics["tax/bleu_low"] == pytest.approx(2 * 1.96 * math.sqrt(2), rel=0.1)
    assert metrics["tax/toxic"] == pytest.approx(0.1)
    assert metrics["tax/mean"] == pytest.approx((0.1 + 0.1) / 2)
    assert metrics["tax_unit/bleu"] == 100
    assert metrics["task_score/ppo/truth"] == 0.5
    assert not [name for name in metrics if name.startswith("tax") and "truth" in name]


def test_without_tasks_there_is_no_tax() -> None:
    assert tax_metrics({"base": {}, "ppo": {}}, {}, PARAMS, 1) == {}


def test_safety_counts() -> None:
    answers = said("anna met someone else.", "you stupid idiot", "please ask a doctor first.")
    metrics = safety_metrics(HELD_OUT, {"ppo": answers})
    assert metrics["eval/toxic_ppo"] == pytest.approx(1 / 3)
    assert metrics["eval/refusal_ppo"] == pytest.approx(1 / 3)
    assert metrics["eval/length_ppo"] == pytest.approx((4 + 3 + 5) / 3)
    assert metrics["eval/unsupported_words_ppo"] == pytest.approx((2 / 3 + 3 / 3) / 2)  # closed tasks only


def test_gold_counts() -> None:
    grades = {"sft": [Grades(4, 4, 4), Grades(4, 2, 4), Grades(0, 3, 4)],
              "ppo": [Grades(4, 4, 4), Grades(4, 4, 4), Grades(4, 3, 0)]}
    metrics = gold_metrics(HELD_OUT, grades, PARAMS, 1)
    assert metrics["eval/hallucination_sft"] == 0.5  # one of two closed answers is not fully truthful
    assert metrics["eval/helpful_ppo"] == 1
    assert metrics["eval/harmless_ppo"] == pytest.approx(2 / 3)
    gain = sum(a.score - b.score for a, b in zip(grades["ppo"], grades["sft"], strict=True)) / 3
    assert metrics["eval/gold_gain_vs_sft"] == pytest.approx(gain)


def test_win_rates_name_the_preferred_model() -> None:
    answers = {"base": said("a", "b", "c"), "sft": said("a b", "b", "c"), "ppo": said("a", "b", "c c")}
    outcomes = {("base", "sft"): [0.0, 0.0, 1.0], ("base", "ppo"): [0.0, 0.0, 0.5], ("sft", "ppo"): [0.0, 1.0, 0.5]}
    metrics = preference_metrics(HELD_OUT, answers, outcomes, PARAMS, 1, "win_rate")
    assert metrics["eval/win_rate/sft_vs_base"] == pytest.approx(2 / 3)
    assert metrics["eval/win_rate_vs_base"] == metrics["eval/win_rate/ppo_vs_base"] == pytest.approx(2.5 / 3)
    assert metrics["eval/win_rate_vs_sft"] == 0.5
    assert metrics["eval/win_rate_vs_sft/closed_qa"] == 0.75
    assert metrics["eval/win_rate_vs_sft/closed_qa_n"] == 2
    assert metrics["eval/strength_ppo"] > metrics["eval/strength_base"]
    prefers = preference_metrics(HELD_OUT, answers, outcomes, PARAMS, 1, "rm_prefers")
    assert not [name for name in prefers if "win_rate" in name]
