"""Batches for one forward pass: padded, packed into one row, or several demonstrations to a row.

`PackedBatch` is what every forward pass of rlhf/model/forward.py takes. The rest of the file packs demonstrations into
rows for SFT (`sft.packing`), each of which attends only to itself: rows filled best-fit, positions that start anew, a
loss mask. A step has `batch_size` demonstrations, as without packing, and the loss is the mean over the same
completion tokens: packing changes time and memory, not the update. Positions that start at 0 with each demonstration
are what transformers tells demonstrations apart by: without an attention mask it builds one that is causal within each
of them, for eager, fused and flash attention alike. `check_packing` checks that a model really does so.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.data.batching import filled_up, pad_right
from rlhf.errors import UserError

Span = tuple[int, int]  # start and end of some tokens
PROBE = ([5, 9, 7, 6, 8], [7, 5, 6, 9])


@dataclass(frozen=True)
class PackedBatch:
    """Sequences for one forward pass: a padded batch, ids [B, T], or all in one row, ids [1, N], with a `layout` by
    which attention keeps them apart (rlhf/fast/packed_attention.py).

    `positions`: as `ids`; None: 0 .. T-1 in each row. `starts`: index of each sequence's first token in the flattened
    ids, in the order given.
    """

    ids: Tensor
    positions: Tensor | None = None
    layout: Any = None
    starts: Sequence[int] = ()

    def arguments(self) -> dict[str, Any]:
        """Arguments of the transformers model beside the ids. It takes a mask of four dimensions as it is and builds
        none."""
        arguments: dict[str, Any] = {} if self.positions is None else {"position_ids": self.positions}
        if self.layout is not None:
            arguments |= {"layout": self.layout, "attention_mask": self.ids.new_ones(1, 1, 1, 1)}
        return arguments

    def token_indices(self, first: Sequence[int], count: Sequence[int], of: Sequence[int] | None = None) -> Tensor:
        """Indices in the flattened ids of `count` tokens of each sequence from its token `first` on: [sum of counts].

        `of`: the numbers of the sequences; None: each of them once.
        """
        starts = self.starts if of is None else [self.starts[number] for number in of]
        return to_device([start + skip + step for start, skip, steps in zip(starts, first, count, strict=True)
                          for step in range(steps)], self.ids.device)


def to_device(numbers: list[Any], device: torch.device) -> Tensor:
    """Whole numbers on a device; the CPU does not wait for a GPU."""
    tensor = torch.tensor(numbers, dtype=torch.long)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def padded_batch(sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device,
                 prompts: Sequence[Sequence[int]] = (), owner: Sequence[int] = ()) -> PackedBatch:
    """Sequences right-padded to [B, T]; with `prompts` each follows prompts[owner[sequence]]."""
    before = [prompts[index] for index in owner] if prompts else [[]] * len(sequences)
    ids = pad_right([[*one, *sequence] for one, sequence in zip(before, sequences, strict=True)], pad_id)
    ids = round_shape(ids, pad_id)
    return PackedBatch(ids.to(device), starts=[row * ids.shape[1] + len(one) for row, one in enumerate(before)])


def round_shape(ids: Tensor, pad_id: int) -> Tensor:
    """Fills a padded batch up with PADs to multiples of 16 rows and 8 columns: with a shape for nearly every batch the
    CPU backend's memory grew to 5.4 GB."""
    return F.pad(ids, (0, -ids.shape[1] % 8, 0, -ids.shape[0] % 16), value=pad_id)


def shuffled_batches(lengths: Sequence[int], batch_size: int, shuffle: torch.Generator, multiple: int = 1
                     ) -> list[list[int]]:
    """Indices in batches of any lengths, in a seeded order; what does not fill a batch is a smaller one, of a size that
    is a `multiple`.

    Batches of like length would be uneven here: rows of the same size hold many short texts and few long ones.
    """
    order = filled_up(torch.randperm(len(lengths), generator=shuffle).numpy(), multiple).tolist()
    return [order[start:start + batch_size] for start in range(0, len(order), batch_size)]


def fill_rows(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Indices of what each row holds: the longest first, each into the fullest row that has room for it (best fit).

    Raises ValueError where a length is beyond `room`.
    """
    if max(lengths) > room:
        raise ValueError(f"{max(lengths)} tokens do not fit into a row of {room}")
    rows: list[list[int]] = []
    left: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        fitting = [row for row, free in enumerate(left) if free >= lengths[index]]
        if not fitting:
            rows.append([])
            left.append(room)
            fitting = [len(rows) - 1]
        chosen = min(fitting, key=lambda row: (left[row], row))
        rows[chosen].append(index)
        left[chosen] -= lengths[index]
    return rows


def pack_rows(texts: Sequence[Sequence[int]], answers: Sequence[Sequence[Span]], room: int, pad_id: int
              ) -> tuple[Tensor, Tensor, Tensor]:
    """Texts in rows of at most `room` tokens: (ids [R, T], mask [R, T-1], positions [R, T]).

    The mask is 1 where ids[:, 1:] is a token of a text's `answers`. PADs at a row's right are a text of their own.
    """
    rows = fill_rows([len(text) for text in texts], room)
    width = max(sum(len(texts[index]) for index in row) for row in rows)
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros(len(rows), width)
    positions = torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        start = 0
        for index in row:
            end = start + len(texts[index])
            ids[number, start:end] = torch.tensor(texts[index])
            positions[number, start:end] = torch.arange(end - start)
            for first, last in answers[index]:
                mask[number, start + first:start + last] = 1
            start = end
        positions[number, start:] = torch.arange(width - start)
    return ids, mask[:, 1:], positions


def document_positions(ids: Tensor, eos_id: int) -> Tensor:
    """Positions in rows of `pack_documents` (batching.py) that start anew with each document's EOS: [B, T] each."""
    place = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    return place - torch.where(ids == eos_id, place, 0).cummax(dim=1).values


@torch.no_grad()
def check_packing(model: PreTrainedModel, tolerance: float = 1e-3) -> None:
    """Raises UserError where a model's texts see those that they are glued to, or where it takes no positions."""
    ids, _, positions = pack_rows(PROBE, [[(1, len(text))] for text in PROBE], 9, 0)
    device = next(model.parameters()).device
    try:
        glued = model.base_model(input_ids=ids.to(device), position_ids=positions.to(device),
                                 use_cache=False).last_hidden_state[0]
    except TypeError:
        glued = None
    alone = [model.base_model(input_ids=torch.tensor([text], device=device), use_cache=False).last_hidden_state[0]
             for text in PROBE]
    if glued is None or not torch.allclose(glued, torch.cat(alone), rtol=tolerance, atol=tolerance):
        raise UserError(f"sft.packing: {type(model).__name__} mixes texts that are glued into a row; set it to false")
