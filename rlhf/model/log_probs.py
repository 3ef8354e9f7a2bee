"""Log-probs and entropies of tokens from logits or hidden states, in parts that stay in cache or in memory."""

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


def entropy(logits: Tensor, temperature: float) -> Tensor:
    """Of softmax(logits / temperature), nats: [..., V] -> [...]."""
    log_probs = torch.log_softmax(logits.float() / temperature, dim=-1)
    return -(log_probs.exp() * log_probs).sum(dim=-1)


def log_probs_in_parts(states: Tensor, head: Callable[[Tensor], Tensor], ids: Tensor, rows: int,
                       temperature: float = 1.0, with_entropy: bool = False) -> tuple[Tensor, Tensor]:
    """log softmax(head(states) / temperature) at `ids`, and with `with_entropy` that distribution's entropy (without
    gradient; else empty), float32, `rows` at a time: states [n, d], ids [n] -> [n] each.

    Only one part's logits are alive at a time, in the backward pass too, which computes them again (one more
    multiplication by the head). torch 2.13's `linear_cross_entropy` does the same but ignores autocast.
    """
    parts = [checkpoint(_through_head, some, head, chosen, temperature, with_entropy, use_reentrant=False,
                        preserve_rng_state=False)
             for some, chosen in zip(states.split(rows), ids.split(rows), strict=True)]
    log_probs, entropies = zip(*parts, strict=True)
    return torch.cat(log_probs), torch.cat(entropies)


def _through_head(states: Tensor, head: Callable[[Tensor], Tensor], ids: Tensor, temperature: float,
                  with_entropy: bool) -> tuple[Tensor, Tensor]:
    logits = head(states)
    return log_probs_and_entropy(logits, ids, temperature, with_entropy)


def log_probs_and_entropy(logits: Tensor, ids: Tensor, temperature: float, with_entropy: bool) -> tuple[Tensor, Tensor]:
    """`token_log_probs`, and `entropy` without gradient where it is asked for, else nothing: [n, V], [n] -> [n], [n]
    or [0]."""
    log_probs = token_log_probs(logits, ids, temperature)
    with torch.no_grad():
        return log_probs, entropy(logits, temperature) if with_entropy else log_probs.new_zeros(0)
