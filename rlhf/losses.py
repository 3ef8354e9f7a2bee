"""The losses of supervised fine-tuning and of the reward model. PPO's are in rlhf/ppo/trainer.py."""


import torch
import torch.nn.functional as F
from torch import Tensor


def completion_loss(log_probs: Tensor, mask: Tensor) -> Tensor:
    """Mean negative log-likelihood over the tokens where `mask` is set (the completion, EOS included)."""
    return -(log_probs * mask).sum() / mask.sum()


def ranking_loss(scores: Tensor, ranks: Tensor, present: Tensor) -> Tensor:
    """K-way ranking loss [InstructGPT eq. 1]: -1/C(K,2) sum over pairs of log sigmoid(r_w - r_l), mean over prompts.

    scores, ranks, present: [prompts, K]; rank 1 is best; `present` marks real completions where K varies. Pairs of
    equal rank are left out of the sum; the divisor stays C(K,2). All pairs of a prompt are in one batch element,
    so a completion is encoded once, not K-1 times.
    """
    wins = (ranks.unsqueeze(2) < ranks.unsqueeze(1)) & present.unsqueeze(2) & present.unsqueeze(1)
    margins = scores.unsqueeze(2) - scores.unsqueeze(1)
    losses = torch.where(wins, -F.logsigmoid(margins), torch.zeros_like(margins))
    count = present.sum(dim=1).to(scores.dtype)
    return (losses.sum(dim=(1, 2)) / (count * (count - 1) / 2)).mean()


def best_of_loss(scores: Tensor, ranks: Tensor, present: Tensor) -> Tensor:
    """Softmax cross-entropy over a prompt's completions, the one of rank 1 being right [Ziegler eq. 1]; mean.

    scores, ranks, present: [prompts, n]; one completion of each prompt has rank 1.
    """
    best = ((ranks == 1) & present).long().argmax(dim=1)
    return F.cross_entropy(scores.float().masked_fill(~present, float("-inf")), best)


def ranking_accuracy(scores: Tensor, ranks: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """(pairs ordered as the labeler did, pairs with a preference), whole numbers. An equal score counts as wrong."""
    wins = (ranks.unsqueeze(2) < ranks.unsqueeze(1)) & present.unsqueeze(2) & present.unsqueeze(1)
    right = wins & (scores.unsqueeze(2) > scores.unsqueeze(1))
    return right.sum(), wins.sum()
