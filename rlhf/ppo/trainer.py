"""PPO with a KL penalty to the SFT policy: the maths of the stage, top to bottom, then one iteration of it.

Schulman et al. 2017 (PPO), Ziegler et al. 2019, InstructGPT §3.5 and App. C.4. `Trainer.step` is one iteration: sample
responses, score them, read the KL, adapt β, turn score and KL into per-token rewards, estimate advantages, then a few
epochs of minibatch updates of the policy and of a separate value model. Dropout is off throughout.

Beside it: models.py loads the four models, sampler.py samples, rollouts.py evaluates, kl_controller.py has the β rules,
run.py is the loop around `step`. Several processes: rlhf/training/distributed.py.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.errors import TrainingFailed
from rlhf.model.device import device
from rlhf.model.responses import masked_mean, response_kl, response_kl_k3
from rlhf.params import PpoParams
from rlhf.ppo.kl_controller import beta_rule
from rlhf.ppo.models import PpoModels
from rlhf.ppo.rollouts import Rollouts, collect_rollouts, share_of_unsampled
from rlhf.ppo.sampler import Drawn, Sampler
from rlhf.pretrain import corpus_batch, corpus_losses
from rlhf.training import distributed
from rlhf.training.micro_batches import micro_batches
from rlhf.training.optim import adamw, scale_lr
from rlhf.training.parts import Saved
from rlhf.training.seeding import generator, restore_rng, rng_state
from rlhf.training.state import State, weights

PTX_ROWS_PER_EPISODE = 8  # [InstructGPT App. C.4]

# --- the maths -----------------------------------------------------------------------------------------------

def token_rewards(scores: Tensor, log_probs: Tensor, ref_log_probs: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Reward of each token: -β(log π - log π_ref), plus the score at the response's last token.

    scores [B]; log_probs, ref_log_probs, mask [B, T] -> [B, T]. [Ziegler §2.1, InstructGPT eq. 2]
    """
    rewards = -beta * (log_probs - ref_log_probs) * mask
    last = mask.sum(dim=1).long() - 1
    rewards[torch.arange(len(rewards), device=rewards.device), last] += scores
    return rewards


def whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Scales to variance 1 (biased variance), and to mean 0 unless `shift_mean` is off. [N implementation details]"""
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean) ** 2, mask)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    return (whitened if shift_mean else whitened + mean) * mask


def advantages_and_returns(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float,
                           lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation [Schulman et al. 2016] and returns = advantages + values.

    rewards, values, mask [B, T] -> two [B, T]. The value after a response's last token is 0.
    """
    advantages = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0])
    following = torch.zeros_like(running)
    for step in reversed(range(rewards.shape[1])):
        delta = rewards[:, step] + gamma * following - values[:, step]
        running = (delta + gamma * lam * running) * mask[:, step]
        following = values[:, step] * mask[:, step]
        advantages[:, step] = running
    return advantages, (advantages + values) * mask


def policy_loss(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Clipped surrogate per token [PPO eq. 7] and the ratio: [B, T] each."""
    ratio = (log_probs - old_log_probs).exp()
    return torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)), ratio


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Half the squared error per token, the larger of the plain and the clipped one [Ziegler's code]: [B, T]."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2)


@dataclass(frozen=True)
class Targets:
    """What an iteration's updates aim at: advantages and returns [B, T]; beside them the mean reward of an episode and
    the share of the returns' variance that the value model explains."""

    advantages: Tensor
    returns: Tensor
    episode_reward: float
    explained_variance: float


# --- one iteration -------------------------------------------------------------------------------------------

class Trainer:
    """PPO's models, optimizers and β. `begin_with`: the policy to start from where it is not the SFT policy."""

    def __init__(self, params: PpoParams, sft_folder: Path, rm_folder: Path, seed: int,
                 begin_with: Path | None = None) -> None:
        self.params, self.seed = params, seed
        self.models = PpoModels(params, sft_folder, rm_folder, seed, begin_with)
        for name in ("batch_size", "minibatch_size"):
            distributed.check_divides(getattr(params, name), f"ppo.{name}")
        distributed.check_divides(params.batch_size % params.minibatch_size, "ppo.batch_size modulo ppo.minibatch_size")
        self.optimizer = adamw(self.models.policy, params.lr, betas=(0.9, 0.95), eps=params.adam_eps)
        self.value_optimizer = adamw(self.models.value, params.value_lr, betas=(0.9, 0.95), eps=params.adam_eps)
        self.trained = (("policy", self.models.policy, self.optimizer),
                        ("value", self.models.value, self.value_optimizer))
        self.average = {name: value.detach().clone() for name, value in self.models.policy.named_parameters()
                        if value.requires_grad} if params.ema_decay else {}
        self.beta = beta_rule(params)
        self.sampler = Sampler(self.models, params, seed)
        self.corpus_rows: Sequence[list[int]] | None = None  # pretraining text for ptx

    def step(self, prompts: list[list[int]], iteration: int, following: list[list[int]] | None = None
             ) -> tuple[Rollouts, dict[str, float]]:
        """One iteration: rollouts of the prompts, then what is learned from them. Returns both, the latter as the
        journal's values. `following`: the next iteration's prompts, where their responses are drawn meanwhile."""
        rollouts = self.respond(prompts, iteration, self.sampler.turn(prompts, iteration, following))
        values = self.learn(rollouts, iteration)
        self.sampler.end_turn()
        return rollouts, values

    def respond(self, prompts: list[list[int]], iteration: int, drawn: Drawn | None = None) -> Rollouts:
        """One response per prompt, evaluated by policy, reference, value and reward model."""
        return collect_rollouts(self.models, self.params, prompts, self.order(iteration, 0, len(prompts)),
                                self.sampler, iteration, drawn)

    def learn(self, rollouts: Rollouts, iteration: int) -> dict[str, float]:
        """β from the KL, rewards, advantages, updates. Returns the journal's values."""
        params, mask = self.params, rollouts.mask
        self.models.train_mode(True)
        kl = response_kl(rollouts.log_probs, rollouts.ref_log_probs, mask).mean().item()
        targets = self.targets(rollouts, self.beta.beta)
        train_policy = targets.explained_variance >= 0 or iteration >= params.value_warmup_iterations
        if train_policy:
            targets = self.targets(rollouts, self.beta.update(kl))
        beta = self.beta.beta
        lr_factor = min(1.0, 0.1 + 0.9 * iteration / params.warmup_iterations) if params.warmup_iterations else 1.0
        scale_lr(self.optimizer, lr_factor)
        updates: list[dict[str, float]] = []
        for epoch in range(params.inner_epochs):
            order = self.order(iteration, epoch, len(rollouts.prompts))
            for start in range(0, len(order), params.minibatch_size):
                updates.append(self.update(rollouts, order[start:start + params.minibatch_size], targets.advantages,
                                           targets.returns, (iteration, epoch, len(updates)), train_policy))
        means = {name: sum(update[name] for update in updates) / len(updates) for name in updates[0]}
        lengths, stops = mask.sum(dim=1), self.models.codec.stop_ids
        return {
            "ppo/kl": kl,
            "ppo/kl_k3": response_kl_k3(rollouts.log_probs, rollouts.ref_log_probs, mask).mean().item(),
            "ppo/kl_goal": params.kl_goal, "ppo/kl_smoothed": self.beta.smoothed, "ppo/beta": beta,
            "ppo/reward": targets.episode_reward, "ppo/rm_score": rollouts.scores.mean().item(),
            "ppo/entropy": rollouts.entropy, "ppo/clip_fraction": means["clipped"],
            "ppo/value_loss": means["value_loss"], "ppo/policy_loss": means["policy_loss"],
            "ppo/ptx_loss": means["ptx_loss"], "ppo/explained_variance": targets.explained_variance,
            "ppo/grad_norm": means["grad_norm"], "ppo/response_length": lengths.mean().item(),
            "ppo/eos_rate": sum(response[-1] in stops for response in rollouts.responses) / len(lengths),
            "ppo/ratio_first": updates[0]["ratio"], "ppo/lr": params.lr * lr_factor * train_policy,
        } | ({} if rollouts.sampler_gap is None else {"ppo/sampler_gap": rollouts.sampler_gap})

    def targets(self, rollouts: Rollouts, beta: float) -> Targets:
        """What the updates aim at, from an iteration's rollouts and its β."""
        params, mask = self.params, rollouts.mask
        rewards = token_rewards(rollouts.scores, rollouts.log_probs, rollouts.ref_log_probs, mask, beta)
        episode_reward = rewards.sum(dim=1).mean().item()
        if params.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False)
        advantages, returns = advantages_and_returns(rewards, rollouts.values, mask, params.gamma, params.lam)
        residual = masked_mean((returns - rollouts.values) ** 2, mask)
        variance = masked_mean((returns - masked_mean(returns, mask)) ** 2, mask)
        if params.whiten_advantages:
            advantages = whiten(advantages, mask)
        return Targets(advantages, returns, episode_reward, (1 - residual / (variance + 1e-8)).item())

    def order(self, iteration: int, epoch: int, count: int) -> list[int]:
        """The rollouts in the order in which an epoch's minibatches take them."""
        order: list[int] = torch.randperm(count, generator=generator(self.seed, "minibatch", iteration, epoch)).tolist()
        return order

    def update(self, rollouts: Rollouts, rows: list[int], advantages: Tensor, returns: Tensor,
               place: tuple[int, int, int], train_policy: bool = True) -> dict[str, float]:
        """One optimizer step of policy and value model (or of the latter alone) on a minibatch, accumulated over
        micro-batches and processes.

        Sums are divided by the minibatch's token count, so the update is the same for any micro-batch size and any
        number of processes, up to rounding. `place`: iteration, epoch, number of the update in the iteration.
        """
        params, models = self.params, self.models
        tokens = rollouts.mask[rows].sum()
        lengths = [len(one) + len(other) for one, other in zip(rollouts.prompts, rollouts.responses, strict=True)]
        # The first update's rows are shared out as they were for sampling, so that each process finds the forward
        # passes that it may reuse; later ones by length, so that all processes have about as many tokens.
        mine = (share_of_unsampled(rollouts.prompts, rows) if place[1:] == (0, 0) else
                distributed.share(sorted(rows, key=lambda row: lengths[row])))
        sums: dict[str, Any] = {name: torch.zeros((), dtype=torch.float64, device=device())
                                for name in ("policy_loss", "value_loss", "clipped", "ratio")}
        for picked, counts in micro_batches(models.policy, [lengths[row] for row in mine], params.micro_batch_size,
                                            params.micro_batch_tokens):
            batch = [mine[index] for index in picked]
            prompts, responses = [rollouts.prompts[row] for row in batch], [rollouts.responses[row] for row in batch]
            width = max(map(len, responses))
            mask, old = rollouts.mask[batch, :width] * counts, rollouts.log_probs[batch, :width]
            reusable = rollouts.reusable.take(batch, width)  # log-probs and values, or None
            loss, ratio = torch.zeros_like(tokens), torch.ones_like(mask)
            if train_policy:
                log_probs = reusable[0] if reusable else models.log_probs(models.policy, prompts, responses, width)
                losses, ratio = policy_loss(log_probs, old, advantages[batch, :width], params.clip)
                loss = (losses * rollouts.token_weights[batch, :width] * mask).sum() / tokens
                distributed.backward(models.policy, loss)
            values = reusable[1] if reusable else models.values(prompts, responses, width)
            errors = value_loss(values, rollouts.values[batch, :width], returns[batch, :width], params.value_clip)
            error = (errors * mask).sum() / tokens
            distributed.backward(models.value, error)
            clipped = ((ratio - 1).abs() > params.clip).float()
            for name, value in (("policy_loss", loss), ("value_loss", error),
                                ("clipped", (clipped * mask).sum() / tokens), ("ratio", (ratio * mask).sum() / tokens)):
                sums[name] += value.detach()
        sums["ptx_loss"] = self.add_ptx(place) if train_policy else 0.0
        return self.take_optimizer_step(rollouts, {name: float(value) for name, value in sums.items()}, place[0],
                                        train_policy)

    def add_ptx(self, place: tuple[int, int, int]) -> float:
        """Adds the gradient of ptx_coef · pretraining loss [InstructGPT eq. 2]; returns that loss (0 without ptx).

        Of several processes each adds its part, micro_batch_size rows at a time.
        """
        params = self.params
        if params.ptx_coef == 0 or self.corpus_rows is None:
            return 0.0
        iteration, _, number = place
        step = iteration * params.inner_epochs * params.batch_size // params.minibatch_size + number
        batch = corpus_batch(self.corpus_rows, params.ptx_batch_size or PTX_ROWS_PER_EPISODE * params.minibatch_size,
                             step, self.seed)
        total = 0.0
        for loss in corpus_losses(self.models.policy, batch, params.precision, params.micro_batch_size,
                                  params.micro_batch_tokens):
            distributed.backward(self.models.policy, params.ptx_coef * loss)
            total += loss.item()
        return total

    def take_optimizer_step(self, rollouts: Rollouts, sums: dict[str, float], iteration: int, train_policy: bool
                            ) -> dict[str, float]:
        """Sums gradients and `sums` over the processes, clips, steps both optimizers (or the value model's alone).

        Raises TrainingFailed where a loss or a gradient is not finite; the weights are then as before.
        """
        models, params = self.models, self.params
        trained = (models.policy, models.value) if train_policy else (models.value,)
        totals = distributed.all_reduce_gradients(trained, sums)
        totals["grad_norm"] = distributed.clip_gradients(models.policy, params.max_grad_norm) if train_policy else 0.0
        value_norm = distributed.clip_gradients(models.value, params.max_grad_norm)
        if not all(map(math.isfinite, (*totals.values(), value_norm))):
            raise TrainingFailed(f"iteration {iteration + 1}: not finite: policy loss {totals['policy_loss']}, value "
                                 f"loss {totals['value_loss']}, gradient norms {totals['grad_norm']}, {value_norm}")
        rollouts.reusable.drop()  # forward passes of the weights before this step
        for optimizer in (self.optimizer, self.value_optimizer) if train_policy else (self.value_optimizer,):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.update_average()
        return totals

    @torch.no_grad()
    def update_average(self) -> None:
        """EMA of the policy's weights [InstructGPT App. C.4], which is what is saved: average · decay + weight ·
        (1 - decay). Nothing with ema_decay 0."""
        for name, value in self.models.policy.named_parameters():
            if name in self.average:
                self.average[name].lerp_(value, 1 - self.params.ema_decay)

    def state(self) -> State:
        """What `restore` needs to go on from here. All processes call it."""
        state = State({"beta": self.beta.state(), "rng": rng_state()} | self.sampler.state())
        for name, model, optimizer in self.trained:
            state.add(name, weights(model))
            state.add_optimizer(f"{name} optimizer", optimizer)
        state.add("average", self.average)
        return state

    def restore(self, saved: Saved) -> None:
        """Goes on where `state` was taken. All processes call it."""
        for name, model, optimizer in self.trained:
            saved.read(name, weights(model))
            saved.read_optimizer(f"{name} optimizer", optimizer)
        saved.read("average", self.average)
        self.beta.restore(saved.values["beta"])
        self.sampler.restore(saved.values)
        restore_rng(saved.values["rng"])

    def save(self, folder: Path) -> None:
        """The policy as a plain Hugging Face folder: adapters merged, the moving average of the weights where kept."""
        self.models.save_policy(folder, self.average)
