"""An iteration's rollouts: responses sampled here or by a pool of engines, evaluated by the four models.

Of several processes each samples and evaluates its share of the prompts; all hold all rollouts afterwards.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.data.batching import length_batches
from rlhf.model.device import device
from rlhf.model.responses import masked_mean, response_mask
from rlhf.model.scoring import score_sequences
from rlhf.params import PpoParams
from rlhf.ppo.models import PpoModels
from rlhf.ppo.sampler import Drawn, Sampler, correction
from rlhf.training import distributed
from rlhf.training.micro_batches import micro_batches

Rows = tuple[int, ...]


class ReusableForwards:
    """Forward passes of policy and value model, kept with what their gradients need, by the rows they are of.

    The first update of an iteration uses the weights that evaluated its rollouts: it takes these passes instead of
    computing them again (`ppo.reuse_forward_passes`). After an optimizer step they are stale and dropped.
    """

    def __init__(self) -> None:
        self.passes: dict[Rows, tuple[Tensor, Tensor]] = {}

    def keep(self, rows: Sequence[int], log_probs: Tensor, values: Tensor) -> None:
        self.passes[tuple(rows)] = log_probs, values

    def take(self, rows: Sequence[int], width: int) -> tuple[Tensor, Tensor] | None:
        """Log-probs and values [n, width] of exactly these rows, once; None where they are not kept."""
        if (kept := self.passes.pop(tuple(rows), None)) is None:
            return None
        return kept[0][:, :width], kept[1][:, :width]

    def drop(self) -> None:
        self.passes.clear()


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
    token_weights: Tensor  # by which each token's policy loss is multiplied; 1 but for responses of another policy
    sampler_gap: float | None = None  # mean |difference| of the log-probs they were drawn with and ours, nats
    reusable: ReusableForwards = field(default_factory=ReusableForwards)


def share_of_unsampled(prompts: Sequence[Sequence[int]], rows: Sequence[int]) -> Sequence[int]:
    """This process's share of some rows that have no responses yet, by the lengths of their prompts. The rows of the
    first update are shared the same way, so that each process has the forward passes it may reuse."""
    return distributed.share(sorted(rows, key=lambda row: len(prompts[row])))


def collect_rollouts(models: PpoModels, params: PpoParams, prompts: list[list[int]], order: Sequence[int],
                     sampler: Sampler, iteration: int, drawn: Drawn | None = None) -> Rollouts:
    """Samples one response per prompt, unless they are `drawn` already, and evaluates all of them.

    `order`: the rows as the first epoch's minibatches take them. Raises Unavailable where no engine answers, UserError
    where one refuses, or does not sample from the policy.
    """
    models.train_mode(False)
    first = share_of_unsampled(prompts, order[:params.minibatch_size])
    rows = [*first, *share_of_unsampled(prompts, order[params.minibatch_size:])]
    if drawn is None and sampler.engines is not None:
        drawn = sampler.begin(prompts, iteration)()
    mine = [drawn.responses[row] for row in rows] if drawn else sampler.here(prompts, iteration, rows)
    evaluated, reusable = evaluate_rollouts(models, params, prompts, rows, mine, len(first))
    parts = distributed.all_shares((rows, mine, evaluated))
    responses: list[list[int]] = [[]] * len(prompts)
    for part_rows, part_responses, _ in parts:
        for row, response in zip(part_rows, part_responses, strict=True):
            responses[row] = response
    mask = response_mask(responses, max(map(len, responses)))
    grid = {name: torch.zeros_like(mask) for name in ("log_probs", "ref_log_probs", "values", "entropy", "scores")}
    for part_rows, _, evaluated in parts:
        for name, values in evaluated.items():
            grid[name][part_rows, :values.shape[1]] = values.to(device())
    rollouts = Rollouts(prompts, responses, mask, grid["log_probs"], grid["ref_log_probs"], grid["values"],
                        grid["scores"][:, 0], masked_mean(grid["entropy"], mask).item(), torch.ones_like(mask),
                        reusable=reusable)
    if drawn is not None:
        drawn_with = drawn.grid(mask)
        rollouts.token_weights = correction(rollouts.log_probs, drawn_with, params.rollout_correction)
        rollouts.sampler_gap = masked_mean((rollouts.log_probs - drawn_with).abs(), mask).item()
        if sampler.engines is not None:
            sampler.engines.check(rollouts.sampler_gap, drawn.stale)
    return rollouts


def evaluation_batches(policy: PreTrainedModel, lengths: Sequence[int], first: int, params: PpoParams
                       ) -> Iterator[tuple[list[int], bool]]:
    """(rows of a forward pass, whether the first update takes it) for rollouts of these lengths; the others have four
    times as many rows, as they keep nothing for gradients."""
    to_keep = length_batches(lengths[:first], params.micro_batch_size, None)[:params.reuse_forward_passes]
    yield from ((batch, True) for batch in to_keep)
    kept = {index for batch in to_keep for index in batch}
    others = [index for index in range(len(lengths)) if index not in kept]
    for picked, _ in micro_batches(policy, [lengths[index] for index in others], 4 * params.micro_batch_size,
                                   4 * params.micro_batch_tokens):
        yield [others[index] for index in picked], False


@torch.no_grad()
def evaluate_rollouts(models: PpoModels, params: PpoParams, prompts: Sequence[list[int]], rows: Sequence[int],
                      responses: Sequence[list[int]], first: int) -> tuple[dict[str, Tensor], ReusableForwards]:
    """What the models say of the responses to prompts[rows], on the CPU: log_probs, ref_log_probs, values, entropy
    [n, T], scores [n, 1].

    The first `first` rows are this process's share of the first update: up to params.reuse_forward_passes of their
    micro-batches keep what their gradients need.
    """
    own_prompts = [prompts[row] for row in rows]
    sequences = [prompt + response for prompt, response in zip(own_prompts, responses, strict=True)]
    lengths = list(map(len, sequences))
    mask = response_mask(responses, max(map(len, responses)))
    width = mask.shape[1]
    grid = {name: torch.zeros_like(mask) for name in ("log_probs", "ref_log_probs", "values", "entropy")}
    reusable = ReusableForwards()
    with models.in_use(models.reference):
        for batch, keep in evaluation_batches(models.policy, lengths, first, params):
            some, answers = [own_prompts[index] for index in batch], [responses[index] for index in batch]
            with torch.set_grad_enabled(keep):
                models.train_mode(keep)
                log_probs, entropies = models.log_probs_and_entropy(models.policy, some, answers, width)
                values = models.values(some, answers, width)
            models.train_mode(False)
            if keep:
                reusable.keep([rows[index] for index in batch], log_probs, values)
            grid["log_probs"][batch], grid["values"][batch] = log_probs.detach(), values.detach()
            grid["entropy"][batch] = entropies
            with models.as_reference() as reference:
                grid["ref_log_probs"][batch] = models.log_probs(reference, some, answers, width)
    with models.in_use(models.reward_model):
        scores = torch.tensor(score_sequences(models.reward_model, sequences, models.codec.pad_id, params.precision),
                              device=device())
    ended = torch.tensor([response[-1] in models.codec.stop_ids for response in responses], device=device())
    scores = torch.where(ended, scores, scores.clamp(max=params.no_eos_score))
    on_cpu = {name: (values * mask).cpu() for name, values in grid.items()}
    return on_cpu | {"scores": scores.unsqueeze(1).cpu()}, reusable
