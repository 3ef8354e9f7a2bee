"""An iteration's rollouts: sampled, scored, evaluated."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from rlhf.training import distributed


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
    sampler_gap: float | None = None  # mean |difference| of a server's log-probs and ours, nats
    kept: dict[tuple[int, ...], tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Log-probs and values [n, T] of some rows, with the passes that they came from: good until weights change."""


def first_share(prompts: Sequence[Sequence[int]], rows: Sequence[int]) -> Sequence[int]:
    """This process's part of some rows that have no responses yet, by the lengths of their prompts. What it samples it
    also has in the first update, where passes over it may still be there (Trainer.examine)."""
    return distributed.share(sorted(rows, key=lambda row: len(prompts[row])))
