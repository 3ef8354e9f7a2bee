"""Supervised fine-tuning: what the loss covers, what the pretraining mix does, what is left out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from rlhf.data.batching import length_batches
from rlhf.errors import UserError
from rlhf.model.chat_format import PromptCodec
from rlhf.model.load import load_policy
from rlhf.model.tokenizer import load_tokenizer
from rlhf.params import SftParams
from rlhf.pretrain import corpus_batch, read_corpus
from rlhf.sft import Demonstrations, batch_loss, sft
from rlhf.training.journal import read_journal
from rlhf.training.seeding import generator

SEED = 9


def demonstration_rows(texts: list[str]) -> list[dict[str, str]]:
    rows = [{"prompt": prompt, "completion": completion, "split": "train"}
            for prompt, completion in zip(texts[:24], texts[30:54], strict=True)]
    return rows + [{**row, "split": "valid"} for row in rows[:4]]


def params(**changes: Any) -> SftParams:
    sizes: dict[str, Any] = {"epochs": 1, "batch_size": 8, "lr": 1e-3, "precision": "fp32", "pretrain_mix": 0.0}
    return SftParams(**(sizes | changes))


def log_prob_sum(model: Any, ids: list[int], start: int) -> tuple[float, int]:
    """Sum of log-probs of ids[start:], one forward pass in float64, and their count."""
    with torch.no_grad():
        logits = model.double()(input_ids=torch.tensor([ids])).logits[0]
    table = torch.log_softmax(logits, dim=-1)
    model.float()
    return sum(table[place - 1, ids[place]].item() for place in range(start, len(ids))), len(ids) - start


def test_the_loss_is_on_the_completion_and_its_eos_alone(policy_folder: Path, texts: list[str]) -> None:
    codec = PromptCodec(load_tokenizer(policy_folder))
    model = load_policy(policy_folder)
    prompts, completions = texts[:5], texts[10:15]
    data = Demonstrations.encode(codec, prompts, completions, 200)
    batch, places = data.batch(model, [0, 1, 2, 3, 4], codec.pad_id)
    total = tokens = 0.0
    for prompt, completion in zip(codec.prompts(prompts), codec.completions(completions), strict=True):
        assert completion[-1] == codec.eos_id
        found, count = log_prob_sum(model, prompt + completion, len(prompt))
        total, tokens = total - found, tokens + count
    assert len(places) == tokens
    with torch.no_grad():
        assert batch_loss(model, batch, places, "fp32").item() == pytest.approx(total / tokens, rel=1e-5)


CHAT = [{"role": "system", "content": "red red"}, {"role": "user", "content": "one two"},
        {"role": "assistant", "content": "blue"}, {"role": "user", "content": "three"},
        {"role": "assistant", "content": "green blue red"}, {"role": "user", "content": "four five six"}]


@pytest.mark.parametrize("packed", [False, True])
def test_all_answers_of_a_conversation_are_in_the_loss_with_their_ends(policy_folder: Path, packed: bool) -> None:
    """Against transformers' own ids of each beginning of the conversation, and log-probs in float64."""
    codec = PromptCodec(load_tokenizer(policy_folder))
    model = load_policy(policy_folder)
    whole = [*CHAT, {"role": "assistant", "content": "yellow"}]
    rendered = [codec.tokenizer.apply_chat_template(whole[:end], chat_template=codec.template, return_dict=False)
                for end in range(1, len(whole) + 1)]
    total = tokens = 0.0
    for before, after in ((1, 2), (3, 4), (5, 6)):
        ids = rendered[after]
        found, count = log_prob_sum(model, ids, len(rendered[before]))
        assert ids[-1] == codec.eos_id
        total, tokens = total - found, tokens + count
    data = Demonstrations.encode(codec, [CHAT, "one two"], ["yellow", "blue"], 200, all_answers=True)
    single, count = log_prob_sum(model, data.ids[1], data.prompt_lengths[1])
    total, tokens = total - single, tokens + count
    batch, places = data.packed([0, 1], 200, codec.pad_id) if packed else data.batch(model, [0, 1], codec.pad_id)
    assert len(places) == tokens == data.tokens([0, 1])
    assert data.left_out == 0
    with torch.no_grad():
        assert batch_loss(model, batch, places, "fp32").item() == pytest.approx(total / tokens, rel=1e-5)
    last = Demonstrations.encode(codec, [CHAT], ["yellow"], 200)
    assert last.tokens([0]) == len(codec.completions(["yellow"])[0])


def test_training_on_all_answers_learns_the_earlier_ones(policy_folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": CHAT, "completion": "yellow", "split": split} for split in ("train", "valid") for _ in range(8)]
    loss = {}
    for train_on in ("completion", "all_answers"):
        sft(params(epochs=40, lr=1e-2, train_on=train_on), rows, policy_folder, SEED, tmp_path / train_on)
        codec, model = PromptCodec(load_tokenizer(policy_folder)), load_policy(tmp_path / train_on / "model")
        data = Demonstrations.encode(codec, [CHAT[:2]], ["blue"], 200)  # an earlier answer of it
        batch, places = data.batch(model, [0], codec.pad_id)
        with torch.no_grad():
            loss[train_on] = batch_loss(model, batch, places, "fp32").item()
    assert loss["all_answers"] < 0.2 < 1 < loss["completion"]


def test_a_step_mixes_the_two_losses_by_their_share(policy_folder: Path, texts: list[str], corpus: Path,
                                                    tmp_path: Path) -> None:
    rows, mix = demonstration_rows(texts), 0.25
    sft(params(pretrain_mix=mix), rows, policy_folder, SEED, tmp_path / "run", corpus)
    first = {name: float(value) for name, value in read_journal(tmp_path / "run" / "journal.csv")[0].items()
             if value}

    tokenizer = load_tokenizer(policy_folder)
    codec, model = PromptCodec(tokenizer), load_policy(policy_folder)
    train = [row for row in rows if row["split"] == "train"]
    pairs = list(zip(codec.prompts([row["prompt"] for row in train]),
                     codec.completions([row["completion"] for row in train]), strict=True))
    chosen = length_batches([len(p) + len(c) for p, c in pairs], 8, generator(SEED, "sft", 0))[0]
    sums = [log_prob_sum(model, pairs[index][0] + pairs[index][1], len(pairs[index][0])) for index in chosen]
    completion_loss = -sum(found for found, _ in sums) / sum(count for _, count in sums)
    # 8 demonstrations are three quarters of a step, so 8/3 rows of text, rounded, are the rest
    mixed = corpus_batch(read_corpus(corpus, tokenizer, 128, tmp_path), 3, 0, SEED)
    sums = [log_prob_sum(model, row.tolist(), 1) for row in mixed]
    pretrain_loss = -sum(found for found, _ in sums) / sum(count for _, count in sums)

    assert first["sft/completion_loss"] == pytest.approx(completion_loss, rel=1e-4)
    assert first["sft/pretrain_loss"] == pytest.approx(pretrain_loss, rel=1e-4)
    assert first["sft/loss"] == pytest.approx((1 - mix) * completion_loss + mix * pretrain_loss, rel=1e-4)


def test_the_mix_keeps_what_no_demonstration_speaks_of(policy_folder: Path, texts: list[str], corpus: Path,
                                                       tmp_path: Path) -> None:
    losses = {}
    for mix in (0.0, 0.5):
        folder = tmp_path / str(mix)
        sft(params(pretrain_mix=mix, epochs=6, lr=5e-3), demonstration_rows(texts), policy_folder, SEED, folder, corpus)
        model = load_policy(folder / "model")
        rows = read_corpus(corpus, load_tokenizer(policy_folder), 64, tmp_path)[:8]
        sums = [log_prob_sum(model, row, 1) for row in rows]
        losses[mix] = -sum(found for found, _ in sums) / sum(count for _, count in sums)
    assert losses[0.5] < losses[0.0] - 0.3


def test_long_rows_are_left_out_and_counted(tokenizer: PreTrainedTokenizerFast, policy_folder: Path,
                                            texts: list[str], tmp_path: Path) -> None:
    rows = demonstration_rows(texts)
    rows.append({"prompt": texts[0], "completion": " ".join(texts[:40]), "split": "train"})
    metrics = sft(params(max_tokens=60), rows, policy_folder, SEED, tmp_path / "run")
    assert metrics["sft/too_long"] == 1
    assert metrics["sft/train_rows"] == 24
    with pytest.raises(UserError, match=r"sft\.max_tokens = 2"):
        sft(params(max_tokens=2), rows, policy_folder, SEED, tmp_path / "none")


def test_micro_batches_do_not_change_a_step(policy_folder: Path, texts: list[str], corpus: Path, tmp_path: Path
                                            ) -> None:
    journals = []
    for size in (0, 3):
        sft(params(micro_batch_size=size, pretrain_mix=0.3), demonstration_rows(texts), policy_folder, SEED,
            tmp_path / str(size), corpus)
        journals.append(read_journal(tmp_path / str(size) / "journal.csv"))
    for one, other in zip(*journals, strict=True):
        assert {key: float(value or "nan") for key, value in other.items()} == pytest.approx(
            {key: float(value or "nan") for key, value in one.items()}, rel=1e-4, nan_ok=True)
