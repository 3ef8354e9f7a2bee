"""GPT-NeoX's training passes on a CPU: transformers' results in fewer operations."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from rlhf.data.packing import PackedBatch
from rlhf.fast.blocks import blocks_of, is_plain, round_up
from rlhf.fast.packed_attention import PackedLayout, attend_packed, query_positions

MANY = 0.55  # of a row's tokens: with so many to compute, leaving the others out costs as much as it saves


def _supported(model: PreTrainedModel, device: torch.device) -> bool:
    """Whether this file's passes are for the model."""
    return model.config.model_type == "gpt_neox" and device.type == "cpu" and is_plain(model)


# --- the first block -------------------------------------------------------------------------------------------------

@contextmanager
def first_block_per_unique_token(model: PreTrainedModel, ids: Tensor) -> Iterator[None]:
    """A forward pass over ids [B, T] whose first block computes each distinct token once.

    GPT-NeoX's MLP is parallel to attention and its positions enter after queries and keys are computed: everything in
    its first block but attention itself, eleven twelfths of its multiplications, depends on the token alone. Many
    tokens of a small vocabulary are equal. Results are copied to every token's place; gradients are summed in float32.
    It does nothing for other architectures, where fewer than half of the tokens are repeated, and on a GPU, which would
    have to be waited for.
    """
    blocks = blocks_of(model)
    if (not _supported(model, ids.device) or not model.config.use_parallel_residual or not blocks or len(blocks) == 1
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
    embeddings = model.get_input_embeddings()(tokens)
    for product, norm in zip(products, norms, strict=True):
        def of_tokens(_: Tensor, product: Any = product.forward, norm: Any = norm.forward) -> Tensor:
            return _Gather.apply(product(norm(embeddings)), token_indices)

        product.forward, norm.forward = of_tokens, lambda state: state
    try:
        yield
    finally:
        for module in (*products, *norms):
            del module.forward


class _Gather(torch.autograd.Function):
    """rows [n, d], indices [B, T] in 0 .. n-1 -> [B, T, d]. A row's gradients are summed in float32."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.count, ctx.dtype = len(rows), rows.dtype
        return F.embedding(indices, rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        exact = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        total = torch.ops.aten.embedding_dense_backward(exact, *ctx.saved_tensors, ctx.count, -1, False)
        return total.to(ctx.dtype), None


# --- attention -------------------------------------------------------------------------------------------------------

@contextmanager
def fused_rope(model: PreTrainedModel, layout: PackedLayout | None) -> Iterator[None]:
    """A forward pass over a packed batch that applies RoPE [Su et al. 2021] to Q and K in one operation while it splits
    the heads. Rotating each by itself was a tenth of PPO's time on a CPU: 3.5 ms for 4,096 tokens of four heads with
    gradients, in one operation 1.7 ms."""
    blocks: Any = blocks_of(model)
    if layout is None or not _supported(model, model.device) or not blocks or blocks[0].attention.rotary_ndims < 2:
        yield
        return
    factors: list[Tensor] = []

    def attention(states: Tensor, module: Any, positions: tuple[Tensor, Tensor]) -> tuple[Tensor, None]:
        if not factors:
            factors.extend(_rope_factors(*positions))
        query, key, value = _FusedRope.apply(module.query_key_value(states), module.head_size, 3, 2, *factors)
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
def last_block_at(model: PreTrainedModel, batch: PackedBatch, token_indices: Tensor) -> Iterator[bool]:
    """A forward pass over a packed batch that computes the last hidden states only at some indices [n], in their order:
    [1, n, d]. For other tokens the last block computes keys and values, a sixth of its multiplications. Yields whether
    that is so: not where MANY tokens are requested, and not with adapters on query_key_value, which is one layer."""
    block: Any = (blocks_of(model) or [None])[-1]
    few = 0 < len(token_indices) < MANY * batch.ids.numel()
    if (batch.layout is None or not few or not _supported(model, model.device)
            or block.attention.rotary_ndims < 2 or type(block.attention.query_key_value) is not torch.nn.Linear):
        yield False
        return
    layout, module = batch.layout, block.attention
    queries = query_positions(layout, token_indices)

    def attention(states: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
        """states [1, N, d] -> [1, n, d]"""
        joined, width = module.query_key_value, module.head_size

        def project(some: Tensor, parts: slice) -> Tensor:  # with each head's query, key or value rows
            weight, bias = (None if item is None else item.unflatten(0, (-1, 3, width))[:, parts].flatten(0, 2)
                            for item in (joined.weight, joined.bias))
            assert weight is not None
            return F.linear(some, weight, bias)

        projected = project(states.index_select(1, queries.tokens), slice(1))
        query, = _FusedRope.apply(projected, width, 1, 1, *_rope_factors(*(
            item.index_select(1, queries.tokens) for item in positions)))
        key, value = _FusedRope.apply(project(states, slice(1, 3)), width, 2, 1, *_rope_factors(*positions))
        mixed = attend_packed(query, key, value, layout, module.scaling, _dropout(module), queries)
        return module.dense(mixed.flatten(2).index_select(1, queries.query_of))

    def forward(states: Tensor, *_: Any, **more: Any) -> Tensor:
        mixed = block.post_attention_dropout(attention(block.input_layernorm(states), more["position_embeddings"]))
        residual = states.index_select(1, token_indices)
        before = residual if block.use_parallel_residual else residual + mixed
        return block.post_mlp_dropout(block.mlp(block.post_attention_layernorm(before))) + mixed + residual

    block.forward = forward
    try:
        yield True
    finally:
        del block.forward


def _dropout(module: Any) -> float:
    return module.attention_dropout if module.training else 0.0


def _rope_factors(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """cos, sin [1, N, r], their halves equal -> factors of each of N * r numbers, and of the ones r/2 places after and
    before it, which are then added: [N * r], twice [N * r - r/2]."""
    half = cos.shape[-1] // 2
    first, nothing = sin[..., :half], torch.zeros_like(sin[..., :half])
    later, before = torch.cat([-first, nothing], dim=-1), torch.cat([nothing, first], dim=-1)
    return cos.flatten(), later.flatten()[:-half], before.flatten()[half:]


class _FusedRope(torch.autograd.Function):
    """joined [1, N, heads * parts * w], a head's parts beside each other -> each part's [heads, N, w], with RoPE on the
    first r numbers of the first `rotated` parts (queries and keys)."""

    @staticmethod
    def forward(ctx: Any, joined: Tensor, width: int, parts: int, rotated: int, *factors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*factors)
        ctx.rotated = rotated
        heads = joined[0].unflatten(1, (-1, parts, width)).permute(2, 1, 0, 3).contiguous()
        _apply_rope(heads[:rotated], factors, 1)
        return tuple(heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        heads = torch.stack(gradients)
        _apply_rope(heads[:ctx.rotated], ctx.saved_tensors, -1)
        return heads.permute(2, 1, 0, 3).flatten(1).unsqueeze(0), *[None] * 6


def _apply_rope(states: Tensor, factors: tuple[Tensor, ...], sign: int) -> None:
    """Rotates the first r numbers of states [parts, heads, N, w] in place, or back where sign is -1."""
    cos, later, before = factors
    tokens, half = states.shape[2], len(cos) - len(later)
    part = states[..., :2 * half]
    exact = part.to(torch.promote_types(part.dtype, cos.dtype)).contiguous()
    flat = exact.view(-1, tokens * 2 * half)
    rotated = flat * cos
    rotated[:, :-half].addcmul_(flat[:, half:], later, value=sign)
    rotated[:, half:].addcmul_(flat[:, :-half], before, value=sign)
    part.copy_(rotated.view(part.shape))
