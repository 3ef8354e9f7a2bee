"""Prompts with their responses: one forward pass over them, per-token grids, KL to a reference."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.fast.packed_attention import PackedBatch, pack
from rlhf.model.device import device


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


def episodes(model: PreTrainedModel, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]],
             pad_id: int) -> tuple[PackedBatch, Tensor]:
    """Prompts with their responses for one pass, and where the token before each response token is, one after the
    other."""
    texts = pack(model, [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)], pad_id)
    return texts, texts.token_indices([len(prompt) - 1 for prompt in prompts], list(map(len, responses)))


def response_mask(responses: Sequence[Sequence[int]], width: int) -> Tensor:
    """1.0 on response tokens: [B, width]."""
    lengths = torch.tensor([len(response) for response in responses], device=device()).unsqueeze(1)
    return (torch.arange(width, device=device()) < lengths).float()


def on_grid(values: Tensor, mask: Tensor) -> Tensor:
    """Puts [tokens] where mask [B, width] is 1, row after row; 0 elsewhere."""
    return torch.zeros_like(mask).masked_scatter(mask.bool(), values)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the entries where mask is 1."""
    return (values * mask).sum() / mask.sum()


def entropy(logits: Tensor, temperature: float) -> Tensor:
    """Of softmax(logits / temperature), nats: [..., V] -> [...]."""
    log_probs = torch.log_softmax(logits.float() / temperature, dim=-1)
    return -(log_probs.exp() * log_probs).sum(dim=-1)
