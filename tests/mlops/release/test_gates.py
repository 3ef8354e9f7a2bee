"""Each release gate compares its metric with its bound."""

import pytest

from mlops.release.gates import against_champion, gates
from rlhf.params import PromoteParams

METRICS = {"eval/kl_ppo": 0.5, "eval/toxic_ppo": 0.01, "eval/win_rate_vs_sft": 0.6, "eval/win_rate_vs_sft_low": 0.58,
           "tax/cloze": 0.01, "tax/cloze_low": 0, "tax/wmt": 4.0, "tax_unit/wmt": 100.0, "tax/mean": 0.025}


def test_each_gate_checks_its_own_metric() -> None:
    found = {gate.name + gate.rule: gate for gate in gates(METRICS, 0.6, PromoteParams(max_mean_tax=0.02))}
    assert [name for name, gate in found.items() if not gate.passed] == ["alignment tax, meanat most"]
    assert found["alignment tax, meanat most"].text() == "alignment tax, mean 0.025, at most 0.02: missed by 0.005"
    assert found["alignment tax, wmtat most"].value == pytest.approx(0.04)  # BLEU: of 100
    for change, missed in (({"eval/win_rate_vs_sft_low": 0.49}, "win rate against SFT"), ({"eval/kl_ppo": 1.0}, "KL"),
                           ({"eval/kl_ppo": 0.1}, "KL"), ({"eval/toxic_ppo": 0.06}, "toxic"),
                           ({"tax/wmt": 6.0}, "alignment tax, wmt")):
        wrong = [gate for gate in gates(METRICS | change, 0.6, PromoteParams(max_mean_tax=1)) if not gate.passed]
        assert len(wrong) == 1
        assert wrong[0].name.startswith(missed)
    params = PromoteParams(champion_margin=0.03)
    assert against_champion(0.471, params).passed
    assert not against_champion(0.469, params).passed
    assert against_champion(0.469, params).text().endswith("at least 0.47: missed by 0.001")


def test_the_gates_are_those_of_the_promoted_arm() -> None:
    other = METRICS | {"eval/arm": "ppo_ptx", "eval/kl_ppo_ptx": 9.0, "eval/toxic_ppo_ptx": 0.5}
    missed = [gate.name for gate in gates(other, 0.6, PromoteParams(max_mean_tax=1)) if not gate.passed]
    assert missed == ["KL to the SFT policy / goal", "toxic responses, share"]
