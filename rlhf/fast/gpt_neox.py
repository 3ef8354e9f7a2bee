"""GPT-NeoX's training passes on a CPU: transformers' numbers in fewer operations."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from rlhf.fast.blocks import blocks_of, replaceable, round_up
from rlhf.fast.packed_attention import PackedBatch, PackedLayout, attend_packed, query_positions

MANY = 0.55  # of a row's tokens: where that many are read, leaving the others out costs as much as it saves


def _known(model: PreTrainedModel, device: torch.device) -> bool:
    """Whether this file is for a pass of the model."""
    return model.config.model_type == "gpt_neox" and device.type == "cpu" and replaceable(model)


# --- the first block -------------------------------------------------------------------------------------------------

@contextmanager
def first_block_per_unique_token(model: PreTrainedModel, ids: Tensor) -> Iterator[None]:
    """A pass over ids [B, T] whose first block looks at each different token once.

    GPT-NeoX's MLP stands beside attention and its positions come in after queries and keys: all that its first block
    does but attention itself, eleven twelfths of its products, follows from the token alone. Many tokens of a small
    vocabulary are the same. The results are put in every token's place; gradients are added up in float32. Nothing
    changes for other architectures, where fewer than half of the tokens are repeated, and on a GPU, which would have to
    be waited for.
    """
    blocks = blocks_of(model)
    if (not _known(model, ids.device) or not model.config.use_parallel_residual or not blocks or len(blocks) == 1
            or (model.training and model.base_model.emb_dropout.p > 0)):
        yield
        return
    tokens, token_indices = ids.unique(return_inverse=True)
    tokens = F.pad(tokens, (0, round_up(len(tokens)) - len(tokens)), value=int(tokens[0]))
    if 2 * len(tokens) > ids.numel():
        yield
        return
    block: Any = blocks[0]
    products = (block.attention.query_key_value, block.mlp)
    norms = (block.input_layernorm, block.post_attention_layernorm)
    embeddings = F.embedding(tokens, model.get_input_embeddings().weight)
    for product, norm in zip(products, norms, strict=True):
        def of_tokens(_: Tensor, product: Any = product.forward, norm: Any = norm.forward) -> Tensor:
            return _Spread.apply(product(norm(embeddings)), token_indices)

        product.forward, norm.forward = of_tokens, lambda state: state
    try:
        yield
    finally:
        for module in (*products, *norms):
            del module.forward


class _Spread(torch.autograd.Function):
    """rows [n, d], places [B, T] in 0 .. n-1 -> [B, T, d]. A row's gradients are added up in float32."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, token_indices: Tensor) -> Tensor:
        ctx.save_for_backward(token_indices)
        ctx.count, ctx.dtype = len(rows), rows.dtype
        return F.embedding(token_indices, rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        exact = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        total = torch.ops.aten.embedding_dense_backward(exact, *ctx.saved_tensors, ctx.count, -1, False)
        return total.to(ctx.dtype), None


# --- attention -------------------------------------------------------------------------------------------------------

@contextmanager
def fused_rope(model: PreTrainedModel, layout: PackedLayout | None) -> Iterator[None]:
    """A pass over texts in a row whose queries and keys are turned by their positions [Su et al. 2021] together, while
    heads are taken apart. Rotating the halves of each by itself was a tenth of PPO on a CPU; for 4,096 tokens of four
    heads, with gradients, it takes 3.5 ms, together 1.7."""
    blocks: Any = blocks_of(model)
    if layout is None or not _known(model, model.device) or not blocks or blocks[0].attention.rotary_ndims < 2:
        yield
        return
    turns: list[Tensor] = []

    def attention(states: Tensor, module: Any, positions: tuple[Tensor, Tensor]) -> tuple[Tensor, None]:
        if not turns:
            turns.extend(_rope_factors(*positions))
        query, key, value = _FusedRope.apply(module.query_key_value(states), module.head_size, 3, 2, *turns)
        return module.dense(attend_packed(query, key, value, layout, module.scaling, _dropout(module)).flatten(2)), None

    for block in blocks:
        def forward(states: Tensor, module: Any = block.attention, **more: Any) -> tuple[Tensor, None]:
            return attention(states, module, more["position_embeddings"])

        block.attention.forward = forward
    try:
        yield
    finally:
        for block in blocks:
            del block.attention.forward


@contextmanager
def last_block_at(model: PreTrainedModel, texts: PackedBatch, token_indices: Tensor) -> Iterator[bool]:
    """A pass over texts in a row whose last hidden states are made at some places [n] only, in their order: [1, n, d].
    Of other tokens the last block makes keys and values, a sixth of its products. Tells whether that is so: not where
    MANY are asked for, and not with adapters on queries, keys and values, which are one layer."""
    block: Any = (blocks_of(model) or [None])[-1]
    if (texts.layout is None or not _known(model, model.device) or not 0 < len(token_indices) < MANY * texts.ids.numel()
            or block.attention.rotary_ndims < 2 or type(block.attention.query_key_value) is not torch.nn.Linear):
        yield False
        return
    layout, module = texts.layout, block.attention
    readers = query_positions(layout, token_indices)

    def attention(states: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
        """states [1, N, d] -> [1, n, d]"""
        joined, width = module.query_key_value, module.head_size

        def product(some: Tensor, parts: slice) -> Tensor:  # of each head's rows: its query's, key's and value's
            weight, bias = (None if item is None else item.unflatten(0, (-1, 3, width))[:, parts].flatten(0, 2)
                            for item in (joined.weight, joined.bias))
            assert weight is not None
            return F.linear(some, weight, bias)

        asking = product(states.index_select(1, readers.tokens), slice(1))
        query, = _FusedRope.apply(asking, width, 1, 1, *_rope_factors(*(
            item.index_select(1, readers.tokens) for item in positions)))
        key, value = _FusedRope.apply(product(states, slice(1, 3)), width, 2, 1, *_rope_factors(*positions))
        mixed = attend_packed(query, key, value, layout, module.scaling, _dropout(module), readers)
        return module.dense(mixed.flatten(2).index_select(1, readers.found))

    def forward(states: Tensor, *_: Any, **more: Any) -> Tensor:
        mixed = block.post_attention_dropout(attention(block.input_layernorm(states), more["position_embeddings"]))
        read = states.index_select(1, token_indices)
        before = read if block.use_parallel_residual else read + mixed
        return block.post_mlp_dropout(block.mlp(block.post_attention_layernorm(before))) + mixed + read

    block.forward = forward
    try:
        yield True
    finally:
        del block.forward


def _dropout(module: Any) -> float:
    return module.attention_dropout if module.training else 0.0


def _rope_factors(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """cos, sin [1, N, r], their halves alike -> what each of N * r numbers is multiplied with to be turned, and what
    the ones r/2 places after and before it are, which are then added: [N * r], twice [N * r - r/2]."""
    half = cos.shape[-1] // 2
    first, nothing = sin[..., :half], torch.zeros_like(sin[..., :half])
    later, before = torch.cat([-first, nothing], dim=-1), torch.cat([nothing, first], dim=-1)
    return cos.flatten(), later.flatten()[:-half], before.flatten()[half:]


class _FusedRope(torch.autograd.Function):
    """joined [1, N, heads * parts * w], a head's parts beside each other -> each part's [heads, N, w], the first r
    numbers turned in the first `turned` parts (queries and keys)."""

    @staticmethod
    def forward(ctx: Any, joined: Tensor, width: int, parts: int, turned: int, *turns: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*turns)
        ctx.turned = turned
        heads = joined[0].unflatten(1, (-1, parts, width)).permute(2, 1, 0, 3).contiguous()
        _apply_rope(heads[:turned], turns, 1)
        return tuple(heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        heads = torch.stack(gradients)
        _apply_rope(heads[:ctx.turned], ctx.saved_tensors, -1)
        return heads.permute(2, 1, 0, 3).flatten(1).unsqueeze(0), *[None] * 6


def _apply_rope(states: Tensor, turns: tuple[Tensor, ...], sign: int) -> None:
    """Turns the first r numbers of states [parts, heads, N, w] in place, or back where sign is -1."""
    cos, later, before = turns
    tokens, half = states.shape[2], len(cos) - len(later)
    part = states[..., :2 * half]
    exact = part.to(torch.promote_types(part.dtype, cos.dtype)).contiguous()
    flat = exact.view(-1, tokens * 2 * half)
    turned = flat * cos
    turned[:, :-half].addcmul_(flat[:, half:], later, value=sign)
    turned[:, half:].addcmul_(flat[:, :-half], before, value=sign)
    part.copy_(turned.view(part.shape))
