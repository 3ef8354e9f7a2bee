"""Rows of the output layer that no text asks for: PAD, and the rows beyond the tokenizer's vocabulary.

Nobody trained them, so their logits mean nothing, and one of 0 wins against a model whose logits are all negative
(GPT-2). They have probability 0 everywhere: a bias of the output layer, which every pass adds. The folder says which
they are as `suppress_tokens` of generation_config.json, which transformers' `generate` obeys.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlhf.errors import UserError
from rlhf.training import distributed

NEVER = -1e9  # a logit; finite, so that probability 0 times its logarithm is 0
TINY = 1e-3  # the largest share of its own probability that a sound model gives to such rows


def untrained_ids(tokenizer: PreTrainedTokenizerBase, rows: int) -> list[int]:
    """PAD, and the ids of an output layer of `rows` rows that are no token."""
    tokens = set(tokenizer.get_vocab().values())
    return sorted({tokenizer.pad_token_id, *(index for index in range(rows) if index not in tokens)})


def describe(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop_ids: Iterable[int]) -> None:
    """Sets the model's generation_config to what sampling does here, and masks the rows that nobody trained."""
    rows = model.get_output_embeddings().weight.shape[0]
    stops = sorted(stop_ids)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=stops if len(stops) > 1 else stops[0],
        pad_token_id=tokenizer.pad_token_id, suppress_tokens=untrained_ids(tokenizer, rows))
    mask_untrained(model)


def mask_untrained(model: PreTrainedModel) -> PreTrainedModel:
    """Gives the rows in the model's `suppress_tokens` probability 0, by a bias that is neither trained nor saved."""
    ids = getattr(model.generation_config, "suppress_tokens", None)
    head = model.get_output_embeddings()
    if not ids or head is None:
        return model
    if head.bias is not None and not is_mask(head):  # a bias of its own: it is saved with these entries
        with torch.no_grad():
            whole = distributed.full_tensor(head.bias)
            whole[ids] = NEVER
            head.bias.copy_(distributed.shard_like(whole, head.bias))
        return model
    bias = torch.zeros(head.weight.shape[0], dtype=head.weight.dtype, device=head.weight.device)
    bias[ids] = NEVER
    head.bias = torch.nn.Parameter(bias, requires_grad=False)
    head.masks_untrained = True
    return model


def is_mask(head: torch.nn.Module) -> bool:
    """Whether an output layer's bias is only the mask."""
    return bool(getattr(head, "masks_untrained", False))


@torch.no_grad()
def check_untrained(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> str:
    """A line that names a base model which gives the rows that nobody trained a share of its probability, or "".

    It is measured before they are masked, after the first tokens of the vocabulary.
    """
    ids = [index for index in untrained_ids(tokenizer, model.get_output_embeddings().weight.shape[0])
           if index < model.get_output_embeddings().weight.shape[0]]
    prompts = torch.arange(0, min(256, len(tokenizer)), device=model.device).view(-1, 8 if len(tokenizer) >= 256 else 1)
    share: Tensor = model(prompts).logits[:, -1].float().softmax(dim=-1)[:, ids].sum(dim=-1).mean()
    if float(share) <= TINY:
        return ""
    return (f"{name}: gives {float(share):.1%} of its probability to PAD and to rows that are no token; they get none "
            "from here on")


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raises UserError for a tokenizer with more tokens than the model has embeddings."""
    rows = model.get_input_embeddings().weight.shape[0]
    beyond = sorted(token for token, index in tokenizer.get_vocab().items()
                    if index >= rows and not index == tokenizer.pad_token_id == rows)
    if beyond:
        raise UserError(f"{name}: its tokenizer has {len(tokenizer)} tokens, the model {rows} embeddings "
                        f"({', '.join(beyond[:3])} beyond them): tokenizer and model are not of one kind")
