"""PPO with a KL penalty to the SFT policy: the maths of the stage, top to bottom.

Schulman et al. 2017 (PPO), Ziegler et al. 2019, InstructGPT §3.5 and App. C.4. One iteration: sample responses,
score them, read the KL, adapt β, turn score and KL into per-token rewards, estimate advantages, then a few epochs
of minibatch updates of the policy and of a separate value model. Dropout is off throughout.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.data.batching import length_batches
from rlhf.errors import TrainingFailed, UserError
from rlhf.model.device import autocast, device
from rlhf.model.forward import logits_at, scores_at
from rlhf.model.load import (
    check_length,
    compile_model,
    load_policy,
    load_scorer,
    new_scorer,
    no_dropout,
    save_memory,
    save_model,
)
from rlhf.model.log_probs import token_log_probs
from rlhf.model.lora import add_adapter
from rlhf.model.responses import entropy, episodes, masked_mean, on_grid, response_kl, response_kl_k3, response_mask
from rlhf.model.sampling import Sampling, sample_responses
from rlhf.model.scoring import score_sequences
from rlhf.model.tokenizer import PromptCodec, load_tokenizer
from rlhf.params import PpoParams
from rlhf.ppo.kl_controller import beta_rule
from rlhf.ppo.rollouts import Rollouts, first_share
from rlhf.ppo.vllm_sampler import Sampled, VllmServer, sample_on
from rlhf.pretrain import corpus_batch, corpus_loss
from rlhf.training import distributed
from rlhf.training.optim import adamw, scale_lr
from rlhf.training.seeding import generator, restore_rng, rng_state

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




# --- rollouts ------------------------------------------------------------------------------------------------











class Trainer:
    """The four models and one iteration of PPO on them. `begin_with`: a policy, SFT if left out."""

    def __init__(self, params: PpoParams, sft_folder: Path, rm_folder: Path, seed: int,
                 begin_with: Path | None = None) -> None:
        self.params, self.seed = params, seed
        self.tokenizer = load_tokenizer(sft_folder)
        self.codec = PromptCodec(self.tokenizer)
        self.policy = load_policy(begin_with or sft_folder)
        check_length(self.policy, params.max_prompt_tokens + params.max_new_tokens,
                     "ppo.max_prompt_tokens + ppo.max_new_tokens")
        self.reward_model = load_scorer(rm_folder).requires_grad_(False)
        self.value = load_scorer(rm_folder) if params.value_init == "reward_model" else new_scorer(
            sft_folder, self.codec.pad_id, generator(seed, "ppo", "value head"))
        self.adapter = add_adapter(self.policy, params) if params.lora_rank else None
        self.value_adapter = add_adapter(self.value, params, train_head=True) if params.lora_rank else None
        # With LoRA the policy without its adapter is the reference: no second copy of the weights.
        self.reference = None if self.adapter else load_policy(sft_folder).requires_grad_(False)
        for model in (self.policy, self.value):
            no_dropout(model)
            save_memory(model, params.gradient_checkpointing)
            compile_model(model, params.compile)
        for name in ("batch_size", "minibatch_size"):
            distributed.check_divides(getattr(params, name), f"ppo.{name}")
        distributed.check_divides(params.batch_size % params.minibatch_size, "ppo.batch_size modulo ppo.minibatch_size")
        if params.shard:
            if self.reference is None:
                raise UserError("ppo.shard: goes without ppo.lora_rank, whose adapters are small")
            for model in (self.policy, self.value, self.reference, self.reward_model):
                distributed.shard(model)
        self.optimizer = adamw(self.policy, params.lr, betas=(0.9, 0.95), eps=params.adam_eps)
        self.value_optimizer = adamw(self.value, params.value_lr, betas=(0.9, 0.95), eps=params.adam_eps)
        self.average = {name: value.detach().clone() for name, value in self.policy.named_parameters()
                        if value.requires_grad} if params.ema_decay else {}
        self.beta = beta_rule(params)
        self.sampling = Sampling(params.max_new_tokens, (self.codec.eos_id,), self.codec.pad_id, params.temperature,
                                 params.precision, params.rollout_batch_size, params.compile_rollouts)
        self.server = VllmServer(params.vllm_url, self.policy.config.vocab_size) if params.vllm_url else None
        if self.server is not None and distributed.is_main():
            self.server.wait()
        self.corpus_rows: Sequence[list[int]] | None = None

    @contextmanager
    def as_reference(self) -> Iterator[PreTrainedModel]:
        """The frozen SFT policy."""
        if self.adapter is None:
            assert self.reference is not None
            yield self.reference
            return
        with self.adapter.disable_adapter():
            yield self.policy

    def train_mode(self, on: bool) -> None:
        """Only matters to gradient checkpointing, which is active in training mode; dropout is 0 everywhere."""
        for model in (self.policy, self.value):
            model.train(on and self.params.gradient_checkpointing)

    def log_probs(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]],
                  width: int) -> Tensor:
        """Log-probs of the response tokens at the sampling temperature: [B, width]."""
        return self.log_probs_and_logits(model, prompts, responses, width)[0]

    def log_probs_and_logits(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]],
                             responses: Sequence[Sequence[int]], width: int) -> tuple[Tensor, Tensor]:
        """As log_probs, and the logits that each response token was drawn from, one after the other: [tokens, V]."""
        texts, token_indices = episodes(model, prompts, responses, self.codec.pad_id)
        with autocast(self.params.precision):
            logits = logits_at(model, texts, token_indices)
        found = token_log_probs(logits, texts.ids.flatten()[token_indices + 1], self.params.temperature)
        return on_grid(found, response_mask(responses, width)), logits

    def values_of(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], width: int) -> Tensor:
        """Value of the state before each response token: [B, width]."""
        with autocast(self.params.precision):
            values = scores_at(self.value, *episodes(self.value, prompts, responses, self.codec.pad_id))
        return on_grid(values, response_mask(responses, width))

    @torch.no_grad()
    def collect_rollouts(self, prompts: list[list[int]], iteration: int) -> Rollouts:
        """Samples one response per prompt and evaluates policy, reference, value and reward model on them.

        Of several processes each does that for its share of the prompts; all have all rollouts afterwards.
        """
        self.train_mode(False)
        order = self.order(iteration, 0, len(prompts))
        first = first_share(prompts, order[:self.params.minibatch_size])
        rows = [*first, *first_share(prompts, order[self.params.minibatch_size:])]
        noise = generator(self.seed, "ppo", iteration)
        answers: list[Sampled] = []
        if self.server is not None:
            answers = sample_on(self.server, self.policy, self.adapter, self.tokenizer, prompts, self.sampling, noise)
            mine = [answers[row][0] for row in rows]
        else:
            with distributed.unsharded(self.policy):
                mine = sample_responses(self.policy, prompts, self.sampling, noise, rows)
        found, kept = self.evaluate_rollouts([prompts[row] for row in rows], mine, len(first))
        parts = distributed.all_gather((rows, mine, found))
        responses: list[list[int]] = [[]] * len(prompts)
        for token_indices, some, _ in parts:
            for place, response in zip(token_indices, some, strict=True):
                responses[place] = response
        mask = response_mask(responses, max(map(len, responses)))
        grid = {name: torch.zeros_like(mask) for name in ("log_probs", "ref", "values", "entropy", "scores")}
        for token_indices, _, found in parts:
            for name, values in found.items():
                grid[name][token_indices, :values.shape[1]] = values.to(device())
        rollouts = Rollouts(prompts, responses, mask, grid["log_probs"], grid["ref"], grid["values"],
                            grid["scores"][:, 0], masked_mean(grid["entropy"], mask).item(),
                            kept={tuple(rows[index] for index in picked): made for picked, made in kept})
        if self.server is not None:
            theirs = torch.tensor([value for _, values in answers for value in values], device=device())
            gap = masked_mean((rollouts.log_probs - on_grid(theirs, mask)).abs(), mask).item()
            self.server.check(gap)
            rollouts.sampler_gap = gap
        return rollouts

    def evaluate_rollouts(self, prompts: list[list[int]], responses: list[list[int]], first: int
                ) -> tuple[dict[str, Tensor], list[tuple[list[int], tuple[Tensor, Tensor]]]]:
        """What the models say of some responses, on the CPU: log_probs, ref, values, entropy [B, T], scores [B, 1].

        The `first` ones are this process's part of the first update, which wants policy and value of the same weights:
        up to params.reuse_forward_passes of its passes keep what their gradients need, and come back with their rows.
        """
        sequences = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        lengths = list(map(len, sequences))
        mask = response_mask(responses, max(map(len, responses)))
        width = mask.shape[1]
        grid = {name: torch.zeros_like(mask) for name in ("log_probs", "ref", "values", "entropy")}
        to_keep = length_batches(lengths[:first], self.params.micro_batch_size, None)[:self.params.reuse_forward_passes]
        done = {row for rows in to_keep for row in rows}
        others = [row for row in range(len(sequences)) if row not in done]
        batches = length_batches([lengths[row] for row in others], 4 * self.params.micro_batch_size, None)
        to_pass = [(rows, True) for rows in to_keep] + [([others[index] for index in picked], False)
                                                        for picked in batches]
        kept = []
        for rows, keep in to_pass:
            some, answers = [prompts[row] for row in rows], [responses[row] for row in rows]
            with torch.set_grad_enabled(keep):
                self.train_mode(keep)
                log_probs, logits = self.log_probs_and_logits(self.policy, some, answers, width)
                values = self.values_of(some, answers, width)
            self.train_mode(False)
            if keep:
                kept.append((rows, (log_probs, values)))
            grid["log_probs"][rows], grid["values"][rows] = log_probs.detach(), values.detach()
            grid["entropy"][rows] = on_grid(entropy(logits, self.params.temperature), response_mask(answers, width))
            with self.as_reference() as reference:
                grid["ref"][rows] = self.log_probs(reference, some, answers, width)
        scores = torch.tensor(score_sequences(self.reward_model, sequences, self.codec.pad_id,
                                              self.params.precision), device=device())
        ended = torch.tensor([response[-1] == self.codec.eos_id for response in responses], device=device())
        scores = torch.where(ended, scores, scores.clamp(max=self.params.no_eos_score))
        return {name: (values * mask).cpu() for name, values in grid.items()} | {
            "scores": scores.unsqueeze(1).cpu()}, kept

    # --- one iteration ---------------------------------------------------------------------------------------

    def step(self, rollouts: Rollouts, iteration: int) -> dict[str, float]:
        """Adapts β to the KL of the rollouts, then updates policy and value model on them. Returns journal values."""
        params, mask = self.params, rollouts.mask
        self.train_mode(True)
        kl = response_kl(rollouts.log_probs, rollouts.ref_log_probs, mask).mean().item()
        kl_k3 = response_kl_k3(rollouts.log_probs, rollouts.ref_log_probs, mask).mean().item()
        beta = self.beta.update(kl)
        rewards = token_rewards(rollouts.scores, rollouts.log_probs, rollouts.ref_log_probs, mask, beta)
        episode_reward = rewards.sum(dim=1).mean().item()
        if params.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False)
        advantages, returns = advantages_and_returns(rewards, rollouts.values, mask, params.gamma, params.lam)
        residual = masked_mean((returns - rollouts.values) ** 2, mask)
        spread = masked_mean((returns - masked_mean(returns, mask)) ** 2, mask)
        if params.whiten_advantages:
            advantages = whiten(advantages, mask)
        factor = 1.0 if params.warmup_iterations == 0 else min(1.0, 0.1 + 0.9 * iteration / params.warmup_iterations)
        scale_lr(self.optimizer, factor)
        sums: dict[str, float] = {}
        updates = 0
        for epoch in range(params.inner_epochs):
            order = self.order(iteration, epoch, len(rollouts.prompts))
            for start in range(0, len(order), params.minibatch_size):
                step = self.update(rollouts, order[start:start + params.minibatch_size], advantages, returns,
                                   (iteration, epoch, updates))
                sums = {name: sums.get(name, 0.0) + value for name, value in step.items()}
                if updates == 0:
                    ratio_first = step["ratio"]
                updates += 1
        means = {name: total / updates for name, total in sums.items()}
        lengths = mask.sum(dim=1)
        return {
            "ppo/kl": kl, "ppo/kl_k3": kl_k3, "ppo/kl_goal": params.kl_goal, "ppo/kl_smoothed": self.beta.smoothed,
            "ppo/beta": beta,
            "ppo/reward": episode_reward, "ppo/rm_score": rollouts.scores.mean().item(),
            "ppo/entropy": rollouts.entropy, "ppo/clip_fraction": means["clipped"],
            "ppo/value_loss": means["value_loss"], "ppo/policy_loss": means["policy_loss"],
            "ppo/ptx_loss": means["ptx_loss"], "ppo/explained_variance": (1 - residual / (spread + 1e-8)).item(),
            "ppo/grad_norm": means["grad_norm"], "ppo/response_length": lengths.mean().item(),
            "ppo/eos_rate": sum(item[-1] == self.codec.eos_id for item in rollouts.responses) / len(lengths),
            "ppo/ratio_first": ratio_first, "ppo/lr": params.lr * factor,
        } | ({} if rollouts.sampler_gap is None else {"ppo/sampler_gap": rollouts.sampler_gap})

    def order(self, iteration: int, epoch: int, count: int) -> list[int]:
        """The rollouts in the order in which an epoch's minibatches take them."""
        noise = generator(self.seed, "minibatch", iteration, epoch)
        order: list[int] = torch.randperm(count, generator=noise).tolist()
        return order

    def update(self, rollouts: Rollouts, rows: list[int], advantages: Tensor, returns: Tensor,
               place: tuple[int, int, int]) -> dict[str, float]:
        """One optimizer step of policy and value model on a minibatch, accumulated over micro-batches and processes.

        Sums are divided by the minibatch's token count, so the update is the same for any micro-batch size and any
        number of processes, up to rounding.
        """
        params = self.params
        tokens = rollouts.mask[rows].sum()
        lengths = [len(prompt) + len(response) for prompt, response in zip(rollouts.prompts, rollouts.responses,
                                                                           strict=True)]
        mine = (first_share(rollouts.prompts, rows) if place[1:] == (0, 0) else
                distributed.share(sorted(rows, key=lambda row: lengths[row])))
        sums: dict[str, Any] = {name: torch.zeros((), dtype=torch.float64, device=device())
                                for name in ("policy_loss", "value_loss", "clipped", "ratio")}
        for picked in length_batches([lengths[row] for row in mine], params.micro_batch_size, None):
            chosen = [mine[index] for index in picked]
            prompts, answers = [rollouts.prompts[row] for row in chosen], [rollouts.responses[row] for row in chosen]
            width = max(map(len, answers))
            mask, old = rollouts.mask[chosen, :width], rollouts.log_probs[chosen, :width]
            log_probs, values = (item if item is None else item[:, :width]
                                 for item in rollouts.kept.pop(tuple(chosen), (None, None)))
            if log_probs is None:
                log_probs = self.log_probs(self.policy, prompts, answers, width)
            losses, ratio = policy_loss(log_probs, old, advantages[chosen, :width], params.clip)
            loss = (losses * mask).sum() / tokens
            distributed.backward(self.policy, loss)
            if values is None:
                values = self.values_of(prompts, answers, width)
            errors = value_loss(values, rollouts.values[chosen, :width], returns[chosen, :width], params.value_clip)
            error = (errors * mask).sum() / tokens
            distributed.backward(self.value, error)
            clipped = ((ratio - 1).abs() > params.clip).float()
            for name, value in (("policy_loss", loss), ("value_loss", error),
                                ("clipped", (clipped * mask).sum() / tokens), ("ratio", (ratio * mask).sum() / tokens)):
                sums[name] += value.detach()
        sums["ptx_loss"] = self.add_ptx(place)
        totals = distributed.all_reduce_gradients((self.policy, self.value), {name: float(value) for name, value in sums.items()})
        totals["grad_norm"] = distributed.clip_gradients(self.policy, params.max_grad_norm)
        value_norm = distributed.clip_gradients(self.value, params.max_grad_norm)
        if not all(map(math.isfinite, (*totals.values(), value_norm))):
            raise TrainingFailed(f"iteration {place[0] + 1}: not finite: policy loss {totals['policy_loss']}, value "
                                 f"loss {totals['value_loss']}, gradient norms {totals['grad_norm']}, {value_norm}")
        rollouts.kept.clear()
        for optimizer in (self.optimizer, self.value_optimizer):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, value in self.policy.named_parameters():
                if name in self.average:
                    self.average[name].lerp_(value, 1 - params.ema_decay)
        return totals

    def add_ptx(self, place: tuple[int, int, int]) -> float:
        """Adds the gradient of ptx_coef · pretraining loss [InstructGPT eq. 2]; returns that loss (0 without ptx).

        Of several processes each adds its part.
        """
        if self.params.ptx_coef == 0 or self.corpus_rows is None:
            return 0.0
        iteration, _, number = place
        per_iteration = self.params.inner_epochs * self.params.batch_size // self.params.minibatch_size
        step = iteration * per_iteration + number
        batch = corpus_batch(self.corpus_rows, self.params.ptx_batch_size, step, self.seed)
        loss = corpus_loss(self.policy, batch, self.params.precision)
        distributed.backward(self.policy, self.params.ptx_coef * loss)
        return loss.item()

    # --- what a checkpoint holds -----------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        parts = {"policy": self.policy, "value": self.value, "optimizer": self.optimizer,
                 "value_optimizer": self.value_optimizer}
        return {name: distributed.full_state(part.state_dict()) for name, part in parts.items()} | {
            "beta": self.beta.state(), "average": distributed.full_state(self.average), "rng": rng_state()}

    def restore(self, state: dict[str, Any]) -> None:
        distributed.load_weights(self.policy, state["policy"])
        distributed.load_weights(self.value, state["value"])
        distributed.load_optimizer(self.optimizer, state["optimizer"])
        distributed.load_optimizer(self.value_optimizer, state["value_optimizer"])
        self.beta.restore(state["beta"])
        own = dict(self.policy.named_parameters())
        self.average = {name: distributed.shard_like(value.to(device()), own[name]) for name, value in state["average"].items()}
        restore_rng(state["rng"])

    def save(self, folder: Path) -> None:
        """The policy as a plain Hugging Face folder: adapters merged, the moving average of the weights where kept."""
        self.train_mode(False)
        own = {name: value.detach().clone() for name, value in self.policy.named_parameters() if name in self.average}
        self.policy.load_state_dict(self.average, strict=False)
        if self.adapter is None:
            save_model(self.policy, self.tokenizer, folder)
        else:
            save_model(self.adapter.merge_and_unload(), self.tokenizer, folder)
            return  # the adapter is gone: nothing is trained after this
        self.policy.load_state_dict(own, strict=False)
