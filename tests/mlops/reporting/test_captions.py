"""The sentences below the plots say what the curves show: each against numbers made by hand."""

from collections.abc import Sequence

import numpy as np
import pytest

from mlops.reporting import captions
from mlops.reporting.journals import KlRule, Rows, changes, kl_rule, listed
from rlhf.params import PpoParams


def rows(**columns: Sequence[float | None]) -> Rows:
    length = len(next(iter(columns.values())))
    return [{"step": str(step + 1), **{f"ppo/{name}": "" if values[step] is None else str(values[step])
                                       for name, values in columns.items()}} for step in range(length)]


def test_beta_moved_where_it_moved() -> None:
    betas = [0.1, 0.1, 0.2, 0.2, 0.2, 0.1, 0.1]
    text = captions.of_beta({"ppo": rows(beta=betas), "ppo_ptx": rows(beta=[0.1] * 7)},
                            {"ppo": KlRule("step", 1.0), "ppo_ptx": KlRule("step", 1.0)})
    assert text == ("PPO: 0.1 → 0.1, changed at iterations 3 and 6. PPO-ptx: 0.1 throughout. "
                    "Above the band beta is multiplied by 2, below it divided by 2.")


def test_many_changes_are_counted() -> None:
    betas = [0.1 * 1.01 ** step for step in range(40)]
    text = captions.of_beta({"ppo": rows(beta=betas)}, {"ppo": KlRule("proportional", 1.0)})
    assert text == ("PPO: 0.1 → 0.147, changed 39 times between 2 and 40. beta moves at every iteration, in proportion "
                    "to the distance from the goal.")
    assert listed([1, 2, 3]) == "1, 2 and 3"
    assert changes(np.array([1.0, 2, 3, 4]), np.array([1.0, np.nan, 1.0, 2.0])) == [4]


@pytest.mark.parametrize(("rule", "expected"), [
    (KlRule("step", 1.0, 1.5), "PPO: in the band in 3 of 6 iterations; the last third's mean is 1.80\N{NO-BREAK SPACE}"
                               "nats, 1.80 of the goal."),
    (KlRule("step_ahead", 1.0, 2.0), "PPO: in the band in 5 of 6 iterations; the last third's mean is 1.80"
                                     "\N{NO-BREAK SPACE}nats, 1.80 of the goal."),
    (KlRule("fixed"), "PPO: 1.80\N{NO-BREAK SPACE}nats in the mean of the last third.")])
def test_kl_is_counted_against_the_band_of_the_rule(rule: KlRule, expected: str) -> None:
    kl = [0.1, 0.7, 1.4, 1.5, 1.6, 2.0]
    assert captions.of_kl({"ppo": rows(kl=kl)}, {"ppo": rule}) == expected


def test_the_rule_of_the_parameters_has_their_band_and_no_goal_where_beta_is_fixed() -> None:
    assert kl_rule(PpoParams(beta_band=1.4, kl_goal=0.6)).limits == pytest.approx((0.6 / 1.4, 0.84))
    assert kl_rule(PpoParams(kl_goal=0.6), goal=0.3).goal == 0.3
    assert kl_rule(PpoParams(beta_rule="fixed")).limits is None


@pytest.mark.parametrize(("gold", "over"), [([5.0, 5.2, 5.4, 5.1, 4.8], True), ([5.0, 5.1, 5.2, 5.2, 5.4], False),
                                            ([5.0, 6.0, 5.0, 4.0, 4.99], False)])
def test_over_optimisation_is_said_only_where_gold_fell_while_the_proxy_rose(gold: list[float], over: bool) -> None:
    text = captions.of_scores({"ppo": rows(rm_score=[0.0, 0.1, 0.2, 0.3, 0.4], gold=gold)})
    assert text.startswith(f"PPO: RM score 0.000 → 0.400, gold score 5.00 → {gold[-1]:.2f}")
    assert ("over-optimisation" in text) == over


def test_without_a_gold_labeler_a_rising_score_is_no_success() -> None:
    assert "not that people would agree" in captions.of_scores({"ppo": rows(rm_score=[0.0, 1.0])})


def losses(*values: float | None) -> Rows:
    return [{"step": str(step), "sft/valid_loss": "" if value is None else str(value)}
            for step, value in enumerate(values, 1)]


def test_the_validation_loss_is_told_and_where_it_turned() -> None:
    final = {"sft/valid_loss_base": 2.0, "sft/valid_loss": 0.5, "sft/epoch_kept": 2.0}
    text = captions.of_loss("sft", losses(None, 0.6, None, 0.5), final)
    assert text == ("Validation rows: 2.00 before training, 0.600 after step 2, 0.500 after step 4. "
                    "Kept: epoch 2.")
    turned = captions.of_loss("sft", losses(None, 0.5, None, 0.6), final | {"sft/epoch_kept": 1.0})
    assert "lowest after step 2: what followed overfits. Kept: epoch 1." in turned
    never = losses(None, None)
    assert captions.of_loss("sft", never, {"sft/valid_loss": 0.5}) == "On validation rows 0.500 at the end."
    assert captions.of_loss("pretrain", [], {}) == ""


def test_the_accuracy_on_validation_rankings_is_not_that_of_the_batches() -> None:
    journal = [{"step": "1", "rm/train_accuracy": "0.9", "rm/valid_accuracy": "0.61"},
               {"step": "2", "rm/train_accuracy": "0.95", "rm/valid_accuracy": "0.72"}]
    text = captions.of_accuracy(journal, {"rm/accuracy": 0.7156}).replace("\N{NO-BREAK SPACE}", " ")
    assert text == ("On validation rankings 61.0 → 72.0 %. Measured at the end: 71.6 %. The line is of the training "
                    "batches, before each step.")
