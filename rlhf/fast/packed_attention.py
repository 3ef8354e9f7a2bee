"""Packed batches: sequences of many lengths in one row without PADs, and a prompt that several share computed once.

All of a transformer but its attention works on single tokens. So the sequences of a batch stand one after the other in
a single row, and only attention keeps them apart: blocks of sequences of similar length. A ranking's completions also
attend to the prompt that they share, whose keys and values are computed once. Same results as for each sequence alone,
up to rounding.

It is an attention function in transformers' registry (`enable_packed_attention`) for four architectures.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from rlhf.data.packing import PackedBatch, to_device
from rlhf.fast.blocks import is_compiled, round_up

NAME = "instructflow_packed"
ARCHITECTURES = ("gpt_neox", "llama", "qwen2", "gpt2")
LEAST_ROWS = {"cpu": 16, "cuda": 64}  # sequences of a block, at least, where there are so many
SIMILAR = 0.9  # a block grows beyond that while its sequences have this share of its longest one's tokens
# Lengths and numbers of tokens are rounded up: the CPU backend compiles and keeps code and buffers for every new shape.
LENGTH_STEP = 8


@dataclass(frozen=True)
class PackedLayout:
    """How attention splits the tokens of a row: blocks of (sequences, tokens each), then `padding` PADs that attend to
    nothing.

    With `owner` the first block holds prompts, and every sequence of the other blocks also attends to one of them:
    `owner` says to which, sequence after sequence, and `visible` [sequences, prompt tokens] which of the prompt's
    tokens are no PADs.
    """

    blocks: tuple[tuple[int, int], ...]
    padding: int
    owner: Tensor | None = None
    visible: Tensor | None = None
    biases_of: dict[torch.dtype, list[Tensor]] = field(default_factory=dict, compare=False)

    def biases(self, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        """What is added to each block's scores: [1 or sequences, T, S]. Computed once for all layers of a pass."""
        if dtype not in self.biases_of:
            longest = max(length for _, length in self.blocks)
            causal = torch.full((longest, longest), float("-inf"), dtype=dtype, device=device).triu(1)
            biases = [causal[None, :length, :length] for _, length in self.blocks]
            if self.visible is not None:
                hidden = torch.zeros(self.visible.shape, dtype=dtype, device=device).masked_fill(
                    ~self.visible, float("-inf"))
                parts = hidden.unsqueeze(1).split([rows for rows, _ in self.blocks[1:]])
                biases[1:] = [torch.cat([part.expand(-1, bias.shape[1], -1), bias.expand(len(part), -1, -1)], dim=2)
                              for part, bias in zip(parts, biases[1:], strict=True)]
            self.biases_of[dtype] = biases
        return self.biases_of[dtype]


@dataclass(frozen=True)
class QueryPositions:
    """The tokens of a row that are computed as queries where not all are, padded to the same number in every sequence
    of a block.

    `steps`: for each block of the layout, positions in their sequences [sequences or 1, queries of a sequence];
    `tokens`: the same in the row, block after block [all queries]; `query_of`: which query each requested token is.
    """

    steps: list[Tensor]
    tokens: Tensor
    query_of: Tensor


def query_positions(layout: PackedLayout, token_indices: Tensor) -> QueryPositions:
    """token_indices [n] of a row, in any order, repeated or not; none is one of the layout's padding."""
    distinct, which = token_indices.unique(return_inverse=True)
    steps: list[Tensor] = []
    tokens: list[Tensor] = []
    query_of: list[Tensor] = []
    start = queries = 0
    for count, length in layout.blocks:
        here = distinct[(start <= distinct) & (distinct < start + count * length)] - start
        sequence, step = here // length, here % length
        each = torch.bincount(sequence, minlength=count)
        number = torch.arange(len(here)) - (each.cumsum(0) - each)[sequence]  # of a query in its sequence
        most = int(each.max())
        most = min(length, most if most < 2 else most + -most % LENGTH_STEP)
        grid = torch.zeros(count, most, dtype=torch.long).index_put((sequence, number), step)
        steps.append(grid[:1] if bool((grid == grid[:1]).all()) else grid)
        tokens.append((start + length * torch.arange(count).unsqueeze(1) + grid).flatten())
        query_of.append(queries + most * sequence + number)
        start, queries = start + count * length, queries + count * most
    return QueryPositions(steps, torch.cat(tokens), torch.cat(query_of)[which])


def enable_packed_attention(model: PreTrainedModel) -> PreTrainedModel:
    """Lets a model of one of the ARCHITECTURES attend to packed batches; its other passes stay as they are."""
    layers = set(getattr(model.config, "layer_types", None) or ["full_attention"])
    if model.config.model_type in ARCHITECTURES and layers == {"full_attention"}:
        model.set_attn_implementation(NAME)
    return model


def can_pack(model: PreTrainedModel) -> bool:
    """Whether packed batches are for this model. Not with torch.compile, which would compile for every new layout."""
    return model.config._attn_implementation == NAME and not is_compiled(model)


def pack(model: PreTrainedModel, sequences: Sequence[Sequence[int]], pad_id: int,
         prompts: Sequence[Sequence[int]] = (), owner: Sequence[int] = ()) -> PackedBatch:
    """Sequences in one row for a model that `can_pack`; with `prompts` each follows prompts[owner[sequence]], which may
    be empty."""
    device = model.device
    order = sorted(range(len(sequences)), key=lambda index: (-len(sequences[index]), index))
    blocks = [(list(range(len(prompts))), prompts)] if prompts else []
    blocks += [(chosen, sequences) for chosen in similar_lengths([len(sequences[index]) for index in order], order,
                                                                 device.type)]
    ids: list[int] = []
    positions: list[int] = []
    starts = [0] * len(sequences)
    shapes: list[tuple[int, int]] = []
    for chosen, source in blocks:
        length = max(len(source[index]) for index in chosen)
        length = max(LENGTH_STEP, length + -length % LENGTH_STEP)
        shapes.append((len(chosen), length))
        for index in chosen:
            skipped = len(prompts[owner[index]]) if prompts and source is sequences else 0
            if source is sequences:
                starts[index] = len(ids)
            ids += [*source[index], *[pad_id] * (length - len(source[index]))]
            positions += [*range(skipped, skipped + len(source[index])), *[0] * (length - len(source[index]))]
    padding = round_up(len(ids)) - len(ids)
    layout = PackedLayout(tuple(shapes), padding)
    if prompts:
        owners = torch.tensor([owner[index] for index in order])
        lengths = torch.tensor([len(prompt) for prompt in prompts])[owners].unsqueeze(1)
        layout = replace(layout, owner=owners.to(device), visible=(torch.arange(shapes[0][1]) < lengths).to(device))
    return PackedBatch(to_device([ids + [pad_id] * padding], device), to_device([positions + [0] * padding], device),
                       layout, starts)


def similar_lengths(lengths: Sequence[int], order: Sequence[int], kind: str) -> list[list[int]]:
    """The `order` of sequences, longest first, cut into blocks."""
    blocks: list[list[int]] = []
    longest = 0
    for index, length in zip(order, lengths, strict=True):
        if not blocks or (len(blocks[-1]) >= LEAST_ROWS[kind] and length < SIMILAR * longest):
            blocks.append([])
            longest = length
        blocks[-1].append(index)
    return blocks


# --- attention -------------------------------------------------------------------------------------------------------

def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
           scaling: float | None = None, dropout: float = 0.0, layout: PackedLayout | None = None,
           **more: Any) -> tuple[Tensor, None]:
    """Attention as transformers calls it: query [B, heads, T, w], key, value [B, kv heads, T, w] -> [B, T, heads, w].

    With `layout`, a packed batch; without, as `attention_mask` says (a causal one that is left out is SDPA's own).
    """
    scaling = query.shape[-1]**-0.5 if scaling is None else scaling
    if layout is not None:
        return attend_packed(query[0], key[0], value[0], layout, scaling, dropout if module.training else 0.0), None
    if query.is_cuda:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
                                      **more)
    assert attention_mask is not None
    key, value = (item.repeat_interleave(query.shape[1] // item.shape[1], dim=1) for item in (key, value))
    scores = query @ key.transpose(2, 3) * scaling + attention_mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    weights = F.dropout(weights.to(query.dtype), dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), None


def attend_packed(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scaling: float, dropout: float,
                  queries: QueryPositions | None = None) -> Tensor:
    """query [heads, N, w], key and value [kv heads, N, w] -> [1, N, heads, w]; with `queries`, only theirs instead of
    N (and no PADs)."""
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    blocks, biases, padding = layout.blocks, layout.biases(dtype, query.device), layout.padding
    keys, values = (_blocks(item.to(dtype), blocks) for item in (key, value))
    if layout.owner is not None:
        counts = [rows for rows, _ in blocks[1:]]
        for states in (keys, values):
            prompts = states[0].index_select(1, layout.owner).split(counts, dim=1)
            states[1:] = [torch.cat(pair, dim=2) for pair in zip(prompts, states[1:], strict=True)]
    if queries is not None:
        blocks = tuple((rows, step.shape[1]) for (rows, _), step in zip(blocks, queries.steps, strict=True))
        padding = 0
        biases = [bias[torch.arange(len(bias)).unsqueeze(1), step]
                  for bias, step in zip(biases, queries.steps, strict=True)]
    query_blocks = _blocks(query.to(dtype), blocks)
    mixed = [block_attention(*block, scaling, dropout).permute(1, 2, 0, 3).flatten(0, 1)
             for block in zip(query_blocks, keys, values, biases, strict=True) if block[0].numel()]
    return torch.cat([*mixed, mixed[0].new_zeros(padding, *mixed[0].shape[1:])]).unsqueeze(0)


def _blocks(states: Tensor, blocks: Sequence[tuple[int, int]]) -> list[Tensor]:
    """[heads, N, w] -> of each block [heads, sequences, tokens, w]."""
    sizes = [rows * length for rows, length in blocks]
    parts = states.split([*sizes, states.shape[1] - sum(sizes)], dim=1)
    return [part.unflatten(1, block) for part, block in zip(parts, blocks, strict=False)]


def block_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scaling: float, dropout: float = 0.0
                    ) -> Tensor:
    """Attention of a block of sequences; only causal where S is T, which a GPU's kernels know without the bias.

    query [heads, n, T, w], key and value [kv heads, n, S, w], bias [1 or n, T, S] -> as query."""
    heads, count, length, width = query.shape
    if query.is_cuda:
        causal = length == key.shape[2]
        mixed = F.scaled_dot_product_attention(
            query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), is_causal=causal, dropout_p=dropout,
            attn_mask=None if causal else bias.unsqueeze(1), scale=scaling, enable_gqa=heads != len(key))
        return mixed.transpose(0, 1)
    key, value = (item.repeat_interleave(heads // len(item), dim=0) if len(item) != heads else item
                  for item in (key, value))
    one, other, last = (item.reshape(heads * count, -1, width) for item in (query, key, value))
    if len(bias) > 1:
        bias = bias.repeat(heads, 1, 1)
    scores = torch.baddbmm(bias, one, other.transpose(1, 2), alpha=scaling)
    weights = torch.softmax(scores, dim=-1)
    if dropout:
        weights = F.dropout(weights, dropout)
    return torch.bmm(weights, last).view(query.shape)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask if torch.cuda.is_available() else eager_mask)
