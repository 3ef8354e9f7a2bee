"""Signals of a run that goes wrong, against other libraries, and a trainer that stops itself."""

import logging
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import linregress
from transformers import AutoModelForCausalLM

import rlhf.ppo.rollouts
from rlhf.errors import TrainingFailed
from rlhf.model.load import load_policy
from rlhf.params import PpoParams
from rlhf.ppo.health import SURE, WINDOW, check_bounds, hacking_alarm, length_controlled, trend
from rlhf.ppo.run import train_ppo
from rlhf.pretrain import lm_loss
from rlhf.training.journal import read_journal
from rlhf.training.loop import Part, train_loop


def test_the_length_controlled_score_is_the_fitted_line_s() -> None:
    rng = np.random.default_rng(1)
    lengths = rng.integers(3, 40, 60).astype(float)
    scores = 0.05 * lengths + rng.normal(0, 1, 60)
    slope, offset = np.polyfit(lengths, scores, 1)
    assert length_controlled(scores.tolist(), lengths.tolist(), 12.0) == pytest.approx(slope * 12 + offset, rel=1e-9)
    assert length_controlled([1.0, 3.0], [5.0, 5.0], 9.0) == 2.0


@pytest.mark.parametrize("seed", range(5))
def test_the_trend_is_that_of_a_regression(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal(0, 1, 12) + 0.1 * seed * np.arange(12)
    fitted = linregress(np.arange(12), values)
    assert trend(values.tolist()) == pytest.approx(fitted.slope / fitted.stderr, rel=1e-9)


def test_the_trend_of_few_or_equal_values_says_nothing() -> None:
    assert trend([1.0, 2.0, 3.0]) == 0
    assert trend([2.0] * 8) == 0
    assert trend([1.0, 2.0, 3.0, 4.0]) > SURE


def history(score: float, gold: float | None, controlled: float) -> list[dict[str, float]]:
    """Iterations whose quantities have these slopes, with a little noise."""
    rng = random.Random(3)
    rows = []
    for number in range(2 * WINDOW):
        row = {"ppo/rm_score": score * number + rng.gauss(0, 0.05),
               "ppo/rm_score_length_controlled": controlled * number + rng.gauss(0, 0.05)}
        rows.append(row if gold is None else row | {"ppo/gold": gold * number + rng.gauss(0, 0.05)})
    return rows


@pytest.mark.parametrize(("score", "gold", "controlled", "alarm"), [
    (0.1, -0.1, 0.1, 1), (0.1, 0.1, 0.1, 0), (0.1, None, -0.1, 1), (0.1, None, 0.1, 0), (-0.1, -0.1, -0.1, 0),
    (0.0, -0.1, 0.0, 0), (0.1, 0.1, -0.1, 1),
])
def test_the_alarm_rises_where_the_proxy_rises_and_what_it_stands_for_falls(score: float, gold: float | None,
                                                                             controlled: float, alarm: int) -> None:
    assert hacking_alarm(history(score, gold, controlled)) == alarm
    assert hacking_alarm(history(score, gold, controlled)[:3]) == 0


SOUND = {"ppo/kl": 1.0, "ppo/entropy": 2.0, "ppo/eos_rate": 0.5}


@pytest.mark.parametrize(("change", "said"), [
    ({"ppo/kl": 40.1}, "KL 40.1 nats is beyond ppo.kl_limit = 20 times the goal 2"),
    ({"ppo/entropy": 0.03}, "entropy fell from 2 to 0.03 nats, below ppo.entropy_floor = 0.02"),
    ({"ppo/eos_rate": 0.001}, "0.1% of the responses end, fewer than ppo.min_eos_rate = 0.005: raise"),
    ({"ppo/policy_loss": math.nan}, "ppo/policy_loss: not a finite number"),
])
def test_bounds_say_what_is_wrong(change: dict[str, float], said: str) -> None:
    history = [SOUND] * 6 if "ppo/eos_rate" not in change else []
    check_bounds(SOUND, history, PpoParams(), 7)
    with pytest.raises(TrainingFailed, match="iteration 7: ") as caught:
        check_bounds(SOUND | change, history, PpoParams(), 7)
    assert said in str(caught.value)


def test_a_run_that_learned_nothing_from_the_start_is_stopped() -> None:
    """Its entropy cannot fall, and never does an answer end: nothing is relative to a first iteration."""
    with pytest.raises(TrainingFailed, match=r"entropy is 1e-05 nats a token, below ppo\.min_entropy = 0\.001"):
        check_bounds(SOUND | {"ppo/entropy": 1e-5}, [], PpoParams(), 1)
    few = PpoParams(batch_size=64, minibatch_size=64)
    silent = SOUND | {"ppo/eos_rate": 0.0}
    check_bounds(silent, [silent] * 2, few, 3)  # 192 responses
    with pytest.raises(TrainingFailed, match=r"0\.0% of the responses end"):
        check_bounds(silent, [silent] * 3, few, 4)
    check_bounds(silent, [*[silent] * 3, SOUND], few, 5)


def test_bounds_can_be_switched_off() -> None:
    off = PpoParams(kl_limit=0, entropy_floor=0, min_entropy=0, min_eos_rate=0)
    check_bounds({"ppo/kl": 1e6, "ppo/entropy": 0.0, "ppo/eos_rate": 0.0}, [SOUND] * 9, off, 10)


@pytest.mark.usefixtures("save_every_step")
def test_a_score_that_is_no_number_stops_the_run_with_the_last_sound_state_saved(
        model_folders: dict[str, tuple[Path, Path]], ppo_params: Callable[..., PpoParams], prompt_texts: list[str],
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = rlhf.ppo.rollouts.score_sequences, []

    def poisoned(*arguments: Any) -> list[float]:
        calls.append(1)
        return [math.nan] * 8 if len(calls) == 3 else real(*arguments)

    monkeypatch.setattr(rlhf.ppo.rollouts, "score_sequences", poisoned)
    with pytest.raises(TrainingFailed, match=r"iteration 3: not finite: .*failed"):
        train_ppo(ppo_params(episodes=40), prompt_texts, *model_folders["gpt2"], 5, tmp_path)
    assert len(read_journal(tmp_path / "journal.csv")) == 2
    assert (tmp_path / "checkpoints" / "step-00000002.json").exists()
    assert not (tmp_path / "model").exists()
    for value in AutoModelForCausalLM.from_pretrained(tmp_path / "failed").parameters():
        assert value.isfinite().all()
    train_ppo(ppo_params(episodes=40), prompt_texts, *model_folders["gpt2"], 5, tmp_path)  # it goes on from there
    assert len(read_journal(tmp_path / "journal.csv")) == 5


def test_a_kl_beyond_its_limit_stops_the_run(model_folders: dict[str, tuple[Path, Path]], tmp_path: Path,
                                             ppo_params: Callable[..., PpoParams], prompt_texts: list[str]) -> None:
    params = ppo_params(episodes=400, lr=3e-2, kl_goal=0.01, kl_limit=5.0, beta_rule="fixed", beta=0.001)
    with pytest.raises(TrainingFailed, match=r"is beyond ppo\.kl_limit = 5 times the goal 0\.01"):
        train_ppo(params, prompt_texts, *model_folders["gpt2"], 5, tmp_path)
    assert (tmp_path / "failed" / "model.safetensors").exists()


def test_a_loss_that_is_no_number_stops_supervised_training(model_folders: dict[str, tuple[Path, Path]], tmp_path: Path
                                                            ) -> None:
    model = load_policy(model_folders["gpt2"][0])
    rows = torch.randint(5, 300, (4, 8), generator=torch.Generator().manual_seed(1))

    def loss_of_step(step: int) -> list[Part]:
        loss = lm_loss(model, rows, "fp32")
        return [(loss * (math.inf if step == 2 else 1.0), {})]

    with pytest.raises(TrainingFailed, match=r"step 3: loss inf, .*the state after step 2 is saved; lower toy\.lr"):
        train_loop("toy", tmp_path, model, [torch.optim.SGD(model.parameters(), lr=1e-3)], steps=5,
                   loss_of_step=loss_of_step, columns=[])
    assert all(value.isfinite().all() for value in model.parameters())


def test_the_alarm_is_logged_once_when_it_rises(model_folders: dict[str, tuple[Path, Path]], tmp_path: Path,
                                                ppo_params: Callable[..., PpoParams], prompt_texts: list[str],
                                                caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
                                                ) -> None:
    monkeypatch.setattr("rlhf.ppo.run.hacking_alarm", lambda rows: float(len(rows) >= 3))
    with caplog.at_level(logging.WARNING, logger="rlhf.ppo.run"):
        train_ppo(ppo_params(episodes=40), prompt_texts, *model_folders["gpt2"], 5, tmp_path)
    assert [record.message for record in caplog.records if "hacking" in record.message] == [
        "iteration 3: the reward model's score rises while the length-controlled score falls: reward hacking?"]
    rows = read_journal(tmp_path / "journal.csv")
    assert [float(row["ppo/alarm"]) for row in rows] == [0, 0, 1, 1, 1]
    assert "ppo/gold" not in rows[0]


def test_episodes_that_fill_no_iteration_are_told(model_folders: dict[str, tuple[Path, Path]], prompt_texts: list[str],
                                                  ppo_params: Callable[..., PpoParams], tmp_path: Path,
                                                  caplog: pytest.LogCaptureFixture) -> None:
    train_ppo(ppo_params(episodes=19), prompt_texts, *model_folders["gpt2"], 5, tmp_path)
    assert "ppo.episodes = 19 is no multiple of ppo.batch_size = 8: 2 iterations with 16 episodes are" in caplog.text
    assert len(read_journal(tmp_path / "journal.csv")) == 2
