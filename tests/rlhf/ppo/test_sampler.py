"""Responses drawn one iteration ahead, and the correction of what lies between: against float64 and by hand."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.model.responses import masked_mean
from rlhf.model.sampling import sample_responses
from rlhf.ppo.run import run_iterations
from rlhf.ppo.sampler import correction
from rlhf.ppo.trainer import Trainer, policy_loss
from rlhf.training.checkpoint import Checkpoints
from rlhf.training.journal import read_journal
from rlhf.training.seeding import generator
from tests.rlhf.engines.fake_engine import FakeEngine, serving

Make = Callable[..., Trainer]


def test_the_correction_is_the_ratio_cut_at_its_largest() -> None:
    noise = torch.Generator().manual_seed(1)
    ours, theirs = (-3 * torch.rand((4, 6), generator=noise, dtype=torch.float64) for _ in range(2))
    expected = [[min(2.0, p / q) for p, q in zip(one, other, strict=True)]
                for one, other in zip(ours.exp().tolist(), theirs.exp().tolist(), strict=True)]
    torch.testing.assert_close(correction(ours, theirs, 2.0), torch.tensor(expected, dtype=torch.float64))
    assert correction(ours, theirs, 2.0).max() == 2.0  # some are cut
    assert torch.equal(correction(ours, theirs, 0.0), torch.ones_like(ours))


def test_each_token_s_loss_is_multiplied_by_its_weight(make_trainer: Make, prompt_texts: list[str],
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient too: that of the loss written out in float64."""
    trainer = make_trainer("llama", minibatch_size=8)
    prompts = trainer.models.codec.prompts(prompt_texts)
    rollouts = trainer.respond(prompts, 0)
    mask = rollouts.mask
    noise = torch.Generator().manual_seed(2)
    advantages = torch.randn(mask.shape, generator=noise) * mask
    rollouts.token_weights = 2 * torch.rand(mask.shape, generator=noise)
    monkeypatch.setattr(trainer, "take_optimizer_step", lambda rollouts, sums, iteration, train_policy: sums)
    trainer.models.train_mode(True)
    sums = trainer.update(rollouts, list(range(8)), advantages, rollouts.values, (0, 1, 1))
    got = {name: value.grad.clone() for name, value in trainer.models.policy.named_parameters()
           if value.grad is not None}
    weighted = (-advantages * rollouts.token_weights * mask).double()
    assert sums["policy_loss"] == pytest.approx((weighted.sum() / mask.sum()).item(), rel=1e-5)  # the ratio is 1
    trainer.models.policy.zero_grad()
    policy = trainer.models.policy.double()
    log_probs = trainer.models.log_probs(policy, prompts, rollouts.responses, mask.shape[1])
    losses, _ = policy_loss(log_probs, rollouts.log_probs.double(), advantages.double(), trainer.params.clip)
    (losses * rollouts.token_weights.double() * mask).sum().div(mask.sum()).backward()
    for name, value in policy.named_parameters():
        if name in got:
            torch.testing.assert_close(got[name].double(), value.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_with_staleness_responses_are_those_of_the_policy_before(make_trainer: Make, architecture: str,
                                                                 prompt_texts: list[str]) -> None:
    trainer = make_trainer(architecture, staleness=1, lr=3e-2, rollout_correction=2.0)
    prompts = trainer.models.codec.prompts(prompt_texts)
    later = prompts[::-1]
    policy = trainer.models.policy
    previous: dict[str, torch.Tensor] = {}
    for iteration, (own, following) in enumerate([(prompts, later), (later, prompts), (prompts, [])]):
        now = {name: value.clone() for name, value in policy.state_dict().items()}
        policy.load_state_dict(previous or now)
        expected = sample_responses(policy, own, trainer.sampler.sampling, generator(5, "ppo", iteration))
        with torch.no_grad():
            drawn_with = trainer.models.log_probs(policy, own, expected, max(map(len, expected)))
        policy.load_state_dict(now)
        rollouts, values = trainer.step(own, iteration, following)
        assert rollouts.responses == expected
        assert values["ppo/ratio_first"] == pytest.approx(1, abs=1e-5)
        gap = masked_mean((rollouts.log_probs - drawn_with).abs(), rollouts.mask).item()
        assert values["ppo/sampler_gap"] == pytest.approx(gap, rel=1e-4, abs=1e-5)
        assert (gap > 1e-3) == (iteration > 0)
        ratio = ((rollouts.log_probs - drawn_with) * rollouts.mask).exp().clamp(max=2.0)
        torch.testing.assert_close(rollouts.token_weights * rollouts.mask, ratio * rollouts.mask, rtol=1e-4, atol=1e-5)
        previous = now


def run(make: Make, folder: Path, prompt_texts: list[str], stop_after: int = 99, **changes: Any) -> list[Any]:
    """The journal of five iterations, which are stopped in the middle of one of them."""
    trainer = make("llama", lr=1e-2, **changes)
    encoded = list(zip(prompt_texts, trainer.models.codec.prompts(prompt_texts), strict=True))
    learn = trainer.learn

    def learning(rollouts: Any, iteration: int) -> dict[str, float]:
        if iteration == stop_after:
            raise KeyboardInterrupt
        return learn(rollouts, iteration)

    trainer.learn = learning  # type: ignore[method-assign]
    run_iterations(trainer, encoded, 5, folder, None)
    return read_journal(folder / "journal.csv")


def test_a_run_with_staleness_resumes_with_the_same_bytes(make_trainer: Make, prompt_texts: list[str], tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSTRUCTFLOW_CHECKPOINT_SECONDS", "0")
    changes: dict[str, Any] = {"staleness": 1, "rollout_correction": 2.0}
    whole = run(make_trainer, tmp_path / "whole", prompt_texts, **changes)
    for stop in (1, 3):
        with pytest.raises(KeyboardInterrupt):
            run(make_trainer, tmp_path / "broken", prompt_texts, stop, **changes)
        with Checkpoints(tmp_path / "broken" / "checkpoints") as checkpoints:
            saved = checkpoints.latest()
            assert saved is not None
            assert len(saved.values["ahead"]["responses"]) == 8
    run(make_trainer, tmp_path / "broken", prompt_texts, **changes)
    assert (tmp_path / "broken" / "journal.csv").read_bytes() == (tmp_path / "whole" / "journal.csv").read_bytes()
    assert len(whole) == 5
    other = run(make_trainer, tmp_path / "other", prompt_texts)
    assert [row["ppo/kl"] for row in other] != [row["ppo/kl"] for row in whole]
    assert "ppo/sampler_gap" not in other[0]


# --- engines ---------------------------------------------------------------------------------------------------------

def test_engines_draw_while_the_policy_is_trained(make_trainer: Make, prompt_texts: list[str],
                                                  model_folders: dict[str, tuple[Path, Path]],
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """They answer only when the training has begun: drawn before it, this would wait for ever."""
    with serving(model_folders["llama"][0]) as engine:
        trainer = make_trainer("llama", staleness=1, vllm_url=engine.url, lr=1e-3)
        prompts = trainer.models.codec.prompts(prompt_texts)
        trainer.sampler.ahead = trainer.sampler.begin(prompts, 0)()
        training = threading.Event()
        act, learn = FakeEngine.act, trainer.learn

        def acting(self: FakeEngine, path: str, body: dict[str, Any]) -> Any:
            if path == "/v1/completions":
                assert training.wait(60)
            return act(self, path, body)

        def learning(rollouts: Any, iteration: int) -> dict[str, float]:
            training.set()
            return learn(rollouts, iteration)

        monkeypatch.setattr(FakeEngine, "act", acting)
        trainer.learn = learning  # type: ignore[method-assign]
        for iteration in range(3):
            _, values = trainer.step(prompts, iteration, prompts)
            assert trainer.sampler.ahead is not None
            assert (values["ppo/sampler_gap"] < 1e-4) == (iteration == 0)
            training.clear()


def test_an_engine_that_dies_meanwhile_costs_nothing(make_trainer: Make, prompt_texts: list[str],
                                                     model_folders: dict[str, tuple[Path, Path]],
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """Where none is left, the next iteration draws its own responses, and waits for an engine."""
    monkeypatch.setenv("INSTRUCTFLOW_ENGINE_SECONDS", "1")
    with serving(model_folders["llama"][0]) as engine:
        trainer = make_trainer("llama", staleness=1, vllm_url=engine.url)
        prompts = trainer.models.codec.prompts(prompt_texts)
        trainer.sampler.ahead = trainer.sampler.begin(prompts, 0)()
        engine.dies_after = len(prompts) + 3
        trainer.step(prompts, 0, prompts)
        assert trainer.sampler.ahead is None
        engine.restart()
        trainer.step(prompts, 1, prompts)
        assert trainer.sampler.ahead is not None
