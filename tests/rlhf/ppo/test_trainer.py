"""PPO on tiny real models: the first ratio is 1, updates equal a float64 reimplementation, rewards rise."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import rlhf.ppo.sampler
from rlhf.ppo.rollouts import Rollouts
from rlhf.ppo.trainer import Trainer

Make = Callable[..., Trainer]


def disturb(model: Any, size: float, seed: int = 9) -> None:
    """Moves a model away from its copy."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=noise)


def rolled_out(trainer: Trainer, texts: list[str], iteration: int = 0) -> Rollouts:
    return trainer.respond(trainer.models.codec.prompts(texts), iteration)


def plain_log_probs(model: Any, prompt: list[int], response: list[int], temperature: float) -> Tensor:
    """Log-probs of one response: a whole forward pass without padding, batching or cutting. [len(response)]."""
    logits = model(torch.tensor([prompt + response])).logits[0] / temperature
    exponents = logits - logits.max(dim=-1, keepdim=True).values
    table = exponents - exponents.exp().sum(dim=-1, keepdim=True).log()
    return torch.stack([table[len(prompt) - 1 + place, token] for place, token in enumerate(response)])


def plain_values(model: Any, prompt: list[int], response: list[int]) -> Tensor:
    """Value before each response token, from the backbone's and the head's own forward. [len(response)]."""
    hidden = model.base_model(torch.tensor([prompt + response])).last_hidden_state[0]
    return torch.stack([(hidden[len(prompt) - 1 + place] * model.score.weight[0]).sum()
                        for place in range(len(response))])


def test_rollouts_are_what_plain_forward_passes_say(make_trainer: Make, architecture: str,
                                                     prompt_texts: list[str]) -> None:
    trainer = make_trainer(architecture, temperature=0.7, max_new_tokens=12)
    disturb(trainer.models.policy, 0.05)
    rollouts = rolled_out(trainer, prompt_texts)
    entropies = []
    assert trainer.models.reference is not None
    for row, (prompt, response) in enumerate(zip(rollouts.prompts, rollouts.responses, strict=True)):
        assert rollouts.mask[row].sum().item() == len(response)
        length = len(response)
        with torch.no_grad():
            for model, found in ((trainer.models.policy, rollouts.log_probs),
                                 (trainer.models.reference, rollouts.ref_log_probs)):
                expected = plain_log_probs(copy.deepcopy(model).double(), prompt, response, 0.7)
                assert found[row, :length].tolist() == pytest.approx(expected.tolist(), abs=2e-5)
                assert found[row, length:].abs().sum().item() == 0
            value = plain_values(copy.deepcopy(trainer.models.value).double(), prompt, response)
            assert rollouts.values[row, :length].tolist() == pytest.approx(value.tolist(), abs=2e-5)
            logits = copy.deepcopy(trainer.models.policy).double()(torch.tensor([prompt + response])).logits[0] / 0.7
            for place in range(len(prompt) - 1, len(prompt) - 1 + length):
                shares = torch.softmax(logits[place], dim=-1).tolist()
                entropies.append(-sum(share * math.log(share) for share in shares if share > 0))
            end = trainer.models.reward_model.base_model(torch.tensor([prompt + response])).last_hidden_state[0, -1]
            score = (end * trainer.models.reward_model.score.weight[0]).sum().item()
        if response[-1] != trainer.models.codec.eos_id:
            score = min(score, trainer.params.no_eos_score)
        assert rollouts.scores[row].item() == pytest.approx(score, abs=2e-5)
    assert rollouts.entropy == pytest.approx(sum(entropies) / len(entropies), rel=1e-5)
    assert len({len(response) for response in rollouts.responses}) > 1  # some ended early, some did not


def test_a_response_without_eos_never_scores_above_the_fixed_penalty(
        make_trainer: Make, prompt_texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(no_eos_score=-1.0)
    answers = [[5, 6, trainer.models.codec.eos_id], [5, 6, 7], [5, trainer.models.codec.eos_id], [8]]
    good = answers[:2]
    monkeypatch.setattr(rlhf.ppo.sampler, "sample_responses", lambda *given: [answers[row] for row in given[-1]])
    monkeypatch.setattr(rlhf.ppo.rollouts, "score_sequences", lambda model, sequences, *_: [
        3.0 if sequence[-3:] in good else -4.0 for sequence in sequences])
    assert rolled_out(trainer, prompt_texts[:4]).scores.tolist() == [3.0, -1.0, -4.0, -4.0]


def test_the_first_iteration_has_no_kl_and_its_first_ratio_is_one(make_trainer: Make, architecture: str,
                                                                   prompt_texts: list[str]) -> None:
    trainer = make_trainer(architecture, minibatch_size=8, micro_batch_size=3)
    rollouts = rolled_out(trainer, prompt_texts)
    assert (rollouts.log_probs - rollouts.ref_log_probs).abs().max().item() == 0
    again = trainer.models.log_probs(trainer.models.policy, rollouts.prompts, rollouts.responses,
                                        rollouts.mask.shape[1])
    assert (((again - rollouts.log_probs).exp() - 1) * rollouts.mask).abs().max().item() < 1e-5
    values = trainer.learn(rollouts, 0)
    assert values["ppo/kl"] == 0
    assert values["ppo/ratio_first"] == pytest.approx(1, abs=1e-5)
    assert values["ppo/clip_fraction"] == 0
    later = trainer.learn(rolled_out(trainer, prompt_texts, 1), 1)
    assert later["ppo/kl"] != 0
    assert later["ppo/ratio_first"] == pytest.approx(1, abs=1e-5)


def grids(rollouts: Rollouts, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Made-up advantages and returns."""
    noise = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(rollouts.mask.shape, generator=noise) * rollouts.mask for _ in range(2))  # type: ignore[return-value]


@pytest.mark.parametrize("architecture", ["gpt2"])
def test_micro_batches_do_not_change_the_update(make_trainer: Make, architecture: str,
                                                prompt_texts: list[str]) -> None:
    outcomes = []
    for micro in (8, 1, 3):
        trainer = make_trainer(architecture, micro_batch_size=micro, max_new_tokens=24)
        rollouts = rolled_out(trainer, prompt_texts)
        assert len(set(rollouts.mask.sum(dim=1).tolist())) > 2
        disturb(trainer.models.policy, 0.01)
        both = (trainer.models.policy, trainer.models.value)
        before = [item.clone() for model in both for item in model.parameters()]
        journal = trainer.update(rollouts, [6, 0, 3, 5, 1, 2], *grids(rollouts), (0, 0, 0))
        after = [item.detach() for model in both for item in model.parameters()]
        outcomes.append((after, journal))
        assert all((old - new).abs().max() > 1e-5 for old, new in zip(before, after, strict=True) if old.dim() == 2)
    for after, journal in outcomes[1:]:
        assert journal == pytest.approx(outcomes[0][1], abs=1e-5)
        for one, other in zip(outcomes[0][0], after, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 2}, {"gradient_checkpointing": True}, {"minibatch_size": 8}],
                         ids=lambda changes: "".join(changes))
def test_reused_forward_passes_spare_time_and_change_nothing(
        make_trainer: Make, architecture: str, prompt_texts: list[str], changes: dict[str, Any],
        monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = []
    for kept in (0, 1, 9):
        torch.manual_seed(0)  # of adapters
        trainer = make_trainer(architecture, reuse_forward_passes=kept, micro_batch_size=3, inner_epochs=2, **changes)
        passes: list[int] = []
        own = trainer.models.values
        monkeypatch.setattr(trainer.models, "values", lambda prompts, *rest, own=own, passes=passes: (
            passes.append(len(prompts)), own(prompts, *rest))[1])
        journal = []
        for iteration in range(2):
            rollouts = rolled_out(trainer, prompt_texts, iteration)
            assert len(rollouts.reusable.passes) == min(kept, 3 if "minibatch_size" in changes else 2)
            spared = sum(map(len, rollouts.reusable.passes))
            passes.clear()
            journal.append(trainer.learn(rollouts, iteration))
            assert sum(passes) == 2 * 8 - spared
            assert not rollouts.reusable.passes  # and their memory is free
        outcomes.append((journal, [item.detach() for model in (trainer.models.policy, trainer.models.value)
                                   for item in model.parameters()]))
    for journal, weights in outcomes[1:]:
        for one, other in zip(journal, outcomes[0][0], strict=True):
            assert one == pytest.approx(other, rel=1e-4, abs=1e-5)
        for item, other in zip(weights, outcomes[0][1], strict=True):
            torch.testing.assert_close(item, other, rtol=0, atol=2e-6)


def test_one_step_equals_a_float64_reimplementation(make_trainer: Make, architecture: str,
                                                    prompt_texts: list[str]) -> None:
    trainer = make_trainer(architecture, max_grad_norm=0.05, value_clip=0.05, temperature=0.8, micro_batch_size=3,
                           max_new_tokens=24)
    rollouts = rolled_out(trainer, prompt_texts)
    assert len(set(rollouts.mask.sum(dim=1).tolist())) > 2
    disturb(trainer.models.policy, 0.02)
    disturb(trainer.models.value, 0.02)
    advantages, returns = grids(rollouts)
    rows = [7, 2, 4, 0, 3]
    policy, value = copy.deepcopy(trainer.models.policy).double(), copy.deepcopy(trainer.models.value).double()
    losses: list[Tensor] = []
    errors: list[Tensor] = []
    for row in rows:
        prompt, response = rollouts.prompts[row], rollouts.responses[row]
        log_probs, values = plain_log_probs(policy, prompt, response, 0.8), plain_values(value, prompt, response)
        for place in range(len(response)):
            ratio = torch.exp(log_probs[place] - rollouts.log_probs[row, place].double())
            limited = ratio if 0.8 < ratio < 1.2 else ratio.detach().clamp(0.8, 1.2)
            gain = advantages[row, place].double()
            losses.append(-min(ratio * gain, limited * gain, key=lambda item: item.item()))
            old, aim = rollouts.values[row, place].double(), returns[row, place].double()
            near = old + min(max(values[place].item() - old.item(), -0.05), 0.05)
            free = (values[place] - aim) ** 2 / 2
            clipped = (near - aim) ** 2 / 2 if abs(values[place].item() - old.item()) > 0.05 else free
            errors.append(max(free, clipped, key=lambda item: item.item()))
    loss, error = torch.stack(losses).mean(), torch.stack(errors).mean()
    (loss + error).backward()  # of two models
    journal = trainer.update(rollouts, rows, advantages, returns, (0, 0, 0))
    assert journal["policy_loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert journal["value_loss"] == pytest.approx(error.item(), abs=1e-5)
    for exact, found in ((policy, trainer.models.policy), (value, trainer.models.value)):
        gradients = {name: item.grad for name, item in exact.named_parameters() if item.grad is not None}
        norm = math.sqrt(sum((gradient**2).sum().item() for gradient in gradients.values()))
        if exact is policy:
            assert journal["grad_norm"] == pytest.approx(norm, rel=1e-4)
        assert norm > 0.05  # clipped
        stepped = dict(found.named_parameters())
        for name, item in exact.named_parameters():
            if name in gradients:  # Adam's first step: the gradient over its own size
                gradient = gradients[name] * 0.05 / (norm + 1e-6)
                item.data -= 1e-3 * gradient / (gradient.abs() + 1e-5)
            torch.testing.assert_close(stepped[name].double(), item, rtol=0, atol=5e-6)


def test_ptx_adds_its_gradient(make_trainer: Make, prompt_texts: list[str]) -> None:
    corpus = torch.randint(5, 300, (6, 16), generator=torch.Generator().manual_seed(8)).tolist()
    trainer = make_trainer(ptx_coef=2.5, ptx_batch_size=6)
    assert trainer.add_ptx((0, 0, 0)) == 0  # no corpus was given
    trainer.corpus_rows = corpus
    loss = trainer.add_ptx((0, 0, 0))
    exact = copy.deepcopy(trainer.models.policy).double()
    exact.zero_grad()
    expected = -torch.cat([plain_log_probs(exact, row[:1], row[1:], 1.0) for row in corpus]).mean()
    (2.5 * expected).backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for one, other in zip(trainer.models.policy.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-4, atol=1e-6)
    trainer.optimizer.zero_grad()
    rollouts = rolled_out(trainer, prompt_texts)
    zero = torch.zeros_like(rollouts.mask)  # no advantage anywhere: only the pretraining text moves the policy
    before = trainer.models.policy.get_input_embeddings().weight.clone()
    assert trainer.update(rollouts, [0, 1], zero, zero, (0, 0, 0))["ptx_loss"] == pytest.approx(loss, rel=1e-5)
    assert (trainer.models.policy.get_input_embeddings().weight - before).abs().max() > 1e-4
    still = make_trainer()
    still.update(rollouts, [0, 1], zero, zero, (0, 0, 0))
    assert (still.models.policy.get_input_embeddings().weight - before).abs().max() == 0


@pytest.mark.parametrize(("scale", "factor"), [(30.0, 2.0), (0.0, 0.5)])
def test_beta_adapts_to_the_kl(make_trainer: Make, prompt_texts: list[str], scale: float, factor: float) -> None:
    trainer = make_trainer(kl_goal=2.0, beta=0.1, beta_min=1e-6, beta_max=1e6, beta_interval=1, inner_epochs=1)
    rollouts = rolled_out(trainer, prompt_texts)
    rollouts.ref_log_probs = rollouts.log_probs - scale / rollouts.mask.sum(dim=1, keepdim=True) * rollouts.mask
    used = [trainer.learn(rollouts, iteration) for iteration in range(6)]
    assert [item["ppo/kl"] for item in used] == pytest.approx([scale] * 6, abs=1e-4)
    assert [item["ppo/beta"] for item in used][3:] == pytest.approx([0.1 * factor**power for power in (1, 2, 3)])
    for item in used:  # the penalty of the same iteration uses that β
        assert item["ppo/reward"] == pytest.approx(item["ppo/rm_score"] - item["ppo/beta"] * scale, abs=1e-3)


def test_the_learning_rate_warms_up(make_trainer: Make, prompt_texts: list[str]) -> None:
    trainer = make_trainer(warmup_iterations=4, lr=1e-3)
    rollouts = rolled_out(trainer, prompt_texts)
    rates = [trainer.learn(rollouts, iteration)["ppo/lr"] for iteration in range(7)]
    assert rates == pytest.approx([1e-4, 3.25e-4, 5.5e-4, 7.75e-4, 1e-3, 1e-3, 1e-3])
    assert trainer.optimizer.param_groups[0]["lr"] == 1e-3


def test_the_policy_learns_what_is_rewarded(make_trainer: Make, prompt_texts: list[str],
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(batch_size=32, minibatch_size=16, micro_batch_size=16, inner_epochs=2, lr=3e-3,
                           value_lr=3e-3, beta=0.02, beta_min=0.01, kl_goal=20.0, no_eos_score=100.0, max_new_tokens=6)
    prompts = trainer.models.codec.prompts(prompt_texts[:4]) * 8

    def share(model: Any, sequences: list[list[int]], *_: Any) -> list[float]:
        """How much of the response comes from a quarter of the vocabulary."""
        begins = [next(prompt for prompt in prompts if sequence[:len(prompt)] == prompt) for sequence in sequences]
        return [sum(token % 4 == 0 for token in sequence[len(prompt):]) / 6
                for prompt, sequence in zip(begins, sequences, strict=True)]

    monkeypatch.setattr(rlhf.ppo.rollouts, "score_sequences", share)
    scores = [trainer.step(prompts, iteration)[1]["ppo/rm_score"]
              for iteration in range(20)]
    assert sum(scores[:2]) / 2 < 0.3
    assert sum(scores[-2:]) / 2 > 0.5

def test_the_value_model_alone_is_trained_while_it_explains_nothing(make_trainer: Make,
                                                                    prompt_texts: list[str]) -> None:
    trainer = make_trainer(value_warmup_iterations=2, value_lr=1e-3, lr=1e-3, warmup_iterations=0, inner_epochs=2,
                           ema_decay=0.5, ptx_coef=1.0, ptx_batch_size=2)
    trainer.corpus_rows = torch.randint(5, 300, (6, 16), generator=torch.Generator().manual_seed(8)).tolist()
    rollouts = rolled_out(trainer, prompt_texts)
    rollouts.scores = rollouts.scores + 50.0  # far from any value: explained variance below zero
    policy, value = (copy.deepcopy(model.state_dict()) for model in (trainer.models.policy, trainer.models.value))
    for iteration in range(2):
        journal = trainer.learn(rollouts, iteration)
        assert journal["ppo/explained_variance"] < 0
        assert (journal["ppo/lr"], journal["ppo/grad_norm"], journal["ppo/ptx_loss"]) == (0, 0, 0)
        assert journal["ppo/ratio_first"] == 1
        assert journal["ppo/beta"] == trainer.params.beta  # the rule has nothing to read yet
    for name, weight in trainer.models.policy.state_dict().items():
        assert torch.equal(weight, policy[name])
    assert any(not torch.equal(weight, value[name]) for name, weight in trainer.models.value.state_dict().items())
    assert trainer.learn(rollouts, 2)["ppo/lr"] == 1e-3  # at most so many iterations
    assert any(not torch.equal(weight, policy[name]) for name, weight in trainer.models.policy.state_dict().items())


def test_a_value_model_that_explains_something_needs_no_warm_up(make_trainer: Make, prompt_texts: list[str]) -> None:
    trainer, plain = (make_trainer(value_warmup_iterations=count) for count in (5, 0))
    rollouts = rolled_out(trainer, prompt_texts)
    targets = trainer.targets(rollouts, 0.0)
    rollouts.values = 0.9 * targets.returns  # as a trained one would give; with lam = 1 the returns do not depend on it
    assert trainer.targets(rollouts, 0.0).explained_variance > 0
    assert trainer.learn(rollouts, 0) == plain.learn(rollouts, 0)
