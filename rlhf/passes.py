"""A model's pass over texts: hidden states, logits, log-probs and scores, at the places where they are read.

What nobody reads is not computed: the last block's MLP (`last_mlp_at`). Of GPT-NeoX more is left out (rlhf/neox.py).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf import parallel
from rlhf.losses import log_probs_in_parts, token_log_probs
from rlhf.models import autocast, blocks_of, plain_passes
from rlhf.neox import first_block_by_token, last_block_at, turned_together
from rlhf.texts import Texts, rounded

LOGITS_AT_ONCE = 2**26  # places times vocabulary; a loss holds some 12 bytes for each, 0.8 GB


def hidden_states(model: PreTrainedModel, texts: Texts) -> Tensor:
    """Last hidden states of texts whose ids are [B, T]: [B, T, d]."""
    with first_block_by_token(model, texts.ids), turned_together(model, texts.groups):
        return model.base_model(input_ids=texts.ids, use_cache=False, **texts.arguments()).last_hidden_state


def next_token_logits(model: PreTrainedModel, ids: Tensor, start: int = 0, positions: Tensor | None = None) -> Tensor:
    """Logits at the positions start .. T-2, which predict ids[:, start+1:]: [B, T-1-start, V]."""
    def logits(model: PreTrainedModel) -> Tensor:
        return model.get_output_embeddings()(hidden_states(model, Texts(ids, positions))[:, start:-1])

    return parallel.compute(logits, model)


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


def states_at(model: PreTrainedModel, texts: Texts, places: Tensor, more: int = 0) -> Tensor:
    """Last hidden states at some places of the flattened ids, and `more` behind them that mean nothing: ids [B, T],
    places [n] in 0 .. B*T-1 -> [n + more, d]."""
    with last_block_at(model, texts, torch.cat([places, places[-1:].expand(more)])) as alone:
        if alone:
            return hidden_states(model, texts).squeeze(0)
    if more:  # none twice: the last MLP's gradient counts each that it is given
        free = torch.ones(texts.ids.numel(), dtype=torch.bool).index_fill(0, places, False)
        places = torch.cat([places, free.nonzero().squeeze(1)[:more]])
    with last_mlp_at(model, places):
        return hidden_states(model, texts).flatten(0, 1).index_select(0, places)


def read_at(model: PreTrainedModel, head: Callable[[Tensor], Tensor], texts: Texts, places: Tensor) -> Tensor:
    """head(hidden states) at some places of the flattened ids: [n, ...]. On a CPU a round number of them is read."""
    more = rounded(len(places)) - len(places) if places.device.type == "cpu" else 0
    return head(states_at(model, texts, places, more))[:len(places)]


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
