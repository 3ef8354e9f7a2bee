"""Log-probs of tokens from logits or hidden states, in parts that stay in cache or in memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CACHED_LOGITS = 2**20  # float32 logits that fit a CPU core's cache: 4 MB


def token_log_probs(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) at `ids`, in float32. logits [..., V], ids [...] -> [...]."""
    scaled = logits if temperature == 1 else logits.float() / temperature
    log_probs: Tensor = _LogProbs.apply(scaled.flatten(0, -2), ids.flatten())
    return log_probs.view(ids.shape)


class _LogProbs(torch.autograd.Function):
    """log softmax at some ids, float32: logits [n, V], ids [n] -> [n]. Keeps the logits as they are and the n
    normalisers, where torch's cross entropy keeps n * V float32 numbers more and passes over them twice as often."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor) -> Tensor:
        log_probs, normalisers = [], []
        for some, chosen in zip(_in_cache(logits, logits), _in_cache(ids, logits), strict=True):
            wide = some.float()
            normalisers.append(wide.logsumexp(dim=-1, keepdim=True))
            log_probs.append((wide.gather(1, chosen.unsqueeze(1)) - normalisers[-1]).squeeze(1))
        ctx.save_for_backward(logits, ids, torch.cat(normalisers))
        return torch.cat(log_probs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, ids, normalisers = ctx.saved_tensors
        gradients = torch.empty_like(logits)
        for some, chosen, normaliser, part, out in zip(*(_in_cache(item, logits) for item in (
                logits, ids, normalisers, gradient.unsqueeze(1), gradients)), strict=True):
            softmax = some.float().sub_(normaliser).exp_().mul_(-part)
            softmax[torch.arange(len(chosen), device=chosen.device), chosen] += part.squeeze(1)
            out.copy_(softmax)
        return gradients, None


def _in_cache(rows: Tensor, logits: Tensor) -> tuple[Tensor, ...]:
    """`rows`, one for each row of logits [n, V], in parts: on a CPU so many that their float32 logits stay in cache for
    several operations; on a GPU all."""
    most = len(logits) if logits.is_cuda else CACHED_LOGITS // logits.shape[1]
    return rows.split(max(1, most))


def log_probs_in_parts(states: Tensor, head: Callable[[Tensor], Tensor], ids: Tensor, rows: int) -> Tensor:
    """log softmax(head(states)) at `ids`, float32, `rows` at a time: states [n, d], ids [n] -> [n].

    Only one part's logits are alive at a time, in the backward pass too, which computes them again (one more
    multiplication by the head). torch 2.13's `linear_cross_entropy` does the same but ignores autocast.
    """
    parts = [checkpoint(_head_log_probs, some, head, chosen, use_reentrant=False, preserve_rng_state=False)
             for some, chosen in zip(states.split(rows), ids.split(rows), strict=True)]
    return torch.cat(parts)


def _head_log_probs(states: Tensor, head: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
    return token_log_probs(head(states), ids)
