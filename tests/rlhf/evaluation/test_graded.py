"""Bits of right answers and of pretraining text: by hand, paired, the same in any batch."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf.evaluation.graded import bits_metrics
from rlhf.evaluation.lm_eval import TaskScore
from rlhf.evaluation.perplexity import document_bits
from rlhf.model.load import load_policy
from rlhf.model.tokenizer import load_tokenizer, text_ids

ARCHITECTURES = ("gpt2", "llama")


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_document_bits_by_hand(model_folders: dict[str, tuple[Path, Path]], texts: list[str],
                               architecture: str) -> None:
    folder = model_folders[architecture][0]
    model, tokenizer = load_policy(folder).double(), load_tokenizer(folder)
    some = [*texts[:5], " ".join(texts * 30)]  # the last one is longer than the context
    context = model.config.max_position_embeddings
    expected = []
    for ids in text_ids(tokenizer, some):
        row = [tokenizer.eos_token_id, *ids][:context]
        log_probs = model(torch.tensor([row])).logits[0].log_softmax(-1)
        expected.append(-sum(log_probs[place, row[place + 1]].item() for place in range(len(row) - 1))
                        / math.log(2) / (len(row) - 1))
    assert document_bits(folder, some, "fp32") == pytest.approx(expected, rel=1e-4)


def score(bits: list[float]) -> TaskScore:
    return TaskScore("acc", 0.5, 0.1, True, 1.0, 0.25, [], bits)


def test_the_tax_in_bits_is_paired_by_item() -> None:
    rng = np.random.default_rng(3)
    base = rng.exponential(5.0, 400)  # items differ by far more than the models do
    worse = base + rng.normal(0.2, 0.5, 400)
    metrics = bits_metrics({"base": {"t": score(base.tolist()), "u": score([])},
                            "ppo": {"t": score(worse.tolist()), "u": score([])}}, {}, 4000, 1)
    lost, tax = (worse - base).mean(), "answer_bits_tax/ppo"
    assert metrics["answer_bits/ppo/t"] - metrics["answer_bits/base/t"] == pytest.approx(lost)
    assert metrics[f"{tax}/t"] == metrics[f"{tax}/mean"] == pytest.approx(lost)
    half = 1.96 * (worse - base).std() / math.sqrt(400)
    assert metrics[f"{tax}/t_high"] - metrics[f"{tax}/t_low"] == pytest.approx(2 * half, rel=0.1)
    assert not [key for key in metrics if key.endswith("/u")]


def test_documents_that_are_not_the_same_are_not_compared() -> None:
    metrics = bits_metrics({}, {"base": [1.0, 3.0], "ppo": [1.5, 3.5], "other": [1.0]}, 100, 1)
    assert metrics == {"corpus_bits/base": 2.0, "corpus_bits/ppo": 2.5, "corpus_bits/other": 1.0,
                       "corpus_bits_tax/ppo": 0.5, "corpus_bits_tax/ppo_low": 0.5, "corpus_bits_tax/ppo_high": 0.5}
