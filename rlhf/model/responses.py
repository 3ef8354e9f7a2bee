"""Responses to prompts: log-probs and values of their tokens from one forward pass, per-token grids, KL to a reference.

A grid is [B, width], aligned to the response: entry t is about its t-th token, 0 beyond its end.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.data.packing import PackedBatch
from rlhf.model.device import autocast, device
from rlhf.model.forward import log_probs_and_entropy_at, logits_at, pack, scores_at
from rlhf.model.log_probs import token_log_probs

Prompts = Sequence[Sequence[int]]
Responses = Sequence[Sequence[int]]


def pack_responses(model: PreTrainedModel, prompts: Prompts, responses: Responses, pad_id: int
                   ) -> tuple[PackedBatch, Tensor]:
    """Prompts with their responses as one batch, and the index of the token before each response token, one response
    after the other: [tokens]."""
    batch = pack(model, [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)], pad_id)
    return batch, batch.token_indices([len(prompt) - 1 for prompt in prompts], list(map(len, responses)))


def response_log_probs(model: PreTrainedModel, prompts: Prompts, responses: Responses, width: int, *, pad_id: int,
                       temperature: float, precision: str, with_entropy: bool = False) -> tuple[Tensor, Tensor]:
    """Log-probs of the response tokens at a temperature, float32, and with `with_entropy` the entropies, nats, of the
    distributions that they are drawn from (without gradient; else 0): [B, width] each.

    The logits of a wide vocabulary are never there at once (`log_probs_at`).
    """
    log_probs, entropies = log_probs_and_entropy_at(model, *pack_responses(model, prompts, responses, pad_id),
                                                    precision, temperature, with_entropy)
    mask = response_mask(responses, width)
    return on_grid(log_probs, mask), on_grid(entropies, mask) if with_entropy else torch.zeros_like(mask)


def response_logits(model: PreTrainedModel, prompts: Prompts, responses: Responses, width: int, *, pad_id: int,
                    temperature: float, precision: str) -> tuple[Tensor, Tensor]:
    """Log-probs of the response tokens at a temperature, float32 [B, width], and the logits that each response token
    is drawn from, one response after the other [tokens, V]: for what needs the whole distributions."""
    batch, token_indices = pack_responses(model, prompts, responses, pad_id)
    with autocast(precision):
        logits = logits_at(model, batch, token_indices)
    log_probs = token_log_probs(logits, batch.ids.flatten()[token_indices + 1], temperature)
    return on_grid(log_probs, response_mask(responses, width)), logits


def response_values(model: PreTrainedModel, prompts: Prompts, responses: Responses, width: int, *, pad_id: int,
                    precision: str) -> Tensor:
    """A value model's value of the state before each response token: [B, width]."""
    with autocast(precision):
        values = scores_at(model, *pack_responses(model, prompts, responses, pad_id))
    return on_grid(values, response_mask(responses, width))


def response_mask(responses: Responses, width: int) -> Tensor:
    """1.0 on response tokens: [B, width]."""
    lengths = torch.tensor([len(response) for response in responses], device=device()).unsqueeze(1)
    return (torch.arange(width, device=device()) < lengths).float()


def on_grid(values: Tensor, mask: Tensor) -> Tensor:
    """Puts [tokens] where mask [B, width] is 1, row after row; 0 elsewhere."""
    return torch.zeros_like(mask).masked_scatter(mask.bool(), values)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the entries where mask is 1."""
    return (values * mask).sum() / mask.sum()


def categorical_kl(logits: Tensor, ref_logits: Tensor, temperature: float) -> Tensor:
    """KL between softmax(logits / temperature) and that of `ref_logits`, nats: [..., V] each -> [...]."""
    log_probs, ref_log_probs = ((item.float() / temperature).log_softmax(dim=-1) for item in (logits, ref_logits))
    return (log_probs.exp() * (log_probs - ref_log_probs)).sum(dim=-1).clamp(min=0)


def response_kl(log_probs: Tensor, ref_log_probs: Tensor, mask: Tensor) -> Tensor:
    """k1 estimate of KL(policy || reference) of each response: sum over its tokens of log π - log π_ref.

    [B, T] each, mask 1 on response tokens -> [B], nats. Unbiased under samples from the policy; a single
    response's value may be negative.
    """
    return ((log_probs - ref_log_probs) * mask).sum(dim=1)


def response_kl_k3(log_probs: Tensor, ref_log_probs: Tensor, mask: Tensor) -> Tensor:
    """k3 estimate [Schulman, "Approximating KL divergence"]: sum of (r - 1) - log r, r = π_ref/π. Never negative."""
    log_ratio = (ref_log_probs - log_probs) * mask
    return (log_ratio.exp() - 1 - log_ratio).sum(dim=1)
