"""The reward model's variants: best-of-n, normalisation, the choice of weights, what is measured."""

import itertools
import json
import math
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

import rlhf.reward_model
from rlhf.errors import UserError
from rlhf.fast.packed_attention import NAME
from rlhf.losses import best_of_loss
from rlhf.model.chat_format import PromptCodec, load_codec
from rlhf.model.load import load_policy, load_scorer, new_scorer, no_dropout, save_memory
from rlhf.model.scoring import score_groups, score_sequences
from rlhf.model.tokenizer import load_tokenizer
from rlhf.params import RmParams
from rlhf.reward_model import (
    Scored,
    accuracy,
    best_of_groups,
    calibration,
    calibration_error,
    contradicted_pairs,
    mean_ranking_loss,
    reference_samples,
    score_rows,
    train_reward_model,
)
from rlhf.training.journal import read_journal

Row = dict[str, Any]
WORDS = ("red", "blue", "rice", "fish", "forest", "desert", "home", "ba-do", "mi-ka", "what")


def rankings(count: int, seed: int = 1) -> list[Row]:
    """Made-up rankings of 2 to 6 completions: the more often "red", the better; ties among equals."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        texts = [" ".join(rng.choices(WORDS, k=rng.randrange(2, 7))) for _ in range(rng.randrange(2, 7))]
        reds = [text.split().count("red") for text in texts]
        order = sorted(set(reds), reverse=True)
        rows.append({"prompt": f"{rng.choice(WORDS)}?", "completions": texts,
                     "ranks": [order.index(count) + 1 for count in reds],
                     "split": "valid" if number % 4 == 0 else "train", "labeler_id": f"l{number % 3}",
                     "use_case": "other"})
    return rows


DEMONSTRATIONS = [{"prompt": "what?", "completion": f"{word} red"} for word in WORDS]


def train(folder: Path, policy: Path, **changes: Any) -> tuple[Any, dict[str, float]]:
    given: dict[str, Any] = {"batch_size": 8, "lr": 3e-3, "precision": "fp32", "max_tokens": 60, "epochs": 2,
                             "normalise_samples": 40}
    params = RmParams(**(given | changes))
    return train_reward_model(params, rankings(240), DEMONSTRATIONS, policy, 3, folder)


@pytest.mark.parametrize("recomputed", [False, True])
def test_a_prompt_read_once_gives_the_scores_and_gradients_of_reading_it_each_time(
        policy_folder: Path, recomputed: bool) -> None:
    draw = random.Random(4)

    def ids(count: int) -> list[int]:
        return [draw.randrange(2, 300) for _ in range(count)]

    groups = [[[*prompt, *ids(draw.randint(1, 9))] for _ in range(count)]
              for count, prompt in ((4, ids(7)), (2, ids(1)), (9, ids(15)), (3, []))]
    groups[0][1] = groups[0][0][:8]  # one is the beginning of another
    model = new_scorer(policy_folder, 0, torch.Generator().manual_seed(2)).double()
    weights = torch.randn(4, 9, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = []
    save_memory(model.train(), recomputed)
    no_dropout(model)
    for attention in (NAME, "eager"):
        model.set_attn_implementation(attention)
        model.zero_grad()
        scores = score_groups(model, groups, 0, "fp32")
        (scores * weights).sum().backward()
        found.append((scores, torch.cat([item.grad.flatten() for item in model.parameters() if item.grad is not None])))
    assert found[0][0].shape == (4, 9)
    assert found[0][1].abs().sum() > 0
    assert torch.allclose(found[0][0], found[1][0], atol=1e-6)  # scores are float32
    assert torch.allclose(found[0][1], found[1][1], atol=1e-5)  # so are some norms


def test_best_of_is_the_log_softmax_of_the_best_in_float64() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        scores, counts = rng.normal(0, 3, (5, 6)), rng.integers(2, 7, 5)
        best = [int(rng.integers(0, count)) for count in counts]
        expected = -np.mean([log_softmax(row[:count])[place] for row, count, place in
                             zip(scores, counts, best, strict=True)])
        ranks = torch.tensor([[1 if place == chosen else 2 for place in range(6)] for chosen in best])
        present = torch.tensor([[place < count for place in range(6)] for count in counts])
        assert best_of_loss(torch.tensor(scores), ranks, present).item() == pytest.approx(expected, rel=1e-6)


def test_best_of_two_is_the_ranking_loss_of_a_pair() -> None:
    scores, ranks, present = torch.tensor([[0.3, -1.2]]), torch.tensor([[2, 1]]), torch.ones(1, 2, dtype=torch.bool)
    assert best_of_loss(scores, ranks, present).item() == pytest.approx(math.log1p(math.exp(1.5)), rel=1e-6)


def test_order_and_a_common_constant_do_not_matter_to_best_of() -> None:
    scores, ranks = torch.randn(4, 5, generator=torch.Generator().manual_seed(1)), torch.tensor([[2, 2, 1, 2, 2]] * 4)
    present, order = torch.ones(4, 5, dtype=torch.bool), torch.tensor([3, 2, 0, 4, 1])
    loss = best_of_loss(scores, ranks, present)
    torch.testing.assert_close(best_of_loss(scores[:, order] + 7, ranks[:, order], present), loss)


def test_best_of_groups_takes_groups_that_share_nothing() -> None:
    found = list(best_of_groups([{"completions": list("abcdefghi"), "ranks": list(range(1, 10))}], 4, seed=1))
    assert [len(row["completions"]) for row in found] == [4, 4]
    assert not set(found[0]["completions"]) & set(found[1]["completions"])
    assert all(row["ranks"].index(1) == row["completions"].index(min(row["completions"])) for row in found)


def test_best_of_groups_draws_completions_and_leaves_ties_out() -> None:
    rows: list[Row] = [{"completions": list("abcdef"), "ranks": [3, 1, 2, 4, 5, 6]},
                       {"completions": list("xy"), "ranks": [1, 1]}, {"completions": list("pqr"), "ranks": [2, 2, 1]}]
    found = list(best_of_groups(rows, 4, seed=1))
    assert len(found) == 2
    assert len(found[0]["completions"]) == 4
    best = min(found[0]["completions"], key=lambda text: rows[0]["ranks"][list("abcdef").index(text)])
    assert found[0]["ranks"] == [1 if text == best else 2 for text in found[0]["completions"]]
    assert (found[1]["completions"], found[1]["ranks"]) == (list("pqr"), [2, 2, 1])
    assert list(best_of_groups(rows, 4, seed=1)) == found
    assert any(next(best_of_groups(rows, 4, seed)) != found[0] for seed in range(2, 6))


@pytest.mark.parametrize("loss", ["ranking", "best_of"])
def test_either_loss_learns_what_is_better(policy_folder: Path, tmp_path: Path, loss: str) -> None:
    model, metrics = train(tmp_path, policy_folder, loss=loss, epochs=5)
    scored = score_rows(model, PromptCodec(load_tokenizer(policy_folder)), rankings(120, seed=9),
                        RmParams(max_tokens=60))
    assert accuracy(scored) > 0.8
    assert metrics["rm/train_prompts"] <= 180


def test_demonstrations_score_zero_in_the_saved_model(policy_folder: Path, tmp_path: Path) -> None:
    train(tmp_path, policy_folder)
    codec = PromptCodec(load_tokenizer(tmp_path / "model"))
    sequences = [prompt + answer for prompt, answer in zip(
        codec.prompts([row["prompt"] for row in DEMONSTRATIONS]),
        codec.completions([row["completion"] for row in DEMONSTRATIONS]), strict=True)]
    scores = score_sequences(load_scorer(tmp_path / "model"), sequences, codec.pad_id, "fp32")
    assert sum(scores) / len(scores) == pytest.approx(0, abs=1e-4)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        others = [plain(input_ids=torch.tensor([sequence])).logits.item() for sequence in sequences]
    constant = getattr(plain.config, "score_shift", 0.0)
    assert [score + constant for score in others] == pytest.approx(scores, abs=1e-4)


def test_gain_and_bias_give_the_policy_s_samples_mean_0_and_deviation_1(policy_folder: Path, tmp_path: Path) -> None:
    model, metrics = train(tmp_path, policy_folder, normalise="gain_and_bias")
    codec = PromptCodec(load_tokenizer(policy_folder))
    params = RmParams(normalise_samples=40, max_tokens=60, precision="fp32")
    prompts = [row["prompt"] for row in rankings(240) if row["split"] == "valid"]
    samples = reference_samples(policy_folder, codec, prompts, params, 3)
    scores = score_sequences(load_scorer(tmp_path / "model"), samples, codec.pad_id, "fp32")
    assert np.mean(scores) == pytest.approx(0, abs=1e-4)
    assert np.std(scores) == pytest.approx(1, abs=1e-4)
    assert metrics["rm/gain"] != 1
    del model


def test_without_a_demonstration_to_normalise_by_nothing_is_trained(policy_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"or set rm\.normalise to gain_and_bias"):
        train_reward_model(RmParams(precision="fp32", max_tokens=60), rankings(40), [], policy_folder, 3, tmp_path)
    assert not (tmp_path / "journal.csv").exists()
    train_reward_model(RmParams(precision="fp32", normalise="gain_and_bias", normalise_samples=10, batch_size=8,
                                max_tokens=60),
                       rankings(40), [], policy_folder, 3, tmp_path)


@pytest.mark.parametrize("architecture", ["gpt2"])
def test_the_weights_of_the_best_valid_accuracy_are_kept(policy_folder: Path, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch, architecture: str) -> None:
    seen: list[float] = []
    given = iter([0.5, 0.9, 0.7, 0.6])

    def told(scored: list[Scored]) -> float:
        seen.append(next(given))
        return seen[-1]

    monkeypatch.setattr(rlhf.reward_model, "accuracy", told)
    _, metrics = train(tmp_path / "a", policy_folder, checkpoint="valid_accuracy", checks=4)
    assert len(seen) == 4
    steps = len((tmp_path / "a" / "journal.csv").read_text().splitlines()) - 1
    assert metrics["rm/steps_kept"] == steps // 2
    monkeypatch.undo()
    _, last = train(tmp_path / "b", policy_folder)
    assert last["rm/steps_kept"] == steps
    one, other = (load_scorer(tmp_path / name / "model").state_dict() for name in "ab")
    assert any(not torch.equal(one[name], other[name]) for name in one)


# --- what is measured ------------------------------------------------------------------------------------------------

def scored(count: int = 60, seed: int = 5) -> list[Scored]:
    rng = random.Random(seed)
    return [Scored(row, [rng.gauss(0, 1.5) - 0.5 * rank for rank in row["ranks"]]) for row in rankings(count, seed)]


def every_pair(items: list[Scored]) -> list[tuple[float, float]]:
    """(score of the preferred completion, score of the other) of each decided pair, by plain loops."""
    return [(item.scores[a], item.scores[b]) for item in items
            for a, b in itertools.permutations(range(len(item.scores)), 2)
            if item.row["ranks"][a] < item.row["ranks"][b]]


def test_accuracy_counts_decided_pairs_and_equal_scores_as_wrong() -> None:
    items = scored()
    pairs = every_pair(items)
    assert accuracy(items) == pytest.approx(sum(a > b for a, b in pairs) / len(pairs))
    assert accuracy([Scored({"ranks": [1, 2]}, [1.0, 1.0])]) == 0
    assert accuracy([Scored({"ranks": [1, 1]}, [1.0, 2.0])]) == 0


def test_the_pairs_on_which_labelers_contradict_each_other_are_out_of_reach_for_any_model() -> None:
    """By hand: of nine decided pairs on "p" and "q" three are a minority's, and one prefers a text to itself."""
    def item(prompt: str, completions: list[str], ranks: list[int]) -> Scored:
        return Scored({"prompt": prompt, "completions": completions, "ranks": ranks}, [0.0] * len(ranks))

    items = [item("p", ["a", "b"], [1, 2]), item("p", ["b", "a"], [2, 1]), item("p", ["a", "b"], [2, 1]),
             item("q", ["a", "b", "c"], [1, 2, 3]), item("q", ["c", "b", "a"], [1, 2, 2]),
             item("r", ["a", "b"], [2, 1]), item("s", ["x", "x"], [1, 2])]
    assert contradicted_pairs(items) == pytest.approx((1 + 2 + 1) / (3 + 3 + 2 + 1 + 1))
    assert contradicted_pairs(items[3:4]) == 0
    best = max(accuracy([Scored(one.row, [values[text] for text in one.row["completions"]]) for one in items[:3]])
               for values in ({"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 1.0}))
    assert best == pytest.approx(1 - contradicted_pairs(items[:3]))


def test_rankings_of_one_prompt_are_trained_on_in_one_step(policy_folder: Path, tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """Six pairs made of four answers came in up to six steps."""
    rows = [{"prompt": f"what {word} {other}?", "completions": list(pair), "ranks": [1, 2], "split": "train",
             "labeler_id": "l", "use_case": "other"} for word, other in itertools.permutations(WORDS[:5], 2)
            for pair in itertools.combinations(("red red red", "red red", "red", "fish"), 2)]
    random.Random(1).shuffle(rows)
    batches: list[list[int]] = []
    real = rlhf.reward_model.length_batches

    def noted(*arguments: Any) -> Any:
        made = real(*arguments)
        batches.extend(made)
        return made

    monkeypatch.setattr(rlhf.reward_model, "length_batches", noted)
    params = RmParams(batch_size=12, lr=1e-3, precision="fp32", max_tokens=60, epochs=1)
    train_reward_model(params, rows, DEMONSTRATIONS, policy_folder, 3, tmp_path)
    assert len(batches) == 10
    steps = Counter(prompt for batch in batches for prompt in {rows[index]["prompt"] for index in batch})
    assert set(steps.values()) == {1}


def test_calibration_by_plain_loops() -> None:
    items = scored(200)
    curve = calibration(items, bins=5)
    groups: dict[int, list[tuple[float, bool]]] = {}
    for preferred, other in every_pair(items):
        sure = 1 / (1 + math.exp(-abs(preferred - other)))
        groups.setdefault(min(4, int((sure - 0.5) * 10)), []).append((sure, preferred > other))
    assert [row["pairs"] for row in curve] == [len(groups[number]) for number in sorted(groups)]
    for row, number in zip(curve, sorted(groups), strict=True):
        assert row["low"] == pytest.approx(0.5 + number / 10)
        assert row["predicted"] == pytest.approx(np.mean([sure for sure, _ in groups[number]]))
        assert row["observed"] == pytest.approx(np.mean([right for _, right in groups[number]]))
    total = sum(map(len, groups.values()))
    expected = sum(len(group) * abs(np.mean([s for s, _ in group]) - np.mean([r for _, r in group]))
                   for group in groups.values()) / total
    assert calibration_error(curve) == pytest.approx(expected)


def test_a_model_whose_margins_are_log_odds_is_calibrated() -> None:
    rng = random.Random(1)
    items = []
    for _ in range(20_000):
        margin = rng.gauss(0, 2)
        first_wins = rng.random() < 1 / (1 + math.exp(-margin))
        items.append(Scored({"ranks": [1, 2] if first_wins else [2, 1]}, [margin, 0.0]))
    assert calibration_error(calibration(items)) < 0.01
    double = [Scored(item.row, [2 * score for score in item.scores]) for item in items]
    assert calibration_error(calibration(double)) > 0.05


def test_sft_keeps_the_epoch_that_the_reward_model_or_the_loss_likes_best(
        make_policy: Callable[..., Any], model_folders: dict[str, tuple[Path, Path]],
        tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import rlhf.sft as sft
    from rlhf.params import SftParams

    policy, scorer = model_folders["gpt2"]
    rows = [{"prompt": f"{word}?", "completion": f"{word} red", "split": "valid" if number % 5 == 0 else "train"}
            for number, word in enumerate(WORDS * 4)]
    params = SftParams(epochs=3, batch_size=8, precision="fp32", checkpoint="rm_score", reward_model=str(scorer),
                       max_tokens=30, pretrain_mix=0.0)
    measured: list[float] = []
    real = sft.rm_score

    def told(*arguments: Any) -> float:
        measured.append(real(*arguments))
        return [1.0, 3.0, 2.0][len(measured) - 1]

    monkeypatch.setattr(sft, "rm_score", told)
    metrics = sft.sft(params, rows, policy, 3, tmp_path / "rm")
    assert metrics["sft/epoch_kept"] == 2
    assert len(measured) == 3
    assert all(map(math.isfinite, measured))
    by_loss = sft.sft(SftParams(**(params.__dict__ | {"checkpoint": "valid_loss"})), rows, policy, 3, tmp_path / "loss")
    assert by_loss["sft/valid_loss"] <= metrics["sft/valid_loss"] + 1e-6
    assert json.loads((tmp_path / "rm" / "model" / "config.json").read_text())["model_type"] == "gpt2"
    load_policy(tmp_path / "rm" / "model")


def test_the_loss_on_validation_rankings_is_the_papers() -> None:
    """By hand [InstructGPT eq. 1]: the mean over C(K, 2) pairs of -log sigmoid, a tie adding nothing."""
    scored = [Scored({"ranks": [1, 2, 2]}, [0.5, -1.0, 2.0]), Scored({"ranks": [2, 1]}, [0.3, 0.3])]
    first = (math.log1p(math.exp(-1.5)) + math.log1p(math.exp(1.5))) / 3
    assert mean_ranking_loss(scored) == pytest.approx((first + math.log(2)) / 2, rel=1e-12)
    assert mean_ranking_loss([]) == 0.0


def test_the_journal_has_accuracy_and_loss_on_validation_rankings_while_it_trains(policy_folder: Path, tmp_path: Path
                                                                                  ) -> None:
    _, metrics = train(tmp_path, policy_folder, checks=2)
    rows = read_journal(tmp_path / "journal.csv")
    measured = [(int(row["step"]), float(row["rm/valid_accuracy"]), float(row["rm/valid_loss"])) for row in rows
                if row["rm/valid_loss"]]
    assert [step for step, *_ in measured] == [len(rows) // 2, len(rows)]
    valid = [row for row in rankings(240) if row["split"] == "valid"]
    model = load_scorer(tmp_path / "model")
    scored = score_rows(model, load_codec(policy_folder), valid, RmParams(precision="fp32", max_tokens=60), tmp_path)
    assert measured[-1][1] == pytest.approx(accuracy(scored))
    assert measured[-1][2] == pytest.approx(mean_ranking_loss(scored), rel=1e-5)
    assert metrics["rm/steps_kept"] == len(rows)


def test_more_tokens_than_positions_are_refused_before_training(policy_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rm\.max_tokens = 129: must be at most 128, the positions that the model has"):
        train(tmp_path, policy_folder, max_tokens=129)


def test_micro_batches_do_not_change_a_step(policy_folder: Path, tmp_path: Path) -> None:
    journals = []
    for size in (0, 3):
        train(tmp_path / str(size), policy_folder, micro_batch_size=size, epochs=1, lr=1e-4)
        journals.append(read_journal(tmp_path / str(size) / "journal.csv"))
    for one, other in zip(*journals, strict=True):
        assert {key: float(value or "nan") for key, value in other.items()} == pytest.approx(
            {key: float(value or "nan") for key, value in one.items()}, rel=1e-3, abs=1e-6, nan_ok=True)
