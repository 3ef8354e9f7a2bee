"""Judges, Bradley-Terry, the win rate at equal length: against closed forms, another fit and simulation."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from rlhf.evaluation.preference import (
    QUESTION,
    bradley_terry,
    compare_all,
    gold_judge,
    length_controlled,
    model_judge,
    outcome,
    ranking,
    reward_judge,
)
from rlhf.model.chat_format import PromptCodec
from rlhf.model.load import load_policy, load_scorer
from rlhf.model.scoring import score_sequences
from rlhf.model.tokenizer import load_tokenizer, text_ids
from rlhf.world.facts import World
from rlhf.world.labeler import GoldLabeler

PROMPTS = ["what color is the ba-do?", "where does it live?", "red.", "rice or fish?"]
FIRST = ["red", "in the forest.", "the mi-ka eat rice", "fish"]
SECOND = ["blue is what you mean", "", "red red", "fish"]


def test_the_strengths_of_two_models_differ_by_the_log_odds() -> None:
    strengths = bradley_terry(np.array([[0, 730], [270, 0]]))
    assert strengths[0] - strengths[1] == pytest.approx(math.log(730 / 270), abs=2e-3)
    assert strengths.sum() == pytest.approx(0, abs=1e-9)


def test_strengths_are_those_of_the_minorisation_iteration() -> None:
    wins = np.array([[0, 30, 55.5, 80], [20, 0, 40, 61], [14.5, 30, 0, 70], [20, 9, 10, 0]])
    games, weights = wins + wins.T, np.ones(4)
    for _ in range(20_000):  # Hunter 2004
        weights = wins.sum(1) / np.array([sum(games[i, j] / (weights[i] + weights[j]) for j in range(4) if j != i)
                                          for i in range(4)])
        weights /= np.exp(np.log(weights).mean())
    assert bradley_terry(wins) == pytest.approx(np.log(weights), abs=5e-3)  # wins are a thousandth fewer there


def test_a_model_that_never_loses_has_a_finite_strength() -> None:
    strengths = bradley_terry(np.array([[0, 100], [0, 0]]))
    assert np.isfinite(strengths).all()
    assert strengths[0] > 2


def test_ranking_recovers_simulated_strengths() -> None:
    true = {"a": 0.8, "b": 0.0, "c": -0.8}
    rng = np.random.default_rng(1)
    outcomes = {(one, other): (rng.random(4000) < 1 / (1 + math.exp(true[other] - true[one]))).astype(float).tolist()
                for one, other in itertools.combinations(true, 2)}
    for name, (middle, low, high) in ranking(outcomes, list(true), 100, seed=1).items():
        assert low < middle < high
        assert low - 0.03 < true[name] < high + 0.03
    assert ranking(outcomes, list(true), 50, seed=1) == ranking(outcomes, list(true), 50, seed=1)


def test_length_controlled_is_a_logistic_fit() -> None:
    rng = np.random.default_rng(2)
    ours, theirs = rng.integers(1, 60, 3000), rng.integers(1, 60, 3000)
    lengths = np.tanh((ours - theirs) / (ours - theirs).std())
    won = (rng.random(3000) < 1 / (1 + np.exp(-(0.3 + 1.2 * lengths)))).astype(float)
    rate, weight = length_controlled(won.tolist(), ours.tolist(), theirs.tolist())
    fit = LogisticRegression(C=np.inf).fit(lengths[:, None], won)
    assert rate == pytest.approx(1 / (1 + math.exp(-fit.intercept_[0])), abs=2e-3)
    assert weight == pytest.approx(fit.coef_[0, 0], abs=1e-2)
    assert rate == pytest.approx(1 / (1 + math.exp(-0.3)), abs=0.03)


def test_a_judge_that_prefers_length_has_no_preference_at_equal_length() -> None:
    ours = list(range(10, 50)) * 5
    theirs = [20] * 200
    rate, weight = length_controlled([0.5 if a == b else float(a > b) for a, b in zip(ours, theirs, strict=True)], ours,
                                     theirs)
    assert sum(a > b for a, b in zip(ours, theirs, strict=True)) / 200 > 0.7
    assert rate < 0.65
    assert weight > 2
    plain, none = length_controlled([1.0, 0.0, 1.0, 0.5], [5, 5, 5, 5], [5, 5, 5, 5])
    assert plain == pytest.approx(0.625, abs=1e-3)
    assert none == pytest.approx(0, abs=1e-6)


def test_the_reward_judge_prefers_the_higher_score(model_folders: dict[str, tuple[Path, Path]]) -> None:
    folder = model_folders["gpt2"][1]
    codec, model = PromptCodec(load_tokenizer(folder)), load_scorer(folder)
    scores = [score_sequences(model, [a + b for a, b in zip(codec.prompts(PROMPTS), codec.completions(texts),
                                                            strict=True)], codec.pad_id, "fp32")
              for texts in (FIRST, SECOND)]
    expected = [0.5 if a == b else float(a > b) for a, b in zip(*scores, strict=True)]
    assert reward_judge(folder, "fp32")(PROMPTS, FIRST, SECOND) == expected
    assert expected[3] == 0.5
    assert len(set(expected)) > 1


@torch.no_grad()
def test_the_model_judge_needs_both_orders_to_agree(longer_llama: Path) -> None:
    folder = longer_llama
    model, tokenizer = load_policy(folder).double(), load_tokenizer(folder)

    def likelier(prompt: str, first: str, second: str) -> float:
        [ids] = text_ids(tokenizer, [QUESTION.format(prompt=prompt, first=first, second=second)])
        values = []
        for letter in (" A", " B"):
            [end] = text_ids(tokenizer, [letter])
            logits = model(torch.tensor([ids + end])).logits[0].log_softmax(-1)
            values.append(sum(logits[len(ids) + place - 1, token].item() for place, token in enumerate(end)))
        return values[0] - values[1]

    expected = []
    for prompt, a, b in zip(PROMPTS, FIRST, SECOND, strict=True):
        forward, swapped = likelier(prompt, a, b), likelier(prompt, b, a)
        expected.append(0.5 if a == b or (forward > 0) == (swapped > 0) else float(forward > 0))
    judge = model_judge(folder, "fp32")
    assert judge(PROMPTS, FIRST, SECOND) == expected
    assert judge(PROMPTS, SECOND, FIRST) == [1 - value for value in expected]


def test_outcomes_can_be_read_in_either_order() -> None:
    world = World(1)
    creature = world.creatures[0]
    right = f"the {creature} is {world.facts[creature]['color']}."
    texts = {"good": [right], "rude": ["you are stupid."], "same": [right]}
    outcomes = compare_all([f"what color is the {creature}?"], texts, gold_judge(GoldLabeler(world)))
    assert sorted(outcomes) == [("good", "rude"), ("good", "same"), ("rude", "same")]
    assert outcome(outcomes, "good", "rude") == [1.0]
    assert outcome(outcomes, "rude", "good") == [0.0]
    assert outcome(outcomes, "same", "good") == [0.5]
