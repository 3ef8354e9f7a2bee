"""Scores that a reward model gives to sequences: of the K completions of a prompt together, or of many sequences."""

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.data.batching import pass_batches
from rlhf.data.token_store import lengths_of
from rlhf.model.device import autocast
from rlhf.model.forward import pack, scores_at
from rlhf.training import distributed

SCORE_BATCH = 512


def score_groups(model: PreTrainedModel, groups: Sequence[Sequence[Sequence[int]]], pad_id: int,
                 precision: str) -> Tensor:
    """Scores of K sequences per prompt: [prompts, Kmax], 0 where absent.

    The tokens that all sequences of a group begin with, their prompt, go through the model once for the group; each
    completion once.
    """
    shared = [min(shared_length(group), min(map(len, group)) - 1) if len(group) > 1 else 0 for group in groups]
    rest = [sequence[length:] for group, length in zip(groups, shared, strict=True) for sequence in group]
    rows = [row for row, group in enumerate(groups) for _ in group]
    prompts = [group[0][:length] for group, length in zip(groups, shared, strict=True)] if any(shared) else []
    batch = pack(model, rest, pad_id, prompts, rows)
    with autocast(precision):
        scores = scores_at(model, batch, batch.token_indices([len(one) - 1 for one in rest], [1] * len(rest)))
    columns = [column for group in groups for column in range(len(group))]
    grid = torch.zeros(len(groups), max(map(len, groups)), device=scores.device)
    return grid.index_put((torch.tensor(rows, device=grid.device), torch.tensor(columns, device=grid.device)), scores)


def shared_length(group: Sequence[Sequence[int]]) -> int:
    """How many tokens all sequences begin with."""
    first, last = min(group, key=tuple), max(group, key=tuple)  # what these two share, those between share too
    return next((index for index, (one, other) in enumerate(zip(first, last, strict=False)) if one != other),
                min(len(first), len(last)))


def score_sequences(model: PreTrainedModel, sequences: Sequence[Sequence[int]], pad_id: int,
                    precision: str) -> list[float]:
    """Score of each sequence at its last token, in the order given."""
    return score_store(model, sequences, pad_id, precision).tolist()


@torch.no_grad()
def score_store(model: PreTrainedModel, sequences: Sequence[Sequence[int]], pad_id: int,
                precision: str) -> "array[float]":
    """As score_sequences; an array of eight bytes a score."""
    scores = array("d", bytes(8 * len(sequences)))
    for indices, counts in distributed.equal_passes(model, pass_batches(lengths_of(sequences), SCORE_BATCH)):
        grid = score_groups(model, [[sequences[index]] for index in indices], pad_id, precision)
        for index, value in zip(indices, grid[:, 0].tolist(), strict=True) if counts else ():
            scores[index] = value
    return scores


def score_together(model: PreTrainedModel, sequences: Sequence[Sequence[int]], pad_id: int,
                   precision: str) -> "array[float]":
    """As score_store, for sequences that every process holds: each process scores its share, all return all scores."""
    if distributed.shares() == 1 or distributed.sharded(model):
        return score_store(model, sequences, pad_id, precision)
    scores = array("d", bytes(8 * len(sequences)))
    mine = score_store(model, distributed.share(sequences), pad_id, precision)
    for place, part in enumerate(distributed.all_shares(mine)):
        scores[place::distributed.shares()] = part
    return scores
