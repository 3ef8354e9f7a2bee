"""Batches of token sequences: right padding, length buckets in a seeded order, packed documents."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

BUCKET_BATCHES = 16
PASS_TOKENS = 65_536  # of a pass without gradients, PADs included: long texts go through in fewer rows


def pad_right(sequences: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    """Stacks sequences into [len(sequences), longest], PAD at the right.

    With causal attention no mask is needed: a position never sees the PADs after it.
    """
    longest = max(map(len, sequences))
    return torch.tensor([[*row, *[pad_id] * (longest - len(row))] for row in sequences], dtype=torch.long)


def pad_left(sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Stacks prompts into [n, longest] with PAD at the left, for generation; returns (ids, attention mask)."""
    longest = max(map(len, sequences))
    ids = torch.tensor([[*[pad_id] * (longest - len(row)), *row] for row in sequences])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in sequences])
    return ids, mask


def length_batches(lengths: Sequence[int], batch_size: int, shuffle: torch.Generator | None) -> list[list[int]]:
    """Indices in batches of like length: shuffled, sorted within buckets of 16 batches, batches shuffled.

    `shuffle` None: sorted by length, every index once, for evaluation. With shuffling the last, smaller batch
    is left out unless it is the only one.
    """
    count = len(lengths)
    if shuffle is None:
        order = sorted(range(count), key=lambda index: (lengths[index], index))
        return [order[start:start + batch_size] for start in range(0, count, batch_size)]
    order = torch.randperm(count, generator=shuffle).tolist()
    order = order[: max(count - count % batch_size, min(count, batch_size))]
    batches = []
    window = batch_size * BUCKET_BATCHES
    for start in range(0, len(order), window):
        bucket = sorted(order[start:start + window], key=lambda index: (lengths[index], index))
        batches += [bucket[place:place + batch_size] for place in range(0, len(bucket), batch_size)]
    return [batches[index] for index in torch.randperm(len(batches), generator=shuffle).tolist()]


def pass_batches(lengths: Sequence[int], batch_size: int, max_tokens: int = PASS_TOKENS) -> list[list[int]]:
    """Every index once, sorted by length, for evaluation: at most `batch_size` rows and `max_tokens` padded tokens.

    A row longer than that has a batch of its own.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (lengths[index], index)):
        if not batches or len(batches[-1]) >= min(batch_size, max(1, max_tokens // max(1, lengths[index]))):
            batches.append([])
        batches[-1].append(index)
    return batches


def pack(documents: Iterable[Sequence[int]], length: int, eos_id: int) -> Tensor:
    """Documents end to end, EOS before each, cut into rows of `length` tokens: [rows, length]. The rest is dropped."""
    stream: list[int] = []
    for document in documents:
        stream.append(eos_id)
        stream.extend(document)
    rows = len(stream) // length
    if rows == 0:
        raise ValueError(f"{len(stream)} tokens do not fill one row of {length}")
    return torch.tensor(stream[: rows * length]).view(rows, length)
