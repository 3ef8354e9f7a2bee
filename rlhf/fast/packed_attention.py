"""One pass over texts of many lengths without their PADs, and over what several of them begin with once.

All of a transformer but its attention works on single tokens. So texts stand one after the other in a single row, and
only attention takes them apart: groups of like length, each a block of its own. A ranking's completions also see the
prompt that they share, whose keys and values are made once. The same numbers as of texts alone, up to rounding.

It is an attention of its own in transformers' registry (`use_groups`), for four architectures; others' texts are a
padded batch, each with its prompt before it.
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

from rlhf.data.batching import pad_right
from rlhf.fast.blocks import compiled, round_up

NAME = "instructflow_packed"
ARCHITECTURES = ("gpt_neox", "llama", "qwen2", "gpt2")
LEAST_ROWS = {"cpu": 16, "cuda": 64}  # of a block of texts of like length, that attention takes together
LIKE = 0.9  # a block grows beyond that while its texts have this share of its longest one's tokens
# Lengths and numbers of tokens are rounded up: the CPU backend makes and keeps code and buffers for every new shape.
LENGTH_STEP = 8


@dataclass(frozen=True)
class PackedLayout:
    """How attention cuts the tokens of a row: blocks of (texts, tokens each), then `rest` PADs that see nothing.

    With `owner` the first block is of prompts, and every text of the others also sees one: `owner` says which, text
    after text, and `seen` [texts, prompt tokens] which of its tokens are no PADs.
    """

    blocks: tuple[tuple[int, int], ...]
    rest: int
    owner: Tensor | None = None
    seen: Tensor | None = None
    made: dict[torch.dtype, list[Tensor]] = field(default_factory=dict, compare=False)

    def biases(self, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        """What is added to each block's scores: [1 or texts, T, S]. Made once for all layers of a pass."""
        if dtype not in self.made:
            longest = max(length for _, length in self.blocks)
            causal = torch.full((longest, longest), float("-inf"), dtype=dtype, device=device).triu(1)
            own = [causal[None, :length, :length] for _, length in self.blocks]
            if self.seen is not None:
                hidden = torch.zeros(self.seen.shape, dtype=dtype, device=device).masked_fill(~self.seen, float("-inf"))
                parts = hidden.unsqueeze(1).split([rows for rows, _ in self.blocks[1:]])
                own[1:] = [torch.cat([part.expand(-1, bias.shape[1], -1), bias.expand(len(part), -1, -1)], dim=2)
                           for part, bias in zip(parts, own[1:], strict=True)]
            self.made[dtype] = own
        return self.made[dtype]


@dataclass(frozen=True)
class QueryPositions:
    """The tokens of a row that attend where not all do, padded to as many in every text of a block.

    `steps`: of each block of the groups, where the readers are in their texts [texts or 1, readers of a text];
    `tokens`: the same in the row, block after block [all readers]; `found`: which of them each place asked for is.
    """

    steps: list[Tensor]
    tokens: Tensor
    found: Tensor


def query_positions(layout: PackedLayout, token_indices: Tensor) -> QueryPositions:
    """places [n] of a row, in any order, some perhaps twice; none is one of the `rest`."""
    distinct, which = token_indices.unique(return_inverse=True)
    steps: list[Tensor] = []
    tokens: list[Tensor] = []
    own: list[Tensor] = []
    start = readers = 0
    for count, length in layout.blocks:
        here = distinct[(start <= distinct) & (distinct < start + count * length)] - start
        text, step = here // length, here % length
        each = torch.bincount(text, minlength=count)
        number = torch.arange(len(here)) - (each.cumsum(0) - each)[text]  # of a reader in its text
        most = int(each.max())
        most = min(length, most if most < 2 else most + -most % LENGTH_STEP)
        grid = torch.zeros(count, most, dtype=torch.long).index_put((text, number), step)
        steps.append(grid[:1] if bool((grid == grid[:1]).all()) else grid)
        tokens.append((start + length * torch.arange(count).unsqueeze(1) + grid).flatten())
        own.append(readers + most * text + number)
        start, readers = start + count * length, readers + count * most
    return QueryPositions(steps, torch.cat(tokens), torch.cat(own)[which])


@dataclass(frozen=True)
class PackedBatch:
    """Texts in a row [1, N], or in a padded batch [B, T] where `groups` is None; `starts`: where each one's first
    token is in the flattened ids, in the order given."""

    ids: Tensor
    positions: Tensor | None = None
    layout: PackedLayout | None = None
    starts: Sequence[int] = ()

    def arguments(self) -> dict[str, Any]:
        """What transformers is given with the ids. A mask of four dimensions is taken as made: none is built."""
        given: dict[str, Any] = {} if self.positions is None else {"position_ids": self.positions}
        if self.layout is not None:
            given |= {"groups": self.layout, "attention_mask": self.ids.new_ones(1, 1, 1, 1)}
        return given

    def token_indices(self, first: Sequence[int], count: Sequence[int]) -> Tensor:
        """Places in the flattened ids of `count` tokens of each text from its token `first` on: [sum of counts]."""
        return _sent([start + skip + step for start, skip, steps in zip(self.starts, first, count, strict=True)
                      for step in range(steps)], self.ids.device)


def enable_packed_attention(model: PreTrainedModel) -> PreTrainedModel:
    """Lets a model of one of the ARCHITECTURES attend in groups; its other passes stay what they are."""
    layers = set(getattr(model.config, "layer_types", None) or ["full_attention"])
    if model.config.model_type in ARCHITECTURES and layers == {"full_attention"}:
        model.set_attn_implementation(NAME)
    return model


def pack(model: PreTrainedModel, texts: Sequence[Sequence[int]], pad_id: int,
            prompts: Sequence[Sequence[int]] = (), owner: Sequence[int] = ()) -> PackedBatch:
    """Texts for one pass of a model; with `prompts` each comes after prompts[owner[text]], which may be empty."""
    device = model.device
    if model.config._attn_implementation != NAME or compiled(model):
        before = [prompts[index] for index in owner] if prompts else [[]] * len(texts)
        batch = round_shape(pad_right([[*one, *text] for one, text in zip(before, texts, strict=True)], pad_id), pad_id)
        return PackedBatch(batch.to(device), starts=[row * batch.shape[1] + len(one) for row, one in enumerate(before)])
    order = sorted(range(len(texts)), key=lambda index: (-len(texts[index]), index))
    blocks = [(list(range(len(prompts))), prompts)] if prompts else []
    blocks += [(chosen, texts) for chosen in similar_lengths([len(texts[index]) for index in order], order, device.type)]
    ids: list[int] = []
    positions: list[int] = []
    starts = [0] * len(texts)
    shapes: list[tuple[int, int]] = []
    for chosen, of in blocks:
        length = max(len(of[index]) for index in chosen)
        length = max(LENGTH_STEP, length + -length % LENGTH_STEP)
        shapes.append((len(chosen), length))
        for index in chosen:
            skipped = len(prompts[owner[index]]) if prompts and of is texts else 0
            if of is texts:
                starts[index] = len(ids)
            ids += [*of[index], *[pad_id] * (length - len(of[index]))]
            positions += [*range(skipped, skipped + len(of[index])), *[0] * (length - len(of[index]))]
    rest = round_up(len(ids)) - len(ids)
    layout = PackedLayout(tuple(shapes), rest)
    if prompts:
        owners = torch.tensor([owner[index] for index in order])
        lengths = torch.tensor([len(prompt) for prompt in prompts])[owners].unsqueeze(1)
        layout = replace(layout, owner=owners.to(device), seen=(torch.arange(shapes[0][1]) < lengths).to(device))
    return PackedBatch(_sent([ids + [pad_id] * rest], device), _sent([positions + [0] * rest], device), layout, starts)


def _sent(numbers: list[Any], device: torch.device) -> Tensor:
    """Whole numbers on a device; a GPU is not waited for."""
    found = torch.tensor(numbers, dtype=torch.long)
    return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found.to(device)




def similar_lengths(lengths: Sequence[int], order: Sequence[int], kind: str) -> list[list[int]]:
    """The `order` of texts, longest first, cut into blocks."""
    blocks: list[list[int]] = []
    longest = 0
    for index, length in zip(order, lengths, strict=True):
        if not blocks or (len(blocks[-1]) >= LEAST_ROWS[kind] and length < LIKE * longest):
            blocks.append([])
            longest = length
        blocks[-1].append(index)
    return blocks




def round_shape(ids: Tensor, pad_id: int) -> Tensor:
    """Fills a padded batch up with PADs to multiples of 16 rows and 8 columns: with a shape for nearly every batch
    memory grew to 5.4 GB on a CPU."""
    return F.pad(ids, (0, -ids.shape[1] % 8, 0, -ids.shape[0] % 16), value=pad_id)


# --- attention -------------------------------------------------------------------------------------------------------

def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
           scaling: float | None = None, dropout: float = 0.0, layout: PackedLayout | None = None,
           **more: Any) -> tuple[Tensor, None]:
    """Attention as transformers calls it: query [B, heads, T, w], key, value [B, kv heads, T, w] -> [B, T, heads, w].

    With `groups`, texts in a row; without, as `attention_mask` says (a causal one that is left out is SDPA's own).
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
    shares = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    shares = F.dropout(shares.to(query.dtype), dropout, module.training)
    return (shares @ value).transpose(1, 2).contiguous(), None


def attend_packed(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scaling: float, dropout: float,
              readers: QueryPositions | None = None) -> Tensor:
    """query [heads, N, w], key and value [kv heads, N, w] -> [1, N, heads, w]; of `readers` alone, theirs instead of N
    (and no PADs)."""
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    blocks, biases, rest = layout.blocks, layout.biases(dtype, query.device), layout.rest
    keys, values = (_blocks(item.to(dtype), blocks) for item in (key, value))
    if layout.owner is not None:
        counts = [rows for rows, _ in blocks[1:]]
        for own in (keys, values):
            prompts = own[0].index_select(1, layout.owner).split(counts, dim=1)
            own[1:] = [torch.cat(pair, dim=2) for pair in zip(prompts, own[1:], strict=True)]
    if readers is not None:
        blocks, rest = tuple((rows, step.shape[1]) for (rows, _), step in zip(blocks, readers.steps, strict=True)), 0
        biases = [bias[torch.arange(len(bias)).unsqueeze(1), step]
                  for bias, step in zip(biases, readers.steps, strict=True)]
    queries = _blocks(query.to(dtype), blocks)
    found = [mix(*block, scaling, dropout).permute(1, 2, 0, 3).flatten(0, 1)
             for block in zip(queries, keys, values, biases, strict=True) if block[0].numel()]
    return torch.cat([*found, found[0].new_zeros(rest, *found[0].shape[1:])]).unsqueeze(0)


def _blocks(states: Tensor, blocks: Sequence[tuple[int, int]]) -> list[Tensor]:
    """[heads, N, w] -> of each block [heads, texts, tokens, w]."""
    sizes = [rows * length for rows, length in blocks]
    parts = states.split([*sizes, states.shape[1] - sum(sizes)], dim=1)
    return [part.unflatten(1, block) for part, block in zip(parts, blocks, strict=False)]


def mix(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scaling: float, dropout: float = 0.0) -> Tensor:
    """Attention of a block of texts; causal alone where S is T, which a GPU's kernels know without the bias.

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
    shares = torch.softmax(scores, dim=-1)
    if dropout:
        shares = F.dropout(shares, dropout)
    return torch.bmm(shares, last).view(query.shape)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask if torch.cuda.is_available() else eager_mask)
