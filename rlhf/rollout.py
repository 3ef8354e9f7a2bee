"""Sampling responses from a policy: left-padded prompts, a KV cache, finished rows leave the batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from rlhf.data.batching import length_batches, pad_left
from rlhf.models import autocast, device

SHRINK_AT = 0.7  # the batch is cut to its unfinished rows when at most this share of it is left


@dataclass(frozen=True)
class Sampling:
    """How to sample. `stop_ids`: tokens that end a response (kept as its last); temperature 0 is greedy."""

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    pad_id: int
    temperature: float = 1.0
    precision: str = "fp32"
    batch_size: int = 256


@torch.no_grad()
def sample_responses(model: PreTrainedModel, prompts: Sequence[Sequence[int]], sampling: Sampling,
                     noise: torch.Generator) -> list[list[int]]:
    """One response per prompt, as ids up to and including the stop token (or max_new_tokens without one).

    Every token has a uniform number of its own, drawn for (prompt, position) before anything runs: a response
    does not depend on which other prompts share its batch, up to rounding.
    """
    uniforms = torch.rand(len(prompts), sampling.max_new_tokens, generator=noise)
    responses: list[list[int]] = [[] for _ in prompts]
    for indices in length_batches([len(item) for item in prompts], sampling.batch_size, None):
        found = _sample_batch(model, [prompts[index] for index in indices], sampling, uniforms[indices])
        for index, response in zip(indices, found, strict=True):
            responses[index] = response
    return responses


def _sample_batch(model: PreTrainedModel, prompts: Sequence[Sequence[int]], sampling: Sampling,
                  uniforms: Tensor) -> list[list[int]]:
    ids, mask = (item.to(device()) for item in pad_left(prompts, sampling.pad_id))
    stops = torch.tensor(sampling.stop_ids, device=ids.device)
    uniforms = uniforms.to(ids.device)
    responses: list[list[int]] = [[] for _ in prompts]
    rows = torch.arange(len(prompts), device=ids.device)  # which prompt each row of the batch is
    alive = torch.ones(len(prompts), dtype=torch.bool, device=ids.device)
    cache = DynamicCache(config=model.config)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    with autocast(sampling.precision):
        for step in range(sampling.max_new_tokens):
            hidden = model.base_model(input_ids=ids, attention_mask=mask, position_ids=positions,
                                      past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
            tokens = pick(model.get_output_embeddings()(hidden), uniforms[rows, step], sampling.temperature)
            for row, token, is_alive in zip(rows.tolist(), tokens.tolist(), alive.tolist(), strict=True):
                if is_alive:
                    responses[row].append(token)
            alive &= ~torch.isin(tokens, stops)
            left = int(alive.sum())
            if left == 0:
                break
            ids, positions = tokens.unsqueeze(1), positions[:, -1:] + 1
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
            if left <= SHRINK_AT * len(rows):
                keep = alive.nonzero().squeeze(1)
                cache.batch_select_indices(keep)
                ids, positions, mask, rows, alive = (item[keep] for item in (ids, positions, mask, rows, alive))
    return responses


def pick(logits: Tensor, uniforms: Tensor, temperature: float) -> Tensor:
    """Token of each row: inverse of the cumulative distribution at `uniforms`, or the best one at temperature 0.

    logits [B, V], uniforms [B] in [0, 1) -> [B].
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    # float64: the cumulative sum of float32 probabilities may end below 1
    cumulative = torch.softmax(logits.double() / temperature, dim=-1).cumsum(dim=-1)
    target = uniforms.double().unsqueeze(1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp(max=logits.shape[-1] - 1)
