"""Alignment-tax tasks: choices by mean per-token log-prob, texts by greedy generation cut at the first line break.

Protocol of InstructGPT §4.2 / App. E: temperature 0, the answer ends at the first newline.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.data.batching import length_batches, pad_right
from rlhf.losses import token_log_probs
from rlhf.models import autocast, device, next_token_logits
from rlhf.rollout import Sampling, sample_responses
from rlhf.seeding import generator
from rlhf.tokenizer import newline_ids, text_ids

BATCH = 256
ANSWER_TOKENS = 16


def measure_task(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[dict[str, Any]],
                 precision: str) -> list[float]:
    """1.0 or 0.0 per item. `items`: {"prompt", "choices", "answer"} as in data/tax/<task>.jsonl."""
    if items and items[0]["choices"]:
        return _by_choice(model, tokenizer, items, precision)
    return _by_generation(model, tokenizer, items, precision)


@torch.no_grad()
def _by_choice(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[dict[str, Any]],
               precision: str) -> list[float]:
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
    return [float(values.index(max(values)) == item["answer"]) for values, item in zip(by_item, items, strict=True)]


def _by_generation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[dict[str, Any]],
                   precision: str) -> list[float]:
    stops = tuple({tokenizer.eos_token_id, *newline_ids(tokenizer)})
    sampling = Sampling(ANSWER_TOKENS, stops, tokenizer.pad_token_id, temperature=0.0, precision=precision,
                        batch_size=BATCH)
    answers = sample_responses(model, text_ids(tokenizer, [item["prompt"] for item in items]), sampling,
                               generator(0, "greedy"))
    texts = [tokenizer.decode(answer, skip_special_tokens=True).split("\n")[0].strip() for answer in answers]
    return [float(text == item["answer"].strip()) for text, item in zip(texts, items, strict=True)]
