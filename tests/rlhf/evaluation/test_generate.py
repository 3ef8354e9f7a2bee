"""Answers of the compared models: what the prompted base sees, batch size, scores, KL against a float64 count."""

from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf.evaluation.generate import answer, framed, mean_kl, rm_scores, several, shot_ids
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


def test_neither_batch_size_nor_company_changes_an_answer(folders: tuple[Path, Path], prompt_texts: list[str]) -> None:
    policy, rm = folders
    found = answer(policy, rm, prompt_texts, PARAMS, 3)
    assert len({*found.texts}) > 4
    small = answer(policy, rm, prompt_texts, EvaluateParams(max_new_tokens=10, batch_size=3), 3)
    assert small.texts == found.texts
    assert small.rm_scores == pytest.approx(found.rm_scores, abs=1e-5)
    assert answer(policy, rm, prompt_texts, PARAMS, 4).texts != found.texts


def test_scores_are_those_of_prompt_and_text(folders: tuple[Path, Path], prompt_texts: list[str]) -> None:
    policy, rm = folders
    found = answer(policy, rm, prompt_texts, PARAMS, 3)
    codec, model = PromptCodec(load_tokenizer(rm)), load_scorer(rm)
    for prompt, text, score in zip(prompt_texts, found.texts, found.rm_scores, strict=True):
        sequence = codec.prompts([prompt])[0] + codec.completions([text])[0]
        assert score == pytest.approx(score_sequences(model, [sequence], codec.pad_id, "fp32")[0], abs=1e-5)
    assert rm_scores(rm, prompt_texts, found.texts, "fp32") == found.rm_scores


def test_the_prompted_base_sees_as_many_demonstrations_as_fit(folders: tuple[Path, Path]) -> None:
    codec = PromptCodec(load_tokenizer(folders[0]))
    everything = shot_ids(codec, SHOTS, "", 1000)
    assert codec.tokenizer.decode(everything) == "red.\nblue\nrice?\nfish\n"
    first = shot_ids(codec, SHOTS[:1], "", 1000)
    assert shot_ids(codec, SHOTS, "", len(everything) - 1) == first
    assert shot_ids(codec, SHOTS, "", 0) == []
    form = "an-na wrote: {prompt}\nbe-no wrote:"
    assert codec.tokenizer.decode(shot_ids(codec, SHOTS[:1], form, 1000)) == "an-na wrote: red.\nbe-no wrote: blue\n"
    assert framed(codec, ["red {x}"], form) == text_ids(codec.tokenizer, ["an-na wrote: red {x}\nbe-no wrote:"])


def test_demonstrations_change_what_is_said(folders: tuple[Path, Path], prompt_texts: list[str]) -> None:
    policy, rm = folders
    plain = answer(policy, rm, prompt_texts, PARAMS, 3, ends_at_newline=True)
    prompted = answer(policy, rm, prompt_texts, PARAMS, 3, ends_at_newline=True, shots=SHOTS)
    assert prompted.texts != plain.texts
    assert all("\n" not in text for text in plain.texts + prompted.texts)


def test_several_samples_of_each_prompt(folders: tuple[Path, Path], prompt_texts: list[str]) -> None:
    found = several(folders[0], prompt_texts, 5, PARAMS, 1)
    assert [len(group) for group in found] == [5] * len(prompt_texts)
    assert any(len(set(group)) > 1 for group in found)
    assert found == several(folders[0], prompt_texts, 5, EvaluateParams(max_new_tokens=10, batch_size=7), 1)


@torch.no_grad()
def test_mean_kl(model_folders: dict[str, tuple[Path, Path]], folders: tuple[Path, Path], prompt_texts: list[str]
                 ) -> None:
    policy, rm = folders
    reference = model_folders["llama"][0]
    found = answer(policy, rm, prompt_texts, PARAMS, 3)
    codec = PromptCodec(load_tokenizer(policy))
    models = [load_policy(folder).double() for folder in (policy, reference)]
    total = 0.0
    for prompt, ids in zip(codec.prompts(prompt_texts), found.ids, strict=True):
        tables = [model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1) for model in models]
        total += sum((tables[0][len(prompt) + place - 1, token] - tables[1][len(prompt) + place - 1, token]).item()
                     for place, token in enumerate(ids))
    assert mean_kl(policy, reference, prompt_texts, found, "fp32", 1.0) == pytest.approx(total / 8, abs=1e-4)
    assert mean_kl(policy, policy, prompt_texts, found, "fp32", 1.0) == pytest.approx(0, abs=1e-6)


def test_bootstrap_is_the_normal_interval_of_a_mean() -> None:
    values = np.random.default_rng(1).normal(2, 3, 900)
    mean, low, high = bootstrap(values.tolist(), 4000, 1)
    assert mean == pytest.approx(values.mean())
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 30, rel=0.05)
    assert bootstrap(values.tolist(), 100, 1) == bootstrap(values.tolist(), 100, 1)
