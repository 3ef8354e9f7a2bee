"""Which of several continuations a model finds likeliest, by mean log-prob per token [InstructGPT App. E].

The base model's knowledge is asked for with it (`pretrain/fact_accuracy`); benchmarks go through `rlhf.evaluation.lm_eval`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.data.batching import length_batches, pad_right
from rlhf.model.device import autocast, device
from rlhf.model.forward import next_token_logits
from rlhf.model.log_probs import token_log_probs
from rlhf.model.tokenizer import text_ids

BATCH = 256


@torch.no_grad()
def choose(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[dict[str, Any]],
           precision: str) -> list[int]:
    """The index of the choice taken for each item {"prompt", "choices"}; the first one of equals."""
    prompts = text_ids(tokenizer, [item["prompt"] for item in items])
    sequences, starts, owners = [], [], []
    for number, (item, prompt) in enumerate(zip(items, prompts, strict=True)):
        for choice in text_ids(tokenizer, item["choices"]):
            sequences.append(prompt + choice)
            starts.append(len(prompt))
            owners.append(number)
    means = [0.0] * len(sequences)
    for indices in length_batches([len(item) for item in sequences], BATCH, None):
        ids = pad_right([sequences[index] for index in indices], tokenizer.pad_token_id).to(device())
        with autocast(precision):
            logits = next_token_logits(model, ids)
        log_probs = token_log_probs(logits, ids[:, 1:])
        for row, index in enumerate(indices):
            means[index] = log_probs[row, starts[index] - 1:len(sequences[index]) - 1].mean().item()
    by_item: list[list[float]] = [[] for _ in items]
    for owner, value in zip(owners, means, strict=True):
        by_item[owner].append(value)
    return [values.index(max(values)) for values in by_item]
