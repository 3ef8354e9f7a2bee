"""Multiple choice: the continuation with the highest mean log-prob per token [InstructGPT App. E].

Measures the base model's knowledge (`pretrain/fact_accuracy`); benchmarks use `rlhf.evaluation.lm_eval`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.data.batching import length_batches, pad_right
from rlhf.model.device import autocast, device
from rlhf.model.forward import next_token_logits
from rlhf.model.log_probs import token_log_probs
from rlhf.model.tokenizer import text_ids

BATCH = 256


@torch.no_grad()
def continuation_log_probs(model: PreTrainedModel, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int,
                           precision: str, batch_size: int) -> list[Tensor]:
    """The log-probs of each continuation's tokens, for pairs of (prompt ids, continuation ids), nats."""
    sequences = [[*prompt, *continuation] for prompt, continuation in pairs]
    log_probs: list[Tensor] = [torch.empty(0)] * len(sequences)
    for indices in length_batches([len(item) for item in sequences], batch_size, None):
        ids = pad_right([sequences[index] for index in indices], pad_id).to(device())
        with autocast(precision):
            logits = next_token_logits(model, ids)
        for index, row in zip(indices, token_log_probs(logits, ids[:, 1:]), strict=True):
            log_probs[index] = row[len(pairs[index][0]) - 1:len(sequences[index]) - 1]
    return log_probs


def choose(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[dict[str, Any]],
           precision: str) -> list[int]:
    """The index of the likeliest choice of each item {"prompt", "choices"}; the first one in case of a tie."""
    prompts = text_ids(tokenizer, [item["prompt"] for item in items])
    pairs = [(prompt, choice) for item, prompt in zip(items, prompts, strict=True)
             for choice in text_ids(tokenizer, item["choices"])]
    means = iter([item.mean().item() for item in
                  continuation_log_probs(model, pairs, tokenizer.pad_token_id, precision, BATCH)])
    by_item = [[next(means) for _ in item["choices"]] for item in items]
    return [values.index(max(values)) for values in by_item]
