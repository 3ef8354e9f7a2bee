"""Answers of the compared models: few-shot prompts, batch size, scores, KL against a float64 count."""

from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf.evaluation.generate import answer, few_shot_ids, format_prompts, mean_kl, rm_scores, sample_several
from rlhf.evaluation.statistics import bootstrap
from rlhf.model.load import load_policy, load_scorer
from rlhf.model.scoring import score_sequences
from rlhf.model.tokenizer import PromptCodec, load_tokenizer, text_ids
from rlhf.params import EvaluateParams

PARAMS = EvaluateParams(max_new_tokens=10)
SHOTS = [{"prompt": "red.", "completion": "blue"}, {"prompt": "rice?", "completion": "fish"}]


@pytest.fixture
def folders(model_folders: dict[str, tuple[Path, Path]]) -> tuple[Path, Path]:
    return model_folders["gpt2"]


def test_an_answer_does_not_depend_on_the_batch_size(folders: tuple[Path, Path], prompt_texts: list[str]) -> None:
    policy, rm = folders
    answers = answer(policy, rm, prompt_texts, PARAMS, 3)
    assert len({*answers.texts}) > 4
    small = answer(policy, rm, prompt_texts, EvaluateParams(max_new_tokens=10, batch_size=3), 3)
    assert small.texts == answers.texts
    assert small.rm_scores == pytest.approx(answers.rm_scores, abs=1e-5)
    assert answer(policy, rm, prompt_texts, PARAMS, 4).texts != answers.texts


def test_scores_are_those_of_prompt_and_text(folders: tuple[Path, Path], prompt_texts: list[str]) -> None:
    policy, rm = folders
    answers = answer(policy, rm, prompt_texts, PARAMS, 3)
    codec, model = PromptCodec(load_tokenizer(rm)), load_scorer(rm)
    for prompt, text, score in zip(prompt_texts, answers.texts, answers.rm_scores, strict=True):
        sequence = codec.prompts([prompt])[0] + codec.completions([text])[0]
        assert score == pytest.approx(score_sequences(model, [sequence], codec.pad_id, "fp32")[0], abs=1e-5)
    assert rm_scores(rm, prompt_texts, answers.texts, "fp32") == answers.rm_scores


def test_the_few_shot_prompt_has_as_many_demonstrations_as_fit(folders: tuple[Path, Path]) -> None:
    codec = PromptCodec(load_tokenizer(folders[0]))
    everything = few_shot_ids(codec, SHOTS, "", 1000)
    assert codec.tokenizer.decode(everything) == "red.\nblue\nrice?\nfish\n"
    first = few_shot_ids(codec, SHOTS[:1], "", 1000)
    assert few_shot_ids(codec, SHOTS, "", len(everything) - 1) == first
    assert few_shot_ids(codec, SHOTS, "", 0) == []
    form = "an-na wrote: {prompt}\nbe-no wrote:"
    shown = few_shot_ids(codec, SHOTS[:1], form, 1000)
    assert codec.tokenizer.decode(shown) == "an-na wrote: red.\nbe-no wrote: blue\n"
    expected = text_ids(codec.tokenizer, ["an-na wrote: red {x}\nbe-no wrote:"])
    assert format_prompts(codec, ["red {x}"], form) == expected


def test_demonstrations_change_the_answers(folders: tuple[Path, Path], prompt_texts: list[str]) -> None:
    policy, rm = folders
    plain = answer(policy, rm, prompt_texts, PARAMS, 3, ends_at_newline=True)
    prompted = answer(policy, rm, prompt_texts, PARAMS, 3, ends_at_newline=True, shots=SHOTS)
    assert prompted.texts != plain.texts
    assert all("\n" not in text for text in plain.texts + prompted.texts)


def test_several_samples_of_each_prompt(folders: tuple[Path, Path], prompt_texts: list[str]) -> None:
    samples = sample_several(folders[0], prompt_texts, 5, PARAMS, 1)
    assert [len(group) for group in samples] == [5] * len(prompt_texts)
    assert any(len(set(group)) > 1 for group in samples)
    other_batches = EvaluateParams(max_new_tokens=10, batch_size=7)
    assert samples == sample_several(folders[0], prompt_texts, 5, other_batches, 1)


@torch.no_grad()
def test_mean_kl(model_folders: dict[str, tuple[Path, Path]], folders: tuple[Path, Path], prompt_texts: list[str]
                 ) -> None:
    policy, rm = folders
    reference = model_folders["llama"][0]
    answers = answer(policy, rm, prompt_texts, PARAMS, 3)
    codec = PromptCodec(load_tokenizer(policy))
    models = [load_policy(folder).double() for folder in (policy, reference)]
    total = 0.0
    for prompt, ids in zip(codec.prompts(prompt_texts), answers.ids, strict=True):
        tables = [model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1) for model in models]
        total += sum((tables[0][len(prompt) + place - 1, token] - tables[1][len(prompt) + place - 1, token]).item()
                     for place, token in enumerate(ids))
    assert mean_kl(policy, reference, prompt_texts, answers, "fp32", 1.0) == pytest.approx(total / 8, abs=1e-4)
    assert mean_kl(policy, policy, prompt_texts, answers, "fp32", 1.0) == pytest.approx(0, abs=1e-6)


def test_bootstrap_is_the_normal_interval_of_a_mean() -> None:
    values = np.random.default_rng(1).normal(2, 3, 900)
    mean, low, high = bootstrap(values.tolist(), 4000, 1)
    assert mean == pytest.approx(values.mean())
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 30, rel=0.05)
    assert bootstrap(values.tolist(), 100, 1) == bootstrap(values.tolist(), 100, 1)
