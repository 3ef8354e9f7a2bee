"""Batches of token sequences: right padding, length buckets in a seeded order, packed documents."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import overload

import numpy as np
import torch
from torch import Tensor

BUCKET_BATCHES = 16
PASS_TOKENS = 65_536  # padded tokens of a forward pass without gradients: of long texts it has fewer rows


def pad_right(sequences: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    """Stacks sequences into [n, longest], padded on the right.

    Causal attention needs no mask: a position never sees the padding after it.
    """
    longest = max(map(len, sequences))
    return torch.tensor([[*row, *[pad_id] * (longest - len(row))] for row in sequences], dtype=torch.long)


def pad_left(sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Stacks prompts into [n, longest], padded on the left for generation; returns (ids, attention mask)."""
    longest = max(map(len, sequences))
    ids = torch.tensor([[*[pad_id] * (longest - len(row)), *row] for row in sequences])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in sequences])
    return ids, mask


class Batches(Sequence[list[int]]):
    """Batches of indices, sliced from `order` on access: 8 bytes per row, where lists of Python integers take 40.

    `places`: the order of the batches; None: as they are in `order`.
    """

    def __init__(self, order: np.ndarray, batch_size: int, places: np.ndarray | None = None) -> None:
        self.order, self.batch_size, self.places = order, batch_size, places

    def __len__(self) -> int:
        return -(-len(self.order) // self.batch_size)

    @overload
    def __getitem__(self, number: int) -> list[int]: ...

    @overload
    def __getitem__(self, number: slice) -> list[list[int]]: ...

    def __getitem__(self, number: int | slice) -> list[int] | list[list[int]]:
        if isinstance(number, slice):
            return [self[index] for index in range(*number.indices(len(self)))]
        number = range(len(self))[number]
        start = (number if self.places is None else int(self.places[number])) * self.batch_size
        return self.order[start:start + self.batch_size].tolist()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


def length_batches(lengths: Sequence[int], batch_size: int, shuffle: torch.Generator | None,
                   groups: Sequence[int] | None = None, multiple: int = 1) -> Batches:
    """Indices in batches of similar length: shuffled, sorted within buckets of 16 batches, batches shuffled.

    Every index comes once; what does not fill a batch is a smaller one. `shuffle` None: sorted by length, for
    evaluation. `multiple`: of the size of each batch; to have it the smaller one repeats indices. `groups`: a number
    for each index; indices of one group come in one batch, in consecutive places, or in two where a batch ends among
    them.
    """
    count = len(lengths)
    sizes = np.asarray(lengths)
    if shuffle is None:
        return Batches(np.argsort(sizes, kind="stable"), batch_size)  # ties by index
    group = np.arange(count) if groups is None else _numbered(groups)
    drawn = np.argsort(torch.randperm(int(group.max(initial=-1)) + 1, generator=shuffle).numpy())
    order = filled_up(np.argsort(drawn[group], kind="stable"), multiple)
    longest = np.zeros(len(drawn), sizes.dtype)
    np.maximum.at(longest, group, sizes)
    window = batch_size * BUCKET_BATCHES
    for start in range(0, len(order), window):
        bucket = order[start:start + window]
        order[start:start + window] = bucket[np.lexsort((bucket, group[bucket], longest[group[bucket]]))]
    places = torch.randperm(-(-len(order) // batch_size), generator=shuffle).numpy()
    return Batches(order, batch_size, places)


def filled_up(order: np.ndarray, multiple: int) -> np.ndarray:
    """The indices, and so many of the first ones again that their number is a multiple."""
    return np.resize(order, len(order) + -len(order) % multiple)


def _numbered(groups: Sequence[int]) -> np.ndarray:
    """The groups numbered from 0 in the order of their first index."""
    _, first, inverse = np.unique(np.asarray(groups), return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first, kind="stable"), kind="stable")[inverse]


class ShuffledEpochs:
    """The batch of each training step; every epoch is shuffled anew.

    `batches_of(epoch)` gives an epoch's batches, equally many in each. Only the newest epoch's are held.
    """

    def __init__(self, batches_of: Callable[[int], Sequence[list[int]]]) -> None:
        self.batches_of = batches_of
        self._epoch, self._batches = 0, batches_of(0)
        self.per_epoch = len(self._batches)

    def __getitem__(self, step: int) -> list[int]:
        epoch, place = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self.batches_of(epoch)
        return self._batches[place]


def pieces(rows: Sequence[int], count: int) -> list[list[int]]:
    """The rows of a batch in micro-batches of at most `count` rows; 0: all in one."""
    return [list(rows[start:start + count]) for start in range(0, len(rows), count)] if count else [list(rows)]


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


def pack_documents(documents: Iterable[Sequence[int]], length: int, eos_id: int) -> Iterator[list[int]]:
    """Documents end to end, EOS before each, cut into rows of `length` tokens. The rest is dropped."""
    stream: list[int] = []
    for document in documents:
        stream.append(eos_id)
        stream.extend(document)
        whole = len(stream) - len(stream) % length
        yield from (stream[start:start + length] for start in range(0, whole, length))
        del stream[:whole]
