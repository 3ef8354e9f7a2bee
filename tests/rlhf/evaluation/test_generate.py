"""Answers of the compared models: few-shot prompts, batch size, scores, KL against a float64 count."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf.evaluation.generate import answer, few_shot_ids, format_prompts, kl_to_reference, rm_scores, sample_several
from rlhf.evaluation.statistics import bootstrap
from rlhf.model.chat_format import PromptCodec
from rlhf.model.load import load_policy, load_scorer
from rlhf.model.scoring import score_sequences
from rlhf.model.tokenizer import load_tokenizer, text_ids
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
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_kl_to_the_reference_by_hand(model_folders: dict[str, tuple[Path, Path]], folders: tuple[Path, Path],
                                     prompt_texts: list[str], temperature: float) -> None:
    policy, rm = folders
    reference = model_folders["llama"][0]
    answers = answer(policy, rm, prompt_texts, PARAMS, 3)
    codec = PromptCodec(load_tokenizer(policy))
    models = [load_policy(folder).double() for folder in (policy, reference)]
    exact, k1, k3 = [], [], []
    for prompt, ids in zip(codec.prompts(prompt_texts), answers.ids, strict=True):
        ours, theirs = ((model(torch.tensor([prompt + ids])).logits[0] / temperature).log_softmax(-1)
                        for model in models)
        places = range(len(prompt) - 1, len(prompt) + len(ids) - 1)
        ratios = [(theirs[place, token] - ours[place, token]).item() for place, token in zip(places, ids, strict=True)]
        k1.append(-sum(ratios))
        k3.append(sum(math.exp(ratio) - 1 - ratio for ratio in ratios))
        exact.append(sum((ours[place].exp() * (ours[place] - theirs[place])).sum().item() for place in places))
    found = kl_to_reference(policy, reference, prompt_texts, answers, "fp32", temperature)
    assert found.k1 == pytest.approx(k1, abs=1e-4)
    assert found.k3 == pytest.approx(k3, rel=1e-3, abs=1e-4)
    assert found.exact == pytest.approx(exact, rel=1e-3, abs=1e-4)
    same = kl_to_reference(policy, policy, prompt_texts, answers, "fp32", temperature)
    assert same.exact == same.k1 == pytest.approx([0] * 8, abs=1e-6)
    assert min(same.exact) >= 0


def test_bootstrap_is_the_normal_interval_of_a_mean() -> None:
    values = np.random.default_rng(1).normal(2, 3, 900)
    mean, low, high = bootstrap(values.tolist(), 4000, 1)
    assert mean == pytest.approx(values.mean())
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 30, rel=0.05)
    assert bootstrap(values.tolist(), 100, 1) == bootstrap(values.tolist(), 100, 1)
