"""Sampling: the distribution of `pick`, independence of batches, padding and neighbours, stops, greedy decoding."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache, PreTrainedTokenizerFast

import rlhf.model.sampling
from rlhf.fast.decoder import Decoder, KVCache
from rlhf.model.load import load_policy
from rlhf.model.sampling import Sampling, pick, sample_responses
from rlhf.ppo.trainer import Trainer
from tests.rlhf.conftest import needs_fast

LAST = 1 - 2**-24  # the largest uniform that torch.rand returns


def noise(seed: int = 11) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def policy(policy_folder: Path) -> Any:
    return load_policy(policy_folder)


@pytest.fixture
def prompts(prompt_texts: list[str], tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    return [tokenizer(text)["input_ids"] for text in prompt_texts]


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_pick_draws_from_the_softmax(temperature: float) -> None:
    logits = np.array([0.3, -2.0, 1.7, 0.0, -np.inf, 2.2])
    shares = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    count = 60_000
    tokens = pick(torch.tensor(logits, dtype=torch.float32).expand(count, -1), torch.rand(count, generator=noise()),
                  temperature)
    found = np.bincount(tokens.numpy(), minlength=6)
    assert found[4] == 0
    expected = np.delete(shares * count, 4)
    assert ((np.delete(found, 4) - expected) ** 2 / expected).sum() < 18.5  # 0.1 % of chi-square with 4 degrees


def test_pick_is_the_inverse_of_the_cumulative_distribution() -> None:
    logits = torch.log(torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0]))
    uniforms = torch.tensor([0.0, 0.2499, 0.2501, 0.7499, 0.7501, LAST])
    assert pick(logits.expand(6, -1), uniforms, 1.0).tolist() == [1, 1, 3, 3, 4, 4]  # never one of probability 0


def test_pick_at_the_ends_of_a_large_vocabulary() -> None:
    logits = torch.randn(50_000, generator=noise()).expand(2, -1)  # float32 probabilities would not add up to 1
    assert pick(logits, torch.tensor([0.0, LAST]), 1.0).tolist() == [0, 49_999]


def test_temperature_zero_is_the_best_token() -> None:
    logits = torch.randn(20, 30, generator=noise())
    best = [max(range(30), key=row.__getitem__) for row in logits.tolist()]
    assert pick(logits, torch.rand(20), 0.0).tolist() == best


def stops_for(tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Every twelfth token ends a response, so that rows end at different times."""
    return tuple(range(1, len(tokenizer), 12))


def test_neither_batch_size_nor_order_matters(policy: Any, prompts: list[list[int]],
                                              tokenizer: PreTrainedTokenizerFast) -> None:
    def sample(rows: list[list[int]], batch_size: int, **changes: Any) -> list[list[int]]:
        options = {"max_new_tokens": 20, "stop_ids": stops_for(tokenizer), "pad_id": tokenizer.pad_token_id}
        return sample_responses(policy, rows, Sampling(**options, batch_size=batch_size, **changes), noise())

    alone = sample(prompts, 1)
    assert len({len(response) for response in alone}) > 3
    for batch_size in (2, 3, 8):
        assert sample(prompts, batch_size) == alone
    # The numbers belong to the place in the list: with the same numbers in every row, order must not matter either.
    uniforms = torch.rand(20, generator=noise()).expand(len(prompts), -1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda *shape, generator: uniforms)
        forward = sample(prompts, 3)
        backward = sample(prompts[::-1], 5)
    assert backward[::-1] == forward
    assert forward != alone


@pytest.mark.parametrize("own_pass", [False, True])
def test_rows_that_leave_do_not_disturb_the_others(policy: Any, prompts: list[list[int]],
                                                   tokenizer: PreTrainedTokenizerFast, own_pass: bool,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = Sampling(20, stops_for(tokenizer), tokenizer.pad_token_id, batch_size=8)
    cuts: list[int] = []

    def watch(kind: type, name: str) -> None:
        select = getattr(kind, name)

        def watched(cache: Any, keep: torch.Tensor) -> None:
            cuts.append(len(keep))
            select(cache, keep)

        monkeypatch.setattr(kind, name, watched)

    watch(DynamicCache, "batch_select_indices")
    watch(KVCache, "keep")
    if own_pass:
        monkeypatch.setattr(rlhf.model.sampling, "decoder_for", lambda *arguments: None)
    usual = sample_responses(policy, prompts, sampling, noise())
    assert cuts  # the batch was cut to its unfinished rows
    monkeypatch.setattr(rlhf.model.sampling, "SHRINK_AT", 0.0)
    cuts.clear()
    assert sample_responses(policy, prompts, sampling, noise()) == usual
    assert not cuts
    monkeypatch.setattr(rlhf.model.sampling, "SHRINK_AT", 1.0)
    assert sample_responses(policy, prompts, sampling, noise()) == usual
    assert len(cuts) > 3


@needs_fast
def test_the_decoder_samples_what_the_models_own_pass_does(policy: Any, prompts: list[list[int]],
                                                           tokenizer: PreTrainedTokenizerFast,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    many = [prompts[index % len(prompts)] for index in range(40)]
    sampling = Sampling(20, stops_for(tokenizer), tokenizer.pad_token_id, batch_size=7)
    reads: list[int] = []
    read = rlhf.model.sampling._ContinuousBatch._prefill

    def watched(rows: Any, chosen: list[int], free: torch.Tensor) -> None:
        reads.append(len(chosen))
        read(rows, chosen, free)

    monkeypatch.setattr(rlhf.model.sampling._ContinuousBatch, "_prefill", watched)
    found = sample_responses(policy, many, sampling, noise())
    assert sum(reads) == 40
    assert len(reads) > 8  # rows that were free took new prompts in
    monkeypatch.setattr(rlhf.model.sampling, "decoder_for", lambda *arguments: None)
    assert sample_responses(policy, many, sampling, noise()) == found


@needs_fast
def test_a_prompt_that_stands_several_times_is_read_once(policy: Any, prompts: list[list[int]],
                                                         tokenizer: PreTrainedTokenizerFast,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    many = [prompt for prompt in prompts for _ in range(4)]
    sampling = Sampling(12, stops_for(tokenizer), tokenizer.pad_token_id)
    passes: list[int] = []
    hidden = Decoder.hidden

    def watched(decoder: Decoder, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        passes.append(len(ids))
        return hidden(decoder, ids, *rest)

    monkeypatch.setattr(Decoder, "hidden", watched)
    found = sample_responses(policy, many, sampling, noise())
    assert passes[0] == len({tuple(prompt) for prompt in prompts}) < len(many)
    monkeypatch.setattr(rlhf.model.sampling, "decoder_for", lambda *arguments: None)
    assert sample_responses(policy, many, sampling, noise()) == found


def test_stops_and_length(policy: Any, prompts: list[list[int]], tokenizer: PreTrainedTokenizerFast) -> None:
    stops = stops_for(tokenizer)
    ended = 0
    for longest in (1, 5, 20):
        sampling = Sampling(longest, stops, tokenizer.pad_token_id)
        for response in sample_responses(policy, prompts, sampling, noise()):
            assert 1 <= len(response) <= longest
            assert not set(response[:-1]) & set(stops)  # the stop token is the last, and kept
            assert response[-1] in stops or len(response) == longest
            ended += response[-1] in stops
    assert ended > 8


def test_a_longer_limit_only_adds_tokens(policy: Any, prompts: list[list[int]],
                                         tokenizer: PreTrainedTokenizerFast) -> None:
    uniforms = torch.rand(len(prompts), 20, generator=noise())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda rows, length, generator: uniforms[:, :length])
        short, long = (sample_responses(policy, prompts, Sampling(length, stops_for(tokenizer),
                                                                  tokenizer.pad_token_id), noise())
                       for length in (6, 20))
    assert [response[:6] for response in long] == short


def test_greedy_is_what_transformers_generates(policy: Any, prompts: list[list[int]],
                                               tokenizer: PreTrainedTokenizerFast) -> None:
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    prompts = [*prompts, *([start, start + 5, start + 9] for start in range(20, 240, 20))]
    found = sample_responses(policy, prompts, Sampling(24, (eos,), pad, temperature=0.0), noise())
    for prompt, response in zip(prompts, found, strict=True):
        expected = policy.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)),
                                   do_sample=False, max_new_tokens=24, eos_token_id=eos, pad_token_id=pad)
        assert prompt + response == expected[0].tolist()
    assert len({tuple(response) for response in found}) > 4  # the prompts were read


def test_every_prompt_gets_its_own_numbers(policy: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    sampling = Sampling(16, (tokenizer.eos_token_id,), tokenizer.pad_token_id)
    same = sample_responses(policy, [[5, 6, 7]] * 6, sampling, noise())
    assert len({tuple(response) for response in same}) == 6
    assert same == sample_responses(policy, [[5, 6, 7]] * 6, sampling, noise())
    assert same != sample_responses(policy, [[5, 6, 7]] * 6, sampling, noise(12))


def test_log_probs_of_samples_are_those_of_a_plain_pass(make_trainer: Callable[..., Trainer], architecture: str,
                                                        prompts: list[list[int]]) -> None:
    trainer = make_trainer(architecture, temperature=0.6)
    responses = sample_responses(trainer.models.policy, prompts, trainer.sampler.sampling, noise())
    with torch.no_grad():
        found = trainer.models.log_probs(trainer.models.policy, prompts, responses, 8)
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            logits = trainer.models.policy(torch.tensor([prompt + response])).logits[0].double().numpy() / 0.6
            for place, token in enumerate(response):
                scaled = logits[len(prompt) + place - 1]
                expected = scaled[token] - np.log(np.exp(scaled).sum())
                assert found[row, place].item() == pytest.approx(expected, abs=2e-5)
