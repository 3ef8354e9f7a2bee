"""A model's pass over texts: hidden states, logits, log-probs and scores, at the places where they are read.

What nobody reads is not computed, and what comes out the same for many tokens is computed once: the last block's MLP
(`last_mlp_at`) and the first block's part before attention (`first_block_by_token`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf import parallel
from rlhf.losses import log_probs_in_parts, token_log_probs
from rlhf.models import autocast
from rlhf.texts import Texts, compiled, rounded

LOGITS_AT_ONCE = 2**26  # places times vocabulary; a loss holds some 12 bytes for each, 0.8 GB


def hidden_states(model: PreTrainedModel, texts: Texts) -> Tensor:
    """Last hidden states of texts whose ids are [B, T]: [B, T, d]."""
    with first_block_by_token(model, texts.ids):
        return model.base_model(input_ids=texts.ids, use_cache=False, **texts.arguments()).last_hidden_state


def next_token_logits(model: PreTrainedModel, ids: Tensor, start: int = 0, positions: Tensor | None = None) -> Tensor:
    """Logits at the positions start .. T-2, which predict ids[:, start+1:]: [B, T-1-start, V]."""
    def logits(model: PreTrainedModel) -> Tensor:
        return model.get_output_embeddings()(hidden_states(model, Texts(ids, positions))[:, start:-1])

    return parallel.compute(logits, model)


def plain_passes(model: PreTrainedModel) -> bool:
    """Whether a pass does what its code says, once: no activations that are made anew backwards, nothing compiled."""
    name = "is_activation_checkpointing"  # older transformers have the other one, newer ones warn of it
    recomputes = model.training and getattr(model, name if hasattr(model, name) else "is_gradient_checkpointing")
    return not recomputes and not compiled(model)


def blocks_of(model: PreTrainedModel) -> nn.ModuleList | None:
    """A transformer's blocks in their order; None where it has no such list."""
    return next((module for module in model.base_model.children() if isinstance(module, nn.ModuleList)), None)


@contextmanager
def first_block_by_token(model: PreTrainedModel, ids: Tensor) -> Iterator[None]:
    """A pass over ids [B, T] whose first block looks at each different token once.

    GPT-NeoX's MLP stands beside attention and its positions come in after queries and keys: all that its first block
    does but attention itself, eleven twelfths of its products, follows from the token alone. Many tokens of a small
    vocabulary are the same. The results are put in every token's place; gradients are added up in float32. Nothing
    changes for other architectures, where fewer than half of the tokens are repeated, and on a GPU, which would have to
    be waited for.
    """
    blocks = blocks_of(model)
    if (model.config.model_type != "gpt_neox" or not model.config.use_parallel_residual or not blocks
            or len(blocks) == 1 or ids.device.type != "cpu" or not plain_passes(model)
            or (model.training and model.base_model.emb_dropout.p > 0)):
        yield
        return
    tokens, places = ids.unique(return_inverse=True)
    tokens = F.pad(tokens, (0, rounded(len(tokens)) - len(tokens)), value=int(tokens[0]))
    if 2 * len(tokens) > ids.numel():
        yield
        return
    block: Any = blocks[0]
    products = (block.attention.query_key_value, block.mlp)
    norms = (block.input_layernorm, block.post_attention_layernorm)
    embeddings = F.embedding(tokens, model.get_input_embeddings().weight)
    for product, norm in zip(products, norms, strict=True):
        def of_tokens(_: Tensor, product: Any = product.forward, norm: Any = norm.forward) -> Tensor:
            return _Spread.apply(product(norm(embeddings)), places)

        product.forward, norm.forward = of_tokens, lambda state: state
    try:
        yield
    finally:
        for module in (*products, *norms):
            del module.forward


class _Spread(torch.autograd.Function):
    """rows [n, d], places [B, T] in 0 .. n-1 -> [B, T, d]. A row's gradients are added up in float32."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.count, ctx.dtype = len(rows), rows.dtype
        return F.embedding(places, rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        exact = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        total = torch.ops.aten.embedding_dense_backward(exact, *ctx.saved_tensors, ctx.count, -1, False)
        return total.to(ctx.dtype), None


@contextmanager
def last_mlp_at(model: PreTrainedModel, places: Tensor) -> Iterator[None]:
    """Passes over ids [B, T] whose last hidden states are read at some places of the flattened ids only.

    Two thirds of a block's work are its MLP, and what the last one makes of other places nobody sees: there the hidden
    states lack it. Nothing changes for an architecture without `mlp` in its blocks.
    """
    blocks = blocks_of(model)
    mlp = getattr(blocks[-1], "mlp", None) if blocks and plain_passes(model) else None
    if mlp is None:
        yield
        return
    whole = mlp.forward

    def at_places(state: Tensor) -> Tensor:
        flat = state.flatten(0, -2)
        found = whole(flat.index_select(0, places))
        return torch.zeros_like(flat, dtype=found.dtype).index_copy(0, places, found).view(state.shape)

    mlp.forward = at_places
    try:
        yield
    finally:
        del mlp.forward


def states_at(model: PreTrainedModel, texts: Texts, places: Tensor) -> Tensor:
    """Last hidden states at some places of the flattened ids: ids [B, T], places [n] in 0 .. B*T-1 -> [n, d]."""
    with last_mlp_at(model, places):
        return hidden_states(model, texts).flatten(0, 1).index_select(0, places)


def read_at(model: PreTrainedModel, head: Callable[[Tensor], Tensor], texts: Texts, places: Tensor) -> Tensor:
    """head(hidden states) at some places of the flattened ids: [n, ...]. On a CPU a round number of them is read."""
    wanted, more = places, rounded(len(places)) - len(places)
    if more and places.device.type == "cpu":  # others, none twice: the last MLP's gradient counts each that it is given
        free = torch.ones(texts.ids.numel(), dtype=torch.bool).index_fill(0, places, False)
        wanted = torch.cat([places, free.nonzero().squeeze(1)[:more]])
    return head(states_at(model, texts, wanted))[:len(places)]


def logits_at(model: PreTrainedModel, texts: Texts, places: Tensor) -> Tensor:
    """Logits at some places of the flattened ids: ids [B, T], places [n] in 0 .. B*T-1 -> [n, V].

    A response's or a completion's tokens are a part of a batch's, and the vocabulary is wide: logits of prompts and
    PADs are not made.
    """
    return parallel.compute(lambda model: read_at(model, model.get_output_embeddings(), texts, places), model)


def log_probs_at(model: PreTrainedModel, texts: Texts, places: Tensor, precision: str) -> Tensor:
    """Log-probs of the tokens after some places of the flattened ids, float32: ids [B, T], places [n] -> [n].

    Many places times a wide vocabulary go through the output layer in parts, so that never more than LOGITS_AT_ONCE
    logits are alive (`rlhf/losses.py:log_probs_in_parts`).
    """
    targets = texts.ids.flatten()[places + 1]

    def log_probs(model: PreTrainedModel) -> Tensor:
        head = model.get_output_embeddings()
        with autocast(precision):
            if len(places) * len(head.weight) > LOGITS_AT_ONCE:
                return log_probs_in_parts(states_at(model, texts, places), head, targets,
                                          max(1, LOGITS_AT_ONCE // len(head.weight)))
            logits = read_at(model, head, texts, places)
        return token_log_probs(logits, targets)

    return parallel.compute(log_probs, model)


def scores_at(model: PreTrainedModel, texts: Texts, places: Tensor) -> Tensor:
    """The scalar head at some places of the flattened ids: ids [B, T], places [n] in 0 .. B*T-1 -> [n], float32."""
    return parallel.compute(lambda model: read_at(model, model.score, texts, places).squeeze(-1).float(), model)
