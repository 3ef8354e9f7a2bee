"""The losses against plain loops in float64: token log-probs, completion loss, K-way ranking loss and accuracy."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf.losses import completion_loss, ranking_accuracy, ranking_loss
from rlhf.model.log_probs import token_log_probs

Group = list[tuple[float, int]]  # (score, rank) of the completions of one prompt


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_log_probs(temperature: float, dtype: torch.dtype) -> None:
    logits = (torch.randn(3, 4, 11, generator=torch.Generator().manual_seed(1)) * 8).to(dtype)
    ids = torch.randint(0, 11, (3, 4), generator=torch.Generator().manual_seed(2))
    found = token_log_probs(logits, ids, temperature)
    assert found.dtype == torch.float32
    assert found.shape == (3, 4)
    for row in range(3):
        for place in range(4):
            scaled = logits[row, place].double().numpy() / temperature
            expected = scaled[ids[row, place]] - np.log(np.exp(scaled - scaled.max()).sum()) - scaled.max()
            assert found[row, place].item() == pytest.approx(expected, abs=2e-5)


def test_token_log_probs_of_huge_logits_stay_finite() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0]])
    assert token_log_probs(logits, torch.tensor([1])).item() == pytest.approx(-2e4)
    assert token_log_probs(logits, torch.tensor([0])).item() == 0


def test_completion_loss_counts_only_masked_tokens() -> None:
    log_probs = torch.tensor([[-1.0, -2.0, -50.0], [-4.0, -70.0, -90.0]])
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    assert completion_loss(log_probs, mask).item() == pytest.approx((1 + 2 + 4) / 3)


def loss_by_loops(groups: list[Group]) -> float:
    """Mean over prompts of -1/C(K,2) sum log sigmoid(r_w - r_l); every step written out."""
    total = 0.0
    for group in groups:
        subtotal = 0.0
        for first in range(len(group)):
            for second in range(first + 1, len(group)):
                (score_a, rank_a), (score_b, rank_b) = group[first], group[second]
                if rank_a == rank_b:
                    continue
                margin = score_a - score_b if rank_a < rank_b else score_b - score_a
                subtotal += math.log1p(math.exp(-margin)) if margin > -30 else -margin
        total += subtotal / math.comb(len(group), 2)
    return total / len(groups)


def pairs_by_loops(groups: list[Group]) -> tuple[int, int]:
    right = pairs = 0
    for group in groups:
        for score_a, rank_a in group:
            for score_b, rank_b in group:
                if rank_a < rank_b:
                    pairs += 1
                    right += score_a > score_b
    return right, pairs


def tensors(groups: list[Group], padding: tuple[float, int] = (-777.0, 0)) -> tuple[Tensor, Tensor, Tensor]:
    """Padded to the widest prompt; padding holds scores and ranks that would change the loss if they were read."""
    widest = max(map(len, groups))
    filled = [[*group, *[padding] * (widest - len(group))] for group in groups]
    scores = torch.tensor([[score for score, _ in group] for group in filled])
    ranks = torch.tensor([[rank for _, rank in group] for group in filled])
    present = torch.tensor([[True] * len(group) + [False] * (widest - len(group)) for group in groups])
    return scores, ranks, present


completions = st.tuples(st.integers(-400, 400).map(lambda number: number / 16), st.integers(1, 9))
batches = st.lists(st.lists(completions, min_size=2, max_size=9), min_size=1, max_size=4)


@settings(max_examples=80, deadline=None)
@given(batches)
def test_ranking_loss_and_accuracy_equal_the_loops(groups: list[Group]) -> None:
    for padding in ((-777.0, 0), (777.0, 99)):  # the best by rank with the worst score, and the other way round
        found = ranking_loss(*tensors(groups, padding)).item()
        assert found == pytest.approx(loss_by_loops(groups), rel=2e-5, abs=2e-6)
        assert ranking_accuracy(*tensors(groups, padding)) == pairs_by_loops(groups)


def test_ranking_loss_by_hand() -> None:
    # K = 4, the two middle ones tie: 5 pairs of C(4,2) = 6 count, all scores equal, so each costs log 2.
    ties = [[(0.0, 1), (0.0, 2), (0.0, 2), (0.0, 3)]]
    assert ranking_loss(*tensors(ties)).item() == pytest.approx(5 / 6 * math.log(2))
    # a second prompt whose completions all tie adds nothing but halves the mean
    both = [*ties, [(3.0, 1), (-3.0, 1)]]
    assert ranking_loss(*tensors(both)).item() == pytest.approx(5 / 12 * math.log(2))
    one = [[(2.0, 2), (-1.0, 1)]]  # the worse one scores 3 more
    assert ranking_loss(*tensors(one)).item() == pytest.approx(3 + math.log1p(math.exp(-3)))


def test_an_equal_score_is_not_a_right_order() -> None:
    assert ranking_accuracy(*tensors([[(1.0, 1), (1.0, 2), (0.0, 3), (2.0, 3)]])) == (2, 5)


@settings(max_examples=40, deadline=None)
@given(batches, st.randoms(use_true_random=False), st.sampled_from([-64.0, -0.5, 8.0]))
def test_order_and_a_common_constant_do_not_matter(groups: list[Group], rng: random.Random, shift: float) -> None:
    shuffled = [rng.sample(group, len(group)) for group in groups]
    loss = ranking_loss(*tensors(groups)).item()
    assert ranking_loss(*tensors(shuffled)).item() == pytest.approx(loss, rel=1e-5, abs=1e-6)
    shifted = [[(score + shift, rank) for score, rank in group] for group in groups]  # 16ths: exact in float32
    assert ranking_loss(*tensors(shifted)).item() == pytest.approx(loss, rel=1e-6, abs=1e-7)
    assert ranking_accuracy(*tensors(shuffled)) == ranking_accuracy(*tensors(groups)) \
        == ranking_accuracy(*tensors(shifted))


def test_gradient_of_the_ranking_loss_by_finite_differences() -> None:
    rng = random.Random(3)
    groups = [[(rng.gauss(0, 2), rng.randrange(1, 4)) for _ in range(size)] for size in (4, 7, 2)]
    scores, ranks, present = tensors(groups)
    scores.requires_grad_()
    ranking_loss(scores, ranks, present).backward()
    assert scores.grad is not None
    for row, group in enumerate(groups):
        for column, (score, rank) in enumerate(group):
            values = []
            for step in (1e-5, -1e-5):
                changed = [list(other) for other in groups]
                changed[row][column] = (score + step, rank)
                values.append(loss_by_loops(changed))
            slope = (values[0] - values[1]) / 2e-5
            assert scores.grad[row, column].item() == pytest.approx(slope, rel=1e-4, abs=1e-6)
    assert scores.grad[~present].abs().max().item() == 0
