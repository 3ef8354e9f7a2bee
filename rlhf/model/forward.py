"""A model's pass over texts: hidden states, logits, log-probs and scores, at the places where they are read.

What nobody reads is not computed: the last block's MLP (`last_mlp_at`). Of GPT-NeoX more is left out (rlhf/fast/gpt_neox.py).
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.fast.blocks import last_mlp_at, round_up
from rlhf.fast.gpt_neox import first_block_per_unique_token, fused_rope, last_block_at
from rlhf.fast.packed_attention import PackedBatch
from rlhf.model.device import autocast
from rlhf.model.log_probs import log_probs_in_parts, token_log_probs
from rlhf.training import distributed

LOGITS_AT_ONCE = 2**26  # places times vocabulary; a loss holds some 12 bytes for each, 0.8 GB


def hidden_states(model: PreTrainedModel, texts: PackedBatch) -> Tensor:
    """Last hidden states of texts whose ids are [B, T]: [B, T, d]."""
    with first_block_per_unique_token(model, texts.ids), fused_rope(model, texts.layout):
        return model.base_model(input_ids=texts.ids, use_cache=False, **texts.arguments()).last_hidden_state


def next_token_logits(model: PreTrainedModel, ids: Tensor, start: int = 0, positions: Tensor | None = None) -> Tensor:
    """Logits at the positions start .. T-2, which predict ids[:, start+1:]: [B, T-1-start, V]."""
    def logits(model: PreTrainedModel) -> Tensor:
        return model.get_output_embeddings()(hidden_states(model, PackedBatch(ids, positions))[:, start:-1])

    return distributed.compute(logits, model)




def states_at(model: PreTrainedModel, texts: PackedBatch, token_indices: Tensor, more: int = 0) -> Tensor:
    """Last hidden states at some places of the flattened ids, and `more` behind them that mean nothing: ids [B, T],
    places [n] in 0 .. B*T-1 -> [n + more, d]."""
    with last_block_at(model, texts, torch.cat([token_indices, token_indices[-1:].expand(more)])) as alone:
        if alone:
            return hidden_states(model, texts).squeeze(0)
    if more:  # none twice: the last MLP's gradient counts each that it is given
        free = torch.ones(texts.ids.numel(), dtype=torch.bool).index_fill(0, token_indices, False)
        token_indices = torch.cat([token_indices, free.nonzero().squeeze(1)[:more]])
    with last_mlp_at(model, token_indices):
        return hidden_states(model, texts).flatten(0, 1).index_select(0, token_indices)


def read_at(model: PreTrainedModel, head: Callable[[Tensor], Tensor], texts: PackedBatch, token_indices: Tensor) -> Tensor:
    """head(hidden states) at some places of the flattened ids: [n, ...]. On a CPU a round number of them is read."""
    more = round_up(len(token_indices)) - len(token_indices) if token_indices.device.type == "cpu" else 0
    return head(states_at(model, texts, token_indices, more))[:len(token_indices)]


def logits_at(model: PreTrainedModel, texts: PackedBatch, token_indices: Tensor) -> Tensor:
    """Logits at some places of the flattened ids: ids [B, T], places [n] in 0 .. B*T-1 -> [n, V].

    A response's or a completion's tokens are a part of a batch's, and the vocabulary is wide: logits of prompts and
    PADs are not made.
    """
    return distributed.compute(lambda model: read_at(model, model.get_output_embeddings(), texts, token_indices), model)


def log_probs_at(model: PreTrainedModel, texts: PackedBatch, token_indices: Tensor, precision: str) -> Tensor:
    """Log-probs of the tokens after some places of the flattened ids, float32: ids [B, T], places [n] -> [n].

    Many places times a wide vocabulary go through the output layer in parts, so that never more than LOGITS_AT_ONCE
    logits are alive (`rlhf/losses.py:log_probs_in_parts`).
    """
    targets = texts.ids.flatten()[token_indices + 1]

    def log_probs(model: PreTrainedModel) -> Tensor:
        head = model.get_output_embeddings()
        with autocast(precision):
            if len(token_indices) * len(head.weight) > LOGITS_AT_ONCE:
                return log_probs_in_parts(states_at(model, texts, token_indices), head, targets,
                                          max(1, LOGITS_AT_ONCE // len(head.weight)))
            logits = read_at(model, head, texts, token_indices)
        return token_log_probs(logits, targets)

    return distributed.compute(log_probs, model)


def scores_at(model: PreTrainedModel, texts: PackedBatch, token_indices: Tensor) -> Tensor:
    """The scalar head at some places of the flattened ids: ids [B, T], places [n] in 0 .. B*T-1 -> [n], float32."""
    return distributed.compute(lambda model: read_at(model, model.score, texts, token_indices).squeeze(-1).float(), model)
