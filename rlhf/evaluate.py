"""Held-out comparison of policies: responses, win rates with bootstrap intervals, KL to a reference."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from rlhf.data.batching import length_batches, pad_right
from rlhf.kl import response_kl
from rlhf.losses import token_log_probs
from rlhf.models import autocast, device, load_policy, load_scorer, next_token_logits
from rlhf.params import EvaluateParams
from rlhf.ppo import response_mask, response_rows
from rlhf.reward_model import score_sequences
from rlhf.rollout import Sampling, sample_responses
from rlhf.seeding import generator
from rlhf.tokenizer import PromptCodec, load_tokenizer, newline_ids


@dataclass(frozen=True)
class Answers:
    """What one model said to the held-out prompts."""

    ids: list[list[int]]
    texts: list[str]
    rm_scores: list[float]


def answer(folder: Path, rm_folder: Path, prompts: Sequence[str], params: EvaluateParams, precision: str, seed: int,
           *, ends_at_newline: bool = False) -> Answers:
    """Samples one response per prompt and scores it with the reward model.

    Every model gets the same random numbers for the same prompt. `ends_at_newline`: for a base model, which was
    never taught to stop: its answer is the rest of the line.
    """
    tokenizer = load_tokenizer(folder)
    codec = PromptCodec(tokenizer)
    stops = (codec.eos_id, *(newline_ids(tokenizer) if ends_at_newline else ()))
    sampling = Sampling(params.max_new_tokens, stops, codec.pad_id, params.temperature, precision, params.batch_size)
    prompt_ids = codec.prompts(list(prompts))
    ids = sample_responses(load_policy(folder), prompt_ids, sampling, generator(seed, "evaluate"))
    texts = [codec.decode(item) for item in ids]
    sequences = [prompt + completion for prompt, completion in zip(prompt_ids, codec.completions(texts), strict=True)]
    scores = score_sequences(load_scorer(rm_folder), sequences, codec.pad_id, precision)
    return Answers(ids, texts, scores)


@torch.no_grad()
def mean_kl(folder: Path, reference: Path, prompts: Sequence[str], answers: Answers, precision: str,
            temperature: float) -> float:
    """Mean over responses of the k1 estimate of KL(policy || reference), nats."""
    codec = PromptCodec(load_tokenizer(folder))
    prompt_ids = codec.prompts(list(prompts))
    models = (load_policy(folder), load_policy(reference))
    total = 0.0
    for rows in length_batches([len(p) + len(r) for p, r in zip(prompt_ids, answers.ids, strict=True)], 256, None):
        some, responses = [prompt_ids[row] for row in rows], [answers.ids[row] for row in rows]
        ids = pad_right([p + r for p, r in zip(some, responses, strict=True)], codec.pad_id).to(device())
        width = max(map(len, responses))
        found = []
        for model in models:
            with autocast(precision):
                logits = next_token_logits(model, ids)
            found.append(response_rows(token_log_probs(logits, ids[:, 1:], temperature), some, width))
        total += response_kl(found[0], found[1], response_mask(responses, width)).sum().item()
    return total / len(prompt_ids)


def bootstrap(values: Sequence[float], resamples: int, seed: int) -> tuple[float, float, float]:
    """(mean, low, high): the mean and its 95 % percentile bootstrap interval over the items."""
    data = np.asarray(values, dtype=np.float64)
    random = np.random.default_rng(seed)
    means = np.array([data[random.integers(0, len(data), len(data))].mean() for _ in range(resamples)])
    low, high = np.percentile(means, [2.5, 97.5])
    return float(data.mean()), float(low), float(high)


def with_interval(name: str, values: Sequence[float], resamples: int, seed: int) -> dict[str, float]:
    """{name, name_low, name_high} of a per-prompt quantity."""
    mean, low, high = bootstrap(values, resamples, seed)
    return {name: mean, f"{name}_low": low, f"{name}_high": high}


def outcomes(preferences: Sequence[int]) -> list[float]:
    """1 for a win, 0.5 for a tie, 0 for a loss."""
    return [(preference + 1) / 2 for preference in preferences]

