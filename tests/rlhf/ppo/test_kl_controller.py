"""KL estimates against loops and exact divergences; the step rule: its limits, and that it settles."""

import itertools
import math
import random
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.model.responses import response_kl, response_kl_k3
from rlhf.ppo.kl_controller import StepAheadBeta, StepBeta


def test_estimates_equal_the_loops() -> None:
    random_numbers = np.random.default_rng(1)
    ours, reference = random_numbers.normal(-3, 1, (2, 5, 7))
    mask = (random_numbers.random((5, 7)) < 0.6).astype(float)
    k1, k3 = [0.0] * 5, [0.0] * 5
    for row in range(5):
        for place in range(7):
            if mask[row, place]:
                ratio = math.exp(reference[row, place] - ours[row, place])
                k1[row] += ours[row, place] - reference[row, place]
                k3[row] += ratio - 1 - math.log(ratio)
    arguments = [torch.tensor(item, dtype=torch.float32) for item in (ours, reference, mask)]
    assert response_kl(*arguments).tolist() == pytest.approx(k1, abs=1e-5)
    assert response_kl_k3(*arguments).tolist() == pytest.approx(k3, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("estimate", [response_kl, response_kl_k3])
def test_the_mean_under_the_policy_is_the_exact_kl(estimate: Callable[..., torch.Tensor]) -> None:
    random_numbers = np.random.default_rng(2)
    policy, reference = random_numbers.dirichlet(np.full(6, 3.0), 2)
    exact = sum(p * math.log(p / q) for p, q in zip(policy, reference, strict=True))
    length, count = 3, 40_000  # a response of 3 independent tokens has 3 times the KL of one
    tokens = random_numbers.choice(6, size=(count, length), p=policy)
    log_probs, ref_log_probs = (torch.tensor(np.log(item)[tokens]) for item in (policy, reference))
    found = estimate(log_probs, ref_log_probs, torch.ones(count, length))
    error = found.std().item() / math.sqrt(count)
    assert error < 0.05 * length * exact
    assert abs(found.mean().item() - length * exact) < 4 * error


def test_k3_is_never_negative_where_k1_is() -> None:
    less, more, mask = torch.tensor([[-3.0, -2.0]]), torch.tensor([[-1.0, -1.5]]), torch.ones(1, 2)
    assert response_kl(less, more, mask).item() == -2.5
    assert response_kl_k3(less, more, mask).item() > 0


@pytest.mark.parametrize(("kls", "expected"), [
    ([3.1, 3.1, 2.9], [0.2, 0.4, 0.4]),  # above 3/2 of a goal of 2: doubled at once, every time
    ([1.3, 1.3, 1.4], [0.05, 0.03, 0.03]),  # below 2/3 of it: halved
    ([3.0, 4 / 3, 2.0], [0.1, 0.1, 0.1]),  # on the edges and within: as it is
    ([0.0] * 5, [0.05, 0.03, 0.03, 0.03, 0.03]), ([9.0] * 5, [0.2, 0.4, 0.7, 0.7, 0.7]),  # bounds
])
def test_the_articles_rule_to_the_letter(kls: list[float], expected: list[float]) -> None:
    rule = StepBeta(kl_goal=2.0, beta=0.1, beta_min=0.03, beta_max=0.7)
    assert [rule.update(kl) for kl in kls] == pytest.approx(expected)


def test_the_articles_rule_has_no_memory_but_beta() -> None:
    one, other = StepBeta(2.0, 0.1, 1e-3, 10), StepBeta(2.0, 0.4, 1e-3, 10)
    one.update(9.0), one.update(0.1), one.update(9.0)
    one.restore({"beta": 0.4, "smoothed": 0.0})
    assert one.update(9.0) == other.update(9.0) == 0.8


def betas(kl: float, rule: StepAheadBeta, iterations: int) -> list[float]:
    return [rule.update(kl) for _ in range(iterations)]


def changes(sequence: list[float]) -> list[float]:
    return [after / before for before, after in itertools.pairwise(sequence) if after != before]


@pytest.mark.parametrize(("kl", "factor"), [(1.6, 2.0), (9.0, 2.0), (0.6, 0.5), (0.0, 0.5), (-0.01, 0.5)])
@pytest.mark.parametrize("goal", [0.5, 3.0])
def test_a_kl_that_stands_still_outside_the_band_doubles_or_halves_beta(kl: float, factor: float,
                                                                          goal: float) -> None:
    rule = StepAheadBeta(kl_goal=goal, beta=0.1, beta_min=1e-9, beta_max=1e9, interval=2)
    sequence = betas(kl * goal, rule, 24)
    assert changes(sequence) == pytest.approx([factor] * (len(changes(sequence))))
    assert len(changes(sequence)) >= 10  # every second iteration once it has seen a few
    places = [place for place in range(1, 24) if sequence[place] != sequence[place - 1]]
    assert {after - before for before, after in itertools.pairwise(places)} == {2}


@settings(max_examples=60, deadline=None)
@given(st.floats(0.67, 1.49), st.floats(0.1, 50), st.integers(1, 5))
def test_beta_never_changes_inside_the_band(share: float, goal: float, interval: int) -> None:
    rule = StepAheadBeta(kl_goal=goal, beta=0.3, beta_min=1e-3, beta_max=10, interval=interval)
    assert set(betas(share * goal, rule, 30)) == {0.3}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1, 500), min_size=1, max_size=80))
def test_bounds_hold_whatever_the_kl(kls: list[float]) -> None:
    rule = StepAheadBeta(kl_goal=2.0, beta=0.1, beta_min=0.03, beta_max=0.7, interval=1)
    assert all(0.03 <= rule.update(kl) <= 0.7 for kl in kls)


def test_bounds_are_reached() -> None:
    assert betas(99.0, StepAheadBeta(2.0, 0.1, 0.03, 0.7), 40)[-1] == 0.7
    assert betas(0.01, StepAheadBeta(2.0, 0.1, 0.03, 0.7), 40)[-1] == 0.03


def test_state_goes_on_as_if_never_stopped() -> None:
    rng = random.Random(4)
    kls = [abs(rng.gauss(3, 3)) for _ in range(40)]
    whole = StepAheadBeta(2.0, 0.1, 1e-3, 10)
    expected = [whole.update(kl) for kl in kls]
    first, second = StepAheadBeta(2.0, 0.1, 1e-3, 10), StepAheadBeta(2.0, 0.1, 1e-3, 10)
    found = [first.update(kl) for kl in kls[:17]]
    second.restore(first.state())
    found += [second.update(kl) for kl in kls[17:]]
    assert found == expected
    assert second.state() == whole.state()
    assert len(set(expected)) > 3  # there was something to remember


def simulate(update: Callable[[float], float], pace: float, stiffness: float, pull: float,
             rng: random.Random, iterations: int = 60) -> list[float]:
    """Measured KL of a made-up policy: distance th moves by lr·tanh(k·(g - β·th)), KL = th²/2 with 10 % noise."""
    distance, kls = 0.0, []
    for iteration in range(iterations):
        kls.append(distance**2 / 2 * (1 + 0.1 * rng.gauss(0, 1)))
        beta = update(kls[-1])
        distance += pace * min(1.0, (iteration + 1) / 5) * math.tanh(stiffness * (pull - beta * distance))
    return kls


def raw_rule(goal: float, beta: float, low: float = 0.0, high: float = math.inf) -> Callable[[float], float]:
    """The rule applied to the newest KL at every iteration, independent of the project's code."""
    def update(kl: float) -> float:
        nonlocal beta
        beta = min(high, beta * 2) if kl > 1.5 * goal else max(low, beta / 2) if kl < goal / 1.5 else beta
        return beta
    return update


def settings_that_can_reach_the_goal() -> Iterator[tuple[float, float, float, float, float]]:
    for pace, stiffness, pull, beta, goal in itertools.product(
            (0.05, 0.15, 0.4), (1.0, 5.0), (0.3, 1.0), (0.02, 0.1, 0.5), (0.5, 1.0, 2.0, 5.0, 10.0)):
        free = simulate(raw_rule(math.inf, beta / 64, beta / 64), pace, stiffness, pull, random.Random(0), 40)
        if max(free) >= 1.2 * goal:  # at the lowest β
            yield pace, stiffness, pull, beta, goal


def test_it_settles_where_the_raw_rule_overshoots() -> None:
    settled = dict.fromkeys(("ours", "raw", "raw without bounds"), 0)
    calm = settled.copy()  # settled, and KL never beyond twice its goal on the way
    count = 0
    for count, (pace, stiffness, pull, beta, goal) in enumerate(settings_that_can_reach_the_goal(), start=1):
        low, high = beta / 64, beta * 64
        rules = {"ours": StepAheadBeta(goal, beta, low, high).update, "raw": raw_rule(goal, beta, low, high),
                 "raw without bounds": raw_rule(goal, beta)}
        for name, update in rules.items():
            kls = simulate(update, pace, stiffness, pull, random.Random(count))
            inside = 2 / 3 <= sum(kls[-15:]) / 15 / goal <= 3 / 2
            settled[name] += inside
            calm[name] += inside and max(kls) <= 2 * goal
    assert count > 100
    assert settled["ours"] >= 0.85 * count
    assert settled["raw without bounds"] <= 0.6 * count  # the bounds of β do much of the work ...
    assert calm["ours"] >= 0.6 * count
    assert calm["raw"] <= 0.15 * count  # ... but do not keep the raw rule from running far past its goal first
