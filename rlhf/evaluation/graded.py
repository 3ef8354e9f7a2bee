"""The alignment tax in bits: measures without a ceiling, beside the tasks' own scores.

`answer_bits/<model>/<task>`: -log2 p(right answer | prompt), mean over the items. `corpus_bits/<model>`: -log2 p per
token of held-out pretraining text, mean over documents; 2 to the power of it is the perplexity. The tax is the model's
bits minus the base's, on the same items: positive where the model has become worse.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from rlhf.evaluation.lm_eval import TaskScore

Metrics = dict[str, float]


def bits_metrics(tasks: Mapping[str, Mapping[str, TaskScore]], documents: Mapping[str, Sequence[float]],
                 resamples: int, seed: int) -> Metrics:
    """Bits of every model and its tax with 95 % intervals, paired by item.

    `tasks`: model -> task -> score. `documents`: model -> bits per token of each held-out document; may be empty.
    """
    metrics: Metrics = {}
    for name, scores in tasks.items():
        graded = {task: score.bits for task, score in scores.items() if score.bits}
        metrics |= {f"answer_bits/{name}/{task}": float(np.mean(bits)) for task, bits in graded.items()}
        shared = {task: bits for task, bits in graded.items() if len(tasks["base"][task].bits) == len(bits)}
        if name == "base" or not shared:
            continue
        draws = []
        for task, bits in shared.items():
            drawn = paired_draws(bits, tasks["base"][task].bits, resamples, [seed, *task.encode()])
            metrics |= interval(f"answer_bits_tax/{name}/{task}", drawn)
            draws.append(drawn)
        metrics |= interval(f"answer_bits_tax/{name}/mean", np.mean(draws, axis=0))
    for name, per_token in documents.items():
        metrics[f"corpus_bits/{name}"] = float(np.mean(per_token))
        if name != "base" and len(per_token) == len(documents["base"]):  # not with a tokenizer that leaves out others
            metrics |= interval(f"corpus_bits_tax/{name}",
                                paired_draws(per_token, documents["base"], resamples, [seed, *b"corpus"]))
    return metrics


def paired_draws(ours: Sequence[float], base: Sequence[float], resamples: int, seed: Sequence[int]) -> np.ndarray:
    """[mean difference, of each resample of the items...]."""
    difference = np.asarray(ours, dtype=np.float64) - np.asarray(base, dtype=np.float64)
    random = np.random.default_rng(seed)
    drawn = [difference[random.integers(0, len(difference), len(difference))].mean() for _ in range(resamples)]
    return np.array([difference.mean(), *drawn])


def interval(name: str, drawn: np.ndarray) -> Metrics:
    """{name, name_low, name_high} of [value, draws...]."""
    low, high = np.percentile(drawn[1:], [2.5, 97.5])
    return {name: float(drawn[0]), f"{name}_low": float(low), f"{name}_high": float(high)}
