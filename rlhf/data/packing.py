"""Demonstrations glued into rows, each of which sees only itself: rows best-fit, positions that start anew, loss mask.

A step has exactly `batch_size` demonstrations, as without packing, and the loss is the mean over the same completion
tokens: packing changes time and memory, not the update. Positions that start at 0 with each demonstration are what
transformers tells demonstrations apart by: without an attention mask it makes one that is causal within each of them,
for eager, fused and flash attention alike. `check_packing` looks whether a model really does so.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.errors import UserError

PROBE = ([5, 9, 7, 6, 8], [7, 5, 6, 9])


def shuffled_batches(lengths: Sequence[int], batch_size: int, shuffle: torch.Generator) -> list[list[int]]:
    """Indices in batches of any lengths, in a seeded order; the last, smaller one is left out unless it is alone.

    Batches of like length would be uneven here: rows of the same size hold many short texts and few long ones.
    """
    order = torch.randperm(len(lengths), generator=shuffle).tolist()
    batches = [order[start:start + batch_size] for start in range(0, len(order), batch_size)]
    return batches if len(batches) == 1 or len(batches[-1]) == batch_size else batches[:-1]


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


def packed_batch(texts: Sequence[Sequence[int]], prompt_lengths: Sequence[int], room: int,
                 pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Texts in rows of at most `room` tokens: (ids [R, T], mask [R, T-1], positions [R, T]).

    The mask is 1 where ids[:, 1:] is a completion token. PADs at a row's right are a text of their own.
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
            mask[number, start + prompt_lengths[index]:end] = 1
            start = end
        positions[number, start:] = torch.arange(width - start)
    return ids, mask[:, 1:], positions


def document_positions(ids: Tensor, eos_id: int) -> Tensor:
    """Positions in rows of `rlhf/data/batching.py:pack` that start anew with each document's EOS: [B, T] -> [B, T]."""
    place = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    return place - torch.where(ids == eos_id, place, 0).cummax(dim=1).values


@torch.no_grad()
def check_packing(model: PreTrainedModel) -> None:
    """Raises UserError where a model's texts see those that they are glued to, or where it takes no positions."""
    ids, _, positions = packed_batch(PROBE, [1, 1], 9, 0)
    device = next(model.parameters()).device
    try:
        glued = model.base_model(input_ids=ids.to(device), position_ids=positions.to(device),
                                 use_cache=False).last_hidden_state[0]
    except TypeError:
        glued = None
    alone = [model.base_model(input_ids=torch.tensor([text], device=device), use_cache=False).last_hidden_state[0]
             for text in PROBE]
    if glued is None or not torch.allclose(glued, torch.cat(alone), rtol=1e-3, atol=1e-3):
        raise UserError(f"sft.packing: {type(model).__name__} mixes texts that are glued into a row; set it to false")
