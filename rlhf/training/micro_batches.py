"""Micro-batches: the parts of a step that go through a model at once, by rows or by tokens.

A step's loss and gradients are sums over them, so they change memory and speed, not the update, up to rounding.
"""

from collections.abc import Iterator, Sequence

from torch import nn

from rlhf.data.batching import length_batches, pass_batches, pieces
from rlhf.training import distributed

Part = tuple[list[int], bool]  # indices, and whether their results count (`distributed.equal_passes`)


def micro_batches(model: nn.Module, lengths: Sequence[int], rows: int, tokens: int = 0) -> Iterator[Part]:
    """Indices 0 .. n-1 of rows with these lengths, sorted by length: at most `rows` at once, and where `tokens` is
    not 0 at most so many tokens, PADs included (longest row times rows; a longer row is alone).

    Of a sharded model every process makes as many passes, where `tokens` lets their numbers differ.
    """
    if tokens:
        yield from distributed.equal_passes(model, pass_batches(lengths, rows or len(lengths), tokens))
        return
    for part in length_batches(lengths, rows or len(lengths), None):
        yield part, True


def shares(model: nn.Module, batch: Sequence[int], lengths: Sequence[int], rows: int, tokens: int = 0
           ) -> Iterator[Part]:
    """This process's share of a batch of rows, whose lengths are `lengths[row]`, in micro-batches; 0 `rows`: all at
    once. Without `tokens` in the batch's order."""
    mine = distributed.share(batch)
    if not tokens:
        for part in pieces(mine, rows):
            yield part, True
        return
    for part, counts in micro_batches(model, [lengths[row] for row in mine], rows, tokens):
        yield [mine[index] for index in part], counts
