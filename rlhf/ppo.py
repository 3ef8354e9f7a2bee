"""PPO with a KL penalty to the SFT policy: the maths of the stage, top to bottom.

Schulman et al. 2017 (PPO), Ziegler et al. 2019, InstructGPT §3.5 and App. C.4. One iteration: sample responses,
score them, read the KL, adapt β, turn score and KL into per-token rewards, estimate advantages, then a few epochs
of minibatch updates of the policy and of a separate value model. Dropout is off throughout.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.checkpoint import Checkpoints
from rlhf.data.batching import length_batches, pad_right
from rlhf.errors import UserError
from rlhf.journal import Journal
from rlhf.kl import StepBeta, response_kl
from rlhf.losses import token_log_probs
from rlhf.models import (
    adamw,
    autocast,
    device,
    load_policy,
    load_scorer,
    next_token_logits,
    save_model,
    scale_lr,
    values_everywhere,
)
from rlhf.params import PpoParams
from rlhf.pretrain import corpus_batch, lm_loss, read_corpus
from rlhf.progress import StageProgress
from rlhf.reward_model import score_sequences
from rlhf.rollout import Sampling, sample_responses
from rlhf.seeding import generator, restore_rng, rng_state, seed_everything
from rlhf.tokenizer import PromptCodec, load_tokenizer

COLUMNS = [f"ppo/{name}" for name in (
    "kl", "kl_goal", "kl_smoothed", "beta", "reward", "rm_score", "gold", "entropy", "clip_fraction", "value_loss",
    "policy_loss", "ptx_loss", "explained_variance", "grad_norm", "response_length", "eos_rate", "ratio_first", "lr")]

GoldScorer = Callable[[Sequence[str], Sequence[str]], list[float]]


# --- the maths -----------------------------------------------------------------------------------------------

def token_rewards(scores: Tensor, log_probs: Tensor, ref_log_probs: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Reward of each token: -β(log π - log π_ref), plus the score at the response's last token.

    scores [B]; log_probs, ref_log_probs, mask [B, T] -> [B, T]. [Ziegler §2.1, InstructGPT eq. 2]
    """
    rewards = -beta * (log_probs - ref_log_probs) * mask
    last = mask.sum(dim=1).long() - 1
    rewards[torch.arange(len(rewards), device=rewards.device), last] += scores
    return rewards


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the entries where mask is 1."""
    return (values * mask).sum() / mask.sum()


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

@dataclass
class Rollouts:
    """An iteration's episodes. Token tensors are [B, T], aligned to the response: entry t is its t-th token."""

    prompts: list[list[int]]
    responses: list[list[int]]
    mask: Tensor
    log_probs: Tensor
    ref_log_probs: Tensor
    values: Tensor
    scores: Tensor
    entropy: float


def response_rows(full: Tensor, prompts: Sequence[Sequence[int]], width: int) -> Tensor:
    """Cuts [B, S-1] next-token quantities to the responses: [B, width], row b from position len(prompt)-1."""
    starts = torch.tensor([len(prompt) - 1 for prompt in prompts], device=full.device).unsqueeze(1)
    places = starts + torch.arange(width, device=full.device)
    return full.gather(1, places.clamp(max=full.shape[1] - 1))


def response_mask(responses: Sequence[Sequence[int]], width: int) -> Tensor:
    """1.0 on response tokens: [B, width]."""
    lengths = torch.tensor([len(response) for response in responses], device=device()).unsqueeze(1)
    return (torch.arange(width, device=device()) < lengths).float()


class Trainer:
    """The four models and one iteration of PPO on them."""

    def __init__(self, params: PpoParams, sft_folder: Path, rm_folder: Path, seed: int) -> None:
        self.params, self.seed = params, seed
        self.tokenizer = load_tokenizer(sft_folder)
        self.codec = PromptCodec(self.tokenizer)
        self.policy = load_policy(sft_folder)
        self.reference = load_policy(sft_folder).requires_grad_(False)
        self.reward_model = load_scorer(rm_folder).requires_grad_(False)
        self.value = load_scorer(rm_folder)  # the value model starts as the reward model
        self.optimizer = adamw(self.policy, params.lr, betas=(0.9, 0.95), eps=params.adam_eps)
        self.value_optimizer = adamw(self.value, params.value_lr, betas=(0.9, 0.95), eps=params.adam_eps)
        self.beta = StepBeta(params.kl_goal, params.beta, params.beta_min, params.beta_max, params.beta_interval,
                             params.beta_smoothing)
        self.sampling = Sampling(params.max_new_tokens, (self.codec.eos_id,), self.codec.pad_id, params.temperature,
                                 params.precision)
        self.corpus_rows: Tensor | None = None

    def sequences(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Tensor:
        return pad_right([[*p, *r] for p, r in zip(prompts, responses, strict=True)], self.codec.pad_id).to(device())

    def log_probs(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]],
                  responses: Sequence[Sequence[int]], width: int) -> tuple[Tensor, Tensor]:
        """Log-probs of the response tokens at the sampling temperature, and the entropy: [B, width] each."""
        ids = self.sequences(prompts, responses)
        start = min(len(prompt) for prompt in prompts) - 1
        with autocast(self.params.precision):
            logits = next_token_logits(model, ids, start)
        log_probs = token_log_probs(logits, ids[:, start + 1:], self.params.temperature)
        with torch.no_grad():
            distribution = torch.log_softmax(logits.float() / self.params.temperature, dim=-1)
            entropy = -(distribution.exp() * distribution).sum(dim=-1)
        shifted = [prompt[start:] for prompt in prompts]
        return response_rows(log_probs, shifted, width), response_rows(entropy, shifted, width)

    def values_of(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], width: int) -> Tensor:
        """Value of the state before each response token: [B, width]."""
        with autocast(self.params.precision):
            values = values_everywhere(self.value, self.sequences(prompts, responses))
        return response_rows(values[:, :-1], prompts, width)

    @torch.no_grad()
    def roll_out(self, prompts: list[list[int]], iteration: int) -> Rollouts:
        """Samples one response per prompt and evaluates policy, reference, value and reward model on them."""
        responses = sample_responses(self.policy, prompts, self.sampling, generator(self.seed, "ppo", iteration))
        sequences = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        width = max(map(len, responses))
        grid = {name: torch.zeros(len(prompts), width, device=device())
                for name in ("log_probs", "ref", "values", "entropy")}
        for rows in length_batches([len(item) for item in sequences], 4 * self.params.micro_batch_size, None):
            some, answers = [prompts[row] for row in rows], [responses[row] for row in rows]
            grid["log_probs"][rows], grid["entropy"][rows] = self.log_probs(self.policy, some, answers, width)
            grid["ref"][rows], _ = self.log_probs(self.reference, some, answers, width)
            grid["values"][rows] = self.values_of(some, answers, width)
        scores = torch.tensor(score_sequences(self.reward_model, sequences, self.codec.pad_id,
                                              self.params.precision), device=device())
        ended = torch.tensor([response[-1] == self.codec.eos_id for response in responses], device=device())
        scores = torch.where(ended, scores, scores.clamp(max=self.params.no_eos_score))
        mask = response_mask(responses, width)
        return Rollouts(prompts, responses, mask, grid["log_probs"] * mask, grid["ref"] * mask,
                        grid["values"] * mask, scores, masked_mean(grid["entropy"], mask).item())

    # --- one iteration ---------------------------------------------------------------------------------------

    def iterate(self, rollouts: Rollouts, iteration: int) -> dict[str, float]:
        """Adapts β to the KL of the rollouts, then updates policy and value model on them. Returns journal values."""
        params, mask = self.params, rollouts.mask
        kl = response_kl(rollouts.log_probs, rollouts.ref_log_probs, mask).mean().item()
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
            order = torch.randperm(len(rollouts.prompts), generator=generator(self.seed, "minibatch", iteration, epoch))
            for rows in order.split(params.minibatch_size):
                step = self.update(rollouts, rows.tolist(), advantages, returns, (iteration, epoch, updates))
                sums = {name: sums.get(name, 0.0) + value for name, value in step.items()}
                if updates == 0:
                    ratio_first = step["ratio"]
                updates += 1
        means = {name: total / updates for name, total in sums.items()}
        lengths = mask.sum(dim=1)
        return {
            "ppo/kl": kl, "ppo/kl_goal": params.kl_goal, "ppo/kl_smoothed": self.beta.smoothed, "ppo/beta": beta,
            "ppo/reward": episode_reward, "ppo/rm_score": rollouts.scores.mean().item(),
            "ppo/entropy": rollouts.entropy, "ppo/clip_fraction": means["clipped"],
            "ppo/value_loss": means["value_loss"], "ppo/policy_loss": means["policy_loss"],
            "ppo/ptx_loss": means["ptx_loss"], "ppo/explained_variance": (1 - residual / (spread + 1e-8)).item(),
            "ppo/grad_norm": means["grad_norm"], "ppo/response_length": lengths.mean().item(),
            "ppo/eos_rate": sum(item[-1] == self.codec.eos_id for item in rollouts.responses) / len(lengths),
            "ppo/ratio_first": ratio_first, "ppo/lr": params.lr * factor,
        }

    def update(self, rollouts: Rollouts, rows: list[int], advantages: Tensor, returns: Tensor,
               place: tuple[int, int, int]) -> dict[str, float]:
        """One optimizer step of policy and value model on a minibatch, accumulated over micro-batches.

        Sums are divided by the minibatch's token count, so the update is the same for any micro-batch size.
        """
        params = self.params
        tokens = rollouts.mask[rows].sum()
        lengths = [len(rollouts.prompts[row]) + len(rollouts.responses[row]) for row in rows]
        totals = dict.fromkeys(("policy_loss", "value_loss", "clipped", "ratio"), 0.0)
        for picked in length_batches(lengths, params.micro_batch_size, None):
            chosen = [rows[index] for index in picked]
            prompts, answers = [rollouts.prompts[row] for row in chosen], [rollouts.responses[row] for row in chosen]
            width = max(map(len, answers))
            mask, old = rollouts.mask[chosen, :width], rollouts.log_probs[chosen, :width]
            log_probs, _ = self.log_probs(self.policy, prompts, answers, width)
            losses, ratio = policy_loss(log_probs, old, advantages[chosen, :width], params.clip)
            loss = (losses * mask).sum() / tokens
            loss.backward()
            errors = value_loss(self.values_of(prompts, answers, width), rollouts.values[chosen, :width],
                                returns[chosen, :width], params.value_clip)
            error = (errors * mask).sum() / tokens
            error.backward()
            clipped = ((ratio - 1).abs() > params.clip).float()
            for name, value in (("policy_loss", loss), ("value_loss", error),
                                ("clipped", (clipped * mask).sum() / tokens), ("ratio", (ratio * mask).sum() / tokens)):
                totals[name] += value.item()
        totals["ptx_loss"] = self.add_ptx(place)
        totals["grad_norm"] = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), params.max_grad_norm).item()
        torch.nn.utils.clip_grad_norm_(self.value.parameters(), params.max_grad_norm)
        for optimizer in (self.optimizer, self.value_optimizer):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return totals

    def add_ptx(self, place: tuple[int, int, int]) -> float:
        """Adds the gradient of ptx_coef · pretraining loss [InstructGPT eq. 2]; returns that loss (0 without ptx)."""
        if self.params.ptx_coef == 0 or self.corpus_rows is None:
            return 0.0
        iteration, _, number = place
        per_iteration = self.params.inner_epochs * self.params.batch_size // self.params.minibatch_size
        step = iteration * per_iteration + number
        batch = corpus_batch(self.corpus_rows, self.params.ptx_batch_size, step, self.seed)
        loss = lm_loss(self.policy, batch, self.params.precision)
        (self.params.ptx_coef * loss).backward()
        return loss.item()

    # --- what a checkpoint holds -----------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        return {"policy": self.policy.state_dict(), "value": self.value.state_dict(),
                "optimizer": self.optimizer.state_dict(), "value_optimizer": self.value_optimizer.state_dict(),
                "beta": self.beta.state(), "rng": rng_state()}

    def restore(self, state: dict[str, Any]) -> None:
        self.policy.load_state_dict(state["policy"])
        self.value.load_state_dict(state["value"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.value_optimizer.load_state_dict(state["value_optimizer"])
        self.beta.restore(state["beta"])
        restore_rng(state["rng"])


def iteration_prompts(count: int, params: PpoParams, iteration: int, seed: int) -> list[int]:
    """Indices of an iteration's prompts: every prompt once per pass, shuffled anew, each samples_per_prompt times."""
    needed = params.batch_size // params.samples_per_prompt
    first = iteration * needed
    chosen: list[int] = []
    for position in range(first, first + needed):
        epoch, place = divmod(position, count)
        if not chosen or place == 0:
            order = torch.randperm(count, generator=generator(seed, "ppo prompts", epoch)).tolist()
        chosen.append(order[place])
    return [index for index in chosen for _ in range(params.samples_per_prompt)]


def train_ppo(params: PpoParams, prompts: list[str], sft_folder: Path, rm_folder: Path, seed: int, folder: Path,
              gold: GoldScorer | None = None, corpus: Path | None = None) -> dict[str, float]:
    """Trains a policy on `prompts` against the reward model and saves it in `folder`/model. Returns metrics.

    `gold(prompts, responses)`: a score that is only watched, never trained on. `corpus`: pretraining
    text (JSON Lines with "text"), read where params.ptx_coef > 0. Raises UserError where no prompt fits.
    """
    seed_everything(seed)
    trainer = Trainer(params, sft_folder, rm_folder, seed)
    encoded = trainer.codec.prompts(prompts)
    kept = [(text, ids) for text, ids in zip(prompts, encoded, strict=True) if len(ids) <= params.max_prompt_tokens]
    if not kept:
        raise UserError(f"data/ppo.jsonl: no prompt of at most ppo.max_prompt_tokens = {params.max_prompt_tokens}")
    if params.ptx_coef > 0 and corpus is not None:
        trainer.corpus_rows = read_corpus(corpus, trainer.tokenizer, trainer.policy.config.max_position_embeddings)
    checkpoints = Checkpoints(folder / "checkpoints")
    found = checkpoints.latest()
    start = 0
    if found is not None:
        start, state = found
        trainer.restore(state)
    iterations = params.episodes // params.batch_size
    journal = Journal(folder / "journal.csv", COLUMNS, resume_after=start if found else None)

    def state_now() -> dict[str, Any]:
        journal.sync()
        return trainer.state()

    with StageProgress("ppo", iterations, "iterations", done=start) as progress:
        for iteration in range(start, iterations):
            rows = iteration_prompts(len(kept), params, iteration, seed)
            rollouts = trainer.roll_out([kept[row][1] for row in rows], iteration)
            values = trainer.iterate(rollouts, iteration)
            texts = [trainer.codec.decode(response) for response in rollouts.responses]
            scores = gold([kept[row][0] for row in rows], texts) if gold else []
            values["ppo/gold"] = sum(scores) / len(scores) if scores else 0.0
            journal.append(iteration + 1, values)
            progress.step({name: values[f"ppo/{name}"] for name in ("kl", "beta", "rm_score", "gold")})
            checkpoints.after_step(iteration + 1, state_now)
    journal.close()
    save_model(trainer.policy, trainer.tokenizer, folder / "model")
    return {"ppo/episodes": iterations * params.batch_size, "ppo/too_long": len(prompts) - len(kept)}
