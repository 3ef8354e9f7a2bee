"""Forward passes of a model: hidden states, logits, log-probs and scores, computed only at the tokens that are needed.

One of two modules that use rlhf/fast (the other is rlhf/model/sampling.py). With INSTRUCTFLOW_FAST=off each pass is
transformers' own over a padded batch, and computes every position.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.data.packing import PackedBatch, padded_batch
from rlhf.fast import packed_attention
from rlhf.fast.blocks import last_mlp_at, round_up
from rlhf.fast.gpt_neox import first_block_per_unique_token, fused_rope, last_block_at
from rlhf.model.device import autocast
from rlhf.model.log_probs import log_probs_and_entropy, log_probs_in_parts, token_log_probs
from rlhf.training import distributed
from rlhf.training.settings import fast_enabled

LOGITS_AT_ONCE = 2**26  # tokens times vocabulary; a loss holds some 12 bytes for each, 0.8 GB


def prepare(model: PreTrainedModel) -> PreTrainedModel:
    """Lets a model that was just loaded attend to packed batches, where its architecture can."""
    return packed_attention.enable_packed_attention(model) if fast_enabled() else model


def pack(model: PreTrainedModel, sequences: Sequence[Sequence[int]], pad_id: int,
         prompts: Sequence[Sequence[int]] = (), owner: Sequence[int] = ()) -> PackedBatch:
    """Sequences as one batch for the model: packed into a row where it can attend to that, else padded.

    With `prompts` each sequence follows prompts[owner[sequence]], which may be empty.
    """
    if fast_enabled() and packed_attention.can_pack(model):
        return packed_attention.pack(model, sequences, pad_id, prompts, owner)
    return padded_batch(sequences, pad_id, model.device, prompts, owner)


def hidden_states(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """Last hidden states of a batch: ids [B, T] -> [B, T, d]."""
    if not fast_enabled():
        with saved_on_cpu(model):
            return model.base_model(input_ids=batch.ids, use_cache=False, **batch.arguments()).last_hidden_state
    with first_block_per_unique_token(model, batch.ids), fused_rope(model, batch.layout), saved_on_cpu(model):
        return model.base_model(input_ids=batch.ids, use_cache=False, **batch.arguments()).last_hidden_state


def saved_on_cpu(model: PreTrainedModel) -> AbstractContextManager[Any]:
    """A pass that keeps on the CPU what its backward pass needs, where `save_memory` says so; the blocks are
    checkpointed then, and what they keep is their inputs."""
    if not (vars(model).get("keeps_on_cpu") and model.training and torch.is_grad_enabled()):
        return nullcontext()
    return torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available())


def hidden_states_at(model: PreTrainedModel, batch: PackedBatch, token_indices: Tensor, extra: int = 0) -> Tensor:
    """Last hidden states at some indices of the flattened ids: ids [B, T], token_indices [n] in 0 .. B*T-1 -> [n, d].

    `extra`: so many more rows follow, of any tokens: [n + extra, d].
    """
    if not fast_enabled():
        return hidden_states(model, batch).flatten(0, 1).index_select(0, token_indices)
    with last_block_at(model, batch, torch.cat([token_indices, token_indices[-1:].expand(extra)])) as computed:
        if computed:
            return hidden_states(model, batch).squeeze(0)
    if extra:  # tokens that are not requested: the last MLP would count the gradient of one that stands twice twice
        free = torch.ones(batch.ids.numel(), dtype=torch.bool).index_fill(0, token_indices, False)
        token_indices = torch.cat([token_indices, free.nonzero().squeeze(1)[:extra]])
    with last_mlp_at(model, token_indices):
        return hidden_states(model, batch).flatten(0, 1).index_select(0, token_indices)


def head_at(model: PreTrainedModel, head: Callable[[Tensor], Tensor], batch: PackedBatch, token_indices: Tensor
            ) -> Tensor:
    """head(hidden states) at some indices of the flattened ids: [n, ...]. On a CPU a round number of them is computed:
    its backend compiles code for every new shape."""
    count = len(token_indices)
    extra = round_up(count) - count if fast_enabled() and token_indices.device.type == "cpu" else 0
    return head(hidden_states_at(model, batch, token_indices, extra))[:count]


def next_token_logits(model: PreTrainedModel, ids: Tensor, start: int = 0, positions: Tensor | None = None) -> Tensor:
    """Logits at the positions start .. T-2, which predict ids[:, start+1:]: [B, T-1-start, V]."""
    def logits(model: PreTrainedModel) -> Tensor:
        return model.get_output_embeddings()(hidden_states(model, PackedBatch(ids, positions))[:, start:-1])

    return distributed.compute(logits, model)


def logits_at(model: PreTrainedModel, batch: PackedBatch, token_indices: Tensor) -> Tensor:
    """Logits at some indices of the flattened ids: ids [B, T], token_indices [n] in 0 .. B*T-1 -> [n, V].

    The tokens of a response or a completion are a part of a batch's, and the vocabulary is wide: logits of prompts and
    PADs are not computed.
    """
    return distributed.compute(lambda model: head_at(model, model.get_output_embeddings(), batch, token_indices), model)


def log_probs_at(model: PreTrainedModel, batch: PackedBatch, token_indices: Tensor, precision: str,
                 temperature: float = 1.0) -> Tensor:
    """Log-probs of the tokens after some indices of the flattened ids at a temperature, float32: ids [B, T],
    token_indices [n] -> [n].

    Many tokens times a wide vocabulary go through the output layer in parts, so that never more than LOGITS_AT_ONCE
    logits are alive (`rlhf/model/log_probs.py:log_probs_in_parts`).
    """
    return log_probs_and_entropy_at(model, batch, token_indices, precision, temperature, with_entropy=False)[0]


def log_probs_and_entropy_at(model: PreTrainedModel, batch: PackedBatch, token_indices: Tensor, precision: str,
                             temperature: float = 1.0, with_entropy: bool = True) -> tuple[Tensor, Tensor]:
    """As `log_probs_at`, and the entropies of the distributions that the tokens are drawn from, nats, without gradient:
    [n] each."""
    targets = batch.ids.flatten()[token_indices + 1]

    def computed(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
        head = model.get_output_embeddings()
        with autocast(precision):
            if len(token_indices) * len(head.weight) > LOGITS_AT_ONCE:
                return log_probs_in_parts(hidden_states_at(model, batch, token_indices), head, targets,
                                          max(1, LOGITS_AT_ONCE // len(head.weight)), temperature, with_entropy)
            logits = head_at(model, head, batch, token_indices)
        return log_probs_and_entropy(logits, targets, temperature, with_entropy)

    return distributed.compute(computed, model)


def next_token_log_probs(model: PreTrainedModel, ids: Tensor, precision: str, positions: Tensor | None = None
                         ) -> Tensor:
    """Log-probs of every token after the first of packed rows, float32: ids [B, T] -> [B, T-1]; in parts as above."""
    def log_probs(model: PreTrainedModel) -> Tensor:
        head = model.get_output_embeddings()
        with autocast(precision):
            states = hidden_states(model, PackedBatch(ids, positions))[:, :-1]
            if ids[:, 1:].numel() * len(head.weight) > LOGITS_AT_ONCE:
                return log_probs_in_parts(states.flatten(0, 1), head, ids[:, 1:].flatten(),
                                          max(1, LOGITS_AT_ONCE // len(head.weight)))[0].view_as(ids[:, 1:])
            logits = head(states)
        return token_log_probs(logits, ids[:, 1:])

    return distributed.compute(log_probs, model)


def scores_at(model: PreTrainedModel, batch: PackedBatch, token_indices: Tensor) -> Tensor:
    """The scalar head at some indices of the flattened ids: token_indices [n] in 0 .. B*T-1 -> [n], float32."""
    return distributed.compute(
        lambda model: head_at(model, model.score, batch, token_indices).squeeze(-1).float(), model)
