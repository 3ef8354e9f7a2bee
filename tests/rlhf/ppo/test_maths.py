"""The maths of PPO against explicit float64 loops: rewards, whitening, GAE, the clipped losses, alignment."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import tensor

from rlhf.model.load import load_policy
from rlhf.model.responses import masked_mean, on_grid, pack_responses, response_mask
from rlhf.params import PpoParams
from rlhf.ppo.run import iteration_prompts
from rlhf.ppo.trainer import advantages_and_returns, policy_loss, token_rewards, value_loss, whiten

Array = np.ndarray


def random_case(seed: int, rows: int = 6, width: int = 9) -> tuple[np.random.Generator, Array, list[int]]:
    """(generator, mask, lengths): responses of 1 .. width tokens, as a rollout has them."""
    random_numbers = np.random.default_rng(seed)
    lengths = [1, width, *random_numbers.integers(1, width + 1, rows - 2).tolist()]
    return random_numbers, np.array([[float(place < length) for place in range(width)] for length in lengths]), lengths


def test_token_rewards() -> None:
    random_numbers, mask, lengths = random_case(1)
    ours, reference = random_numbers.normal(-2, 1, (2, *mask.shape))
    scores = random_numbers.normal(0, 3, len(lengths))
    found = token_rewards(tensor(scores), tensor(ours), tensor(reference), tensor(mask), 0.3)
    for row, length in enumerate(lengths):
        for place in range(mask.shape[1]):
            expected = -0.3 * (ours[row, place] - reference[row, place]) if place < length else 0.0
            if place == length - 1:
                expected += scores[row]
            assert found[row, place].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten_uses_the_biased_variance(shift_mean: bool) -> None:
    random_numbers, mask, _ = random_case(2)
    values = random_numbers.normal(5, 3, mask.shape)
    inside = [values[row, place] for row, place in zip(*np.nonzero(mask), strict=True)]
    mean = sum(inside) / len(inside)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in inside) / len(inside))
    found = whiten(tensor(values), tensor(mask), shift_mean)
    expected = ((values - mean) / deviation + (0 if shift_mean else mean)) * mask
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-7)
    assert masked_mean(found, tensor(mask)).item() == pytest.approx(0 if shift_mean else mean, abs=1e-7)


def test_whiten_of_a_constant_is_finite() -> None:
    assert whiten(torch.full((2, 3), 4.0), torch.ones(2, 3)).abs().max().item() == 0


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (0.97, 0.0), (1.0, 1.0)])
@pytest.mark.parametrize("seed", [3, 4])
def test_advantages_are_the_sum_of_discounted_deltas(gamma: float, lam: float, seed: int) -> None:
    random_numbers, mask, lengths = random_case(seed)
    rewards, values = random_numbers.normal(0, 1, (2, *mask.shape)) * mask
    found, returns = advantages_and_returns(tensor(rewards), tensor(values), tensor(mask), gamma, lam)
    for row, length in enumerate(lengths):
        deltas = [rewards[row, place] + (gamma * values[row, place + 1] if place + 1 < length else 0.0)
                  - values[row, place] for place in range(length)]
        for place in range(mask.shape[1]):
            expected = sum((gamma * lam) ** ahead * delta for ahead, delta in enumerate(deltas[place:]))
            assert found[row, place].item() == pytest.approx(expected, abs=1e-12)
            value = values[row, place] if place < length else 0.0
            assert returns[row, place].item() == pytest.approx(expected + value, abs=1e-12)


def test_padding_cannot_leak_into_advantages() -> None:
    random_numbers, mask, _ = random_case(5)
    rewards, values = random_numbers.normal(0, 1, (2, *mask.shape)) * mask
    junk = (1 - mask) * 1e6
    clean = advantages_and_returns(tensor(rewards), tensor(values), tensor(mask), 0.9, 0.9)
    dirty = advantages_and_returns(tensor(rewards + junk), tensor(values + junk), tensor(mask), 0.9, 0.9)
    for one, other in zip(clean, dirty, strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy() * mask)


def test_return_with_lambda_one_is_the_discounted_reward() -> None:
    rewards = tensor([[1.0, -2.0, 4.0]], dtype=torch.float64)
    values = tensor([[0.3, 9.0, -5.0]], dtype=torch.float64)
    _, returns = advantages_and_returns(rewards, values, torch.ones_like(rewards), 0.5, 1.0)
    assert returns.tolist()[0] == pytest.approx([1 - 1 + 1, -2 + 2, 4])


def test_policy_loss_by_loops() -> None:
    random_numbers, mask, _ = random_case(6)
    new, old = random_numbers.normal(-2, 0.3, (2, *mask.shape))
    advantages = random_numbers.normal(0, 2, mask.shape)
    losses, ratios = policy_loss(tensor(new), tensor(old), tensor(advantages), 0.2)
    clipped = 0
    for place in np.ndindex(*mask.shape):
        ratio, advantage = math.exp(new[place] - old[place]), advantages[place]
        limited = min(max(ratio, 0.8), 1.2)
        assert ratios[place].item() == pytest.approx(ratio)
        assert losses[place].item() == pytest.approx(-min(ratio * advantage, limited * advantage))
        clipped += int(limited * advantage < ratio * advantage)
    assert clipped > 5


def test_policy_gradient_is_zero_where_clipped_for_good() -> None:
    # ratio 2 with a positive advantage and ratio 1/2 with a negative one are clipped; the other two pull back
    new = torch.log(tensor([2.0, 2.0, 0.5, 0.5])).requires_grad_()
    losses, _ = policy_loss(new, torch.zeros(4), tensor([1.0, -1.0, 1.0, -1.0]), 0.2)
    losses.sum().backward()
    assert new.grad is not None
    assert new.grad.tolist() == pytest.approx([0.0, 2.0, -0.5, 0.0])


def test_value_loss_by_loops() -> None:
    random_numbers, mask, _ = random_case(7)
    values, old, returns = random_numbers.normal(0, 1, (3, *mask.shape))
    losses = value_loss(tensor(values), tensor(old), tensor(returns), 0.2)
    for place in np.ndindex(mask.shape):
        limited = old[place] + min(max(values[place] - old[place], -0.2), 0.2)
        expected = 0.5 * max((values[place] - returns[place]) ** 2, (limited - returns[place]) ** 2)
        assert losses[place].item() == pytest.approx(expected)


def test_places_before_responses_by_hand(policy_folder: Path) -> None:
    # Rows of 8 tokens: a prompt of 3 and a response of 3, a prompt of 1 and a response of 1, of 4 and 2.
    prompts, responses = [[11, 12, 13], [21], [31, 32, 33, 34]], [[5, 6, 7], [5], [5, 6]]
    model = load_policy(policy_folder)
    model.set_attn_implementation("eager")
    texts, places = pack_responses(model, prompts, responses, 0)
    assert places.tolist() == [2, 3, 4, 8, 19, 20]
    mask = response_mask(responses, 3)
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert on_grid(places.float(), mask).tolist() == [[2, 3, 4], [8, 0, 0], [19, 20, 0]]
    texts, places = pack_responses(load_policy(policy_folder), prompts, responses, 0)
    assert texts.ids.flatten()[places].tolist() == [13, 5, 6, 21, 34, 5]


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 40), prompts=st.integers(1, 12), samples=st.integers(1, 3), seed=st.integers(0, 99))
def test_every_prompt_comes_once_per_pass(count: int, prompts: int, samples: int, seed: int) -> None:
    params = PpoParams(batch_size=prompts * samples, samples_per_prompt=samples)
    stream: list[int] = []
    for iteration in range(-(-3 * count // prompts)):
        drawn = iteration_prompts(count, params, iteration, seed)
        assert len(drawn) == params.batch_size
        for place in range(0, len(drawn), samples):
            assert len(set(drawn[place:place + samples])) == 1
        stream += drawn[::samples]
    for start in range(0, 3 * count, count):
        assert sorted(stream[start:start + count]) == list(range(count))


def test_passes_and_seeds_have_their_own_order(ppo_params: Callable[..., PpoParams]) -> None:
    orders = [tuple(iteration_prompts(50, ppo_params(batch_size=50), iteration, seed))
              for iteration in (0, 1) for seed in (1, 2)]
    assert len(set(orders)) == 4
    assert orders[0] == tuple(iteration_prompts(50, ppo_params(batch_size=50), 0, 1))
