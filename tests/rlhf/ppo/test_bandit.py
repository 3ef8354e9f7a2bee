"""A problem with a known answer: the policy that maximises E[r] - β·KL is π* ∝ π_ref·exp(r/β), and PPO must find it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import rlhf.ppo.rollouts
from rlhf.ppo.trainer import Trainer


def next_token(model: Any, prompt: list[int]) -> Tensor:
    """The distribution of the first response token, float64."""
    with torch.no_grad():
        return torch.softmax(model(torch.tensor([prompt])).logits[0, -1].double(), dim=-1)


@pytest.mark.parametrize(("beta", "bound", "iterations"), [
    (1.0, 0.05, 90), pytest.param(0.3, 0.06, 200, marks=pytest.mark.slow)])
def test_ppo_reaches_the_known_optimum(make_trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch,
                                       beta: float, bound: float, iterations: int) -> None:
    """One prompt, one token, a reward a token, β fixed. Stated error: total variation distance to π* below `bound`,
    from a start beyond 0.35; mean reward within 0.06 of that of π*, KL within 0.2 nats."""
    trainer = make_trainer("gpt2", beta_rule="fixed", beta=beta, max_new_tokens=1, no_eos_score=1e6, batch_size=256,
                           minibatch_size=256, micro_batch_size=256, inner_epochs=4, lr=1e-3, value_lr=3e-3,
                           value_clip=100.0, whiten_advantages=False)
    rewards = torch.randn(len(trainer.models.tokenizer), generator=torch.Generator().manual_seed(4)).double()
    monkeypatch.setattr(rlhf.ppo.rollouts, "score_sequences",
                        lambda model, sequences, *rest: [float(rewards[item[-1]]) for item in sequences])
    prompt = trainer.models.codec.prompts(["what color is the ba-do?"])[0]
    assert trainer.models.reference is not None
    reference = next_token(trainer.models.reference, prompt)
    best = reference * (rewards / beta).exp()
    best /= best.sum()
    assert (best - reference).abs().sum() / 2 > 0.35
    for iteration in range(iterations):
        if iteration in (iterations // 2, iterations * 3 // 4):  # a constant rate never comes to rest
            for optimizer in (trainer.optimizer, trainer.value_optimizer):
                optimizer.defaults["lr"] /= 4
        trainer.step([prompt] * 256, iteration)[1]
    found = next_token(trainer.models.policy, prompt)
    assert (found - best).abs().sum().item() / 2 < bound
    assert abs(((found - best) * rewards).sum().item()) < 0.06
    assert abs((found * (found / reference).log() - best * (best / reference).log()).sum().item()) < 0.2
