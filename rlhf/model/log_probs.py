"""Log-probs of tokens from logits or hidden states, in parts that stay in cache or in memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

NEAR = 2**20  # logits in float32 that a CPU keeps near: 4 MB


def token_log_probs(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) at `ids`, in float32. logits [..., V], ids [...] -> [...]."""
    scaled = logits if temperature == 1 else logits.float() / temperature
    found: Tensor = _LogProbs.apply(scaled.flatten(0, -2), ids.flatten())
    return found.view(ids.shape)


class _LogProbs(torch.autograd.Function):
    """log softmax at some ids, float32: logits [n, V], ids [n] -> [n]. Keeps the logits as they are and the n
    normalisers, where torch's cross entropy keeps n * V float32 numbers more and passes over them twice as often."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor) -> Tensor:
        found, normalisers = [], []
        for some, chosen in zip(_near(logits, logits), _near(ids, logits), strict=True):
            wide = some.float()
            normalisers.append(wide.logsumexp(dim=-1, keepdim=True))
            found.append((wide.gather(1, chosen.unsqueeze(1)) - normalisers[-1]).squeeze(1))
        ctx.save_for_backward(logits, ids, torch.cat(normalisers))
        return torch.cat(found)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, ids, normalisers = ctx.saved_tensors
        found = torch.empty_like(logits)
        for some, chosen, normaliser, part, out in zip(*(_near(item, logits) for item in (
                logits, ids, normalisers, gradient.unsqueeze(1), found)), strict=True):
            shares = some.float().sub_(normaliser).exp_().mul_(-part)
            shares[torch.arange(len(chosen), device=chosen.device), chosen] += part.squeeze(1)
            out.copy_(shares)
        return found, None


def _near(rows: Tensor, logits: Tensor) -> tuple[Tensor, ...]:
    """`rows`, one for each row of logits [n, V], in parts. On a CPU as many as stay in its cache while several
    operations pass over their logits in float32; else all of them."""
    most = len(logits) if logits.is_cuda else NEAR // logits.shape[1]
    return rows.split(max(1, most))


def log_probs_in_parts(states: Tensor, head: Callable[[Tensor], Tensor], ids: Tensor, rows: int) -> Tensor:
    """log softmax(head(states)) at `ids`, float32, `rows` at a time: states [n, d], ids [n] -> [n].

    Logits of one part are alive at once, in the backward pass too, which makes them anew (one more product of the
    head). torch 2.13's `linear_cross_entropy` does the like and leaves autocast out.
    """
    parts = [checkpoint(_head_log_probs, some, head, chosen, use_reentrant=False, preserve_rng_state=False)
             for some, chosen in zip(states.split(rows), ids.split(rows), strict=True)]
    return torch.cat(parts)


def _head_log_probs(states: Tensor, head: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
    return token_log_probs(head(states), ids)
