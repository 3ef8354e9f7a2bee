"""Scores that a reward model gives to sequences."""

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.data.batching import pass_batches
from rlhf.data.token_store import lengths_of
from rlhf.fast.packed_attention import pack
from rlhf.model.device import autocast
from rlhf.model.forward import scores_at
from rlhf.training import distributed

SCORE_BATCH = 512


def score_groups(model: PreTrainedModel, groups: Sequence[Sequence[Sequence[int]]], pad_id: int,
                 precision: str) -> Tensor:
    """Scores of K sequences per prompt: [prompts, Kmax], 0 where absent.

    What the sequences of a group begin with, their prompt, is read once for all of them; a completion is read once in
    any case.
    """
    shared = [min(shared_length(group), min(map(len, group)) - 1) if len(group) > 1 else 0 for group in groups]
    rest = [sequence[length:] for group, length in zip(groups, shared, strict=True) for sequence in group]
    rows = [row for row, group in enumerate(groups) for _ in group]
    prompts = [group[0][:length] for group, length in zip(groups, shared, strict=True)] if any(shared) else []
    texts = pack(model, rest, pad_id, prompts, rows)
    with autocast(precision):
        scores = scores_at(model, texts, texts.token_indices([len(text) - 1 for text in rest], [1] * len(rest)))
    columns = [column for group in groups for column in range(len(group))]
    grid = torch.zeros(len(groups), max(map(len, groups)), device=scores.device)
    return grid.index_put((torch.tensor(rows, device=grid.device), torch.tensor(columns, device=grid.device)), scores)


def shared_length(group: Sequence[Sequence[int]]) -> int:
    """How many tokens all sequences begin with."""
    first, last = min(group, key=tuple), max(group, key=tuple)  # what these two share, those between share too
    return next((place for place, (one, other) in enumerate(zip(first, last, strict=False)) if one != other),
                min(len(first), len(last)))


def score_sequences(model: PreTrainedModel, sequences: Sequence[Sequence[int]], pad_id: int,
                    precision: str) -> list[float]:
    """Score of each sequence at its last token, in the order given."""
    return score_store(model, sequences, pad_id, precision).tolist()


@torch.no_grad()
def score_store(model: PreTrainedModel, sequences: Sequence[Sequence[int]], pad_id: int,
                precision: str) -> "array[float]":
    """`score_sequences` in eight bytes a score."""
    scores = array("d", bytes(8 * len(sequences)))
    for indices in pass_batches(lengths_of(sequences), SCORE_BATCH):
        found = score_groups(model, [[sequences[index]] for index in indices], pad_id, precision)
        for index, value in zip(indices, found[:, 0].tolist(), strict=True):
            scores[index] = value
    return scores


def score_together(model: PreTrainedModel, sequences: Sequence[Sequence[int]], pad_id: int,
                   precision: str) -> "array[float]":
    """As score_store, of sequences that every process has: each scores a part of them."""
    if distributed.size() == 1 or distributed.sharded(model):
        return score_store(model, sequences, pad_id, precision)
    scores = array("d", bytes(8 * len(sequences)))
    mine = score_store(model, distributed.share(sequences), pad_id, precision)
    for place, part in enumerate(distributed.all_gather(mine)):
        scores[place::distributed.size()] = part
    return scores
