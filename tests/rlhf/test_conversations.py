"""Conversations through everything that trains or measures: the models get their messages, never a transcript."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf.errors import UserError
from rlhf.evaluation.generate import answer, format_prompts, kl_to_reference
from rlhf.evaluation.held_out import HeldOut
from rlhf.evaluation.metrics import safety_metrics
from rlhf.evaluation.preference import QUESTION, compare_all, model_judge, reward_judge
from rlhf.model.chat_format import PromptCodec, load_codec
from rlhf.model.tokenizer import text_ids
from rlhf.params import EvaluateParams, PpoParams, RmParams, SftParams
from rlhf.ppo.run import encode_prompts, train_ppo
from rlhf.reward_model import Rankings, train_reward_model
from rlhf.sft import Demonstrations, sft
from rlhf.training.journal import read_journal


def conversation(word: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": "blue or red."}, {"role": "user", "content": f"{word} one?"},
            {"role": "assistant", "content": f"{word}."}, {"role": "user", "content": "and two?"}]


WORDS = ("rice", "fish", "green", "red")
PROMPTS: list[Any] = [prompt for word in WORDS for prompt in (conversation(word), f"{word}?")]
ONE: dict[str, Any] = {"processes": 1, "precision": "fp32"}


@pytest.fixture
def transcripts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What becomes token ids: no conversation may be there as a transcript."""
    seen: list[str] = []
    real = PromptCodec._ids

    def watched(self: PromptCodec, texts: list[str]) -> list[list[int]]:
        seen.extend(text for text in texts if "Human:" in text or "'role'" in text)
        return real(self, texts)

    monkeypatch.setattr(PromptCodec, "_ids", watched)
    return seen


def test_every_stage_reads_conversations(longer_llama: Path, tmp_path: Path, ppo_params: Callable[..., PpoParams],
                                         transcripts: list[str]) -> None:
    base = longer_llama
    rows = [{"prompt": prompt, "completion": f"{number} blue", "completions": ["blue", "red", "fish"],
             "ranks": [1, 2, 2], "split": split, "labeler_id": "ann", "prompt_id": f"{number}{split}",
             "use_case": "chat"} for split in ("train", "valid") for number, prompt in enumerate(PROMPTS)]
    valid = [row for row in rows if row["split"] == "valid"]
    sft(SftParams(**ONE, epochs=1, batch_size=4, pretrain_mix=0, train_on="all_answers"), rows, base, 1,
        tmp_path / "sft")
    policy = tmp_path / "sft" / "model"
    train_reward_model(RmParams(**ONE, batch_size=4), rows, valid, policy, 1, tmp_path / "rm")
    reward = tmp_path / "rm" / "model"
    train_ppo(ppo_params(episodes=16), PROMPTS, policy, reward, 1, tmp_path / "ppo")
    assert len(read_journal(tmp_path / "ppo" / "journal.csv")) == 2
    params, trained = EvaluateParams(max_new_tokens=6, prompts=8), tmp_path / "ppo" / "model"
    found = {name: answer(folder, reward, PROMPTS, params, 1) for name, folder in (("ppo", trained), ("sft", policy))}
    kl_to_reference(trained, policy, PROMPTS, found["ppo"], "fp32", 1.0)
    texts = {name: one.texts for name, one in found.items()}
    for judge in (reward_judge(reward, "fp32"), model_judge(policy, "fp32")):
        assert len(compare_all(PROMPTS, texts, judge)["ppo", "sft"]) == len(PROMPTS)
    closed = [row | {"use_case": "closed_qa"} for row in valid]
    assert "eval/unsupported_words_ppo" in safety_metrics(HeldOut(closed, None), found)
    assert transcripts == []


def test_ids_are_the_codec_s_of_the_messages(model_folders: dict[str, tuple[Path, Path]]) -> None:
    codec = load_codec(model_folders["llama"][0])
    wanted = codec.prompts(PROMPTS)
    texts = [f"{number} blue" for number in range(len(PROMPTS))]
    data = Demonstrations.encode(codec, PROMPTS, texts, 500)
    assert [ids[:end] for ids, end in zip(data.ids, data.prompt_lengths, strict=True)] == wanted
    ranked = Rankings.encode(codec, [{"prompt": prompt, "completions": ["blue", "red"], "ranks": [1, 2]}
                                     for prompt in PROMPTS], 500)
    assert [group[0][:len(ids)] for group, ids in zip(ranked.ids, wanted, strict=True)] == wanted
    assert list(encode_prompts(codec, PROMPTS, 500)[0]) == list(zip(PROMPTS, wanted, strict=True))
    assert format_prompts(codec, PROMPTS, "") == wanted


def test_only_a_form_and_a_judge_s_question_are_filled_with_the_transcript(
        longer_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = load_codec(longer_llama)
    transcript = "System: blue or red.\n\nHuman: rice one?\n\nAssistant: rice.\n\nHuman: and two?"
    assert format_prompts(codec, PROMPTS[:1], "a: {prompt} b:") == text_ids(codec.tokenizer, [f"a: {transcript} b:"])
    asked: list[str] = []

    def watched(tokenizer: Any, texts: list[str]) -> list[list[int]]:
        asked.extend(texts)
        return text_ids(tokenizer, texts)

    monkeypatch.setattr("rlhf.evaluation.preference.text_ids", watched)
    model_judge(longer_llama, "fp32")(PROMPTS[:1], ["red"], ["blue"])
    assert QUESTION.format(prompt=transcript, first="red", second="blue") in asked


def test_a_prompt_that_the_model_has_no_positions_for_is_named(model_folders: dict[str, tuple[Path, Path]]) -> None:
    policy, reward = model_folders["gpt2"]
    long = [conversation("rice " * 60)]
    with pytest.raises(UserError, match=r"evaluate\.max_new_tokens and the longest held-out prompt = \d+: must"):
        answer(policy, reward, long, EvaluateParams(max_new_tokens=6), 1)
    with pytest.raises(UserError, match=r"evaluate\.judge_model: the longest question to it = \d+: must be at most"):
        model_judge(policy, "fp32")(long, ["red"], ["blue"])
