"""The model card's win rates are the judge's; what the run's own reward model prefers stands there only without one."""

from typing import Any

import pytest

from mlops.release.model_card import _wins


def rate(word: str, value: float) -> dict[str, Any]:
    return {f"eval/{word}_vs_sft{end}": value + more for end, more in (("", 0.0), ("_low", -0.1), ("_high", 0.1))}


@pytest.mark.parametrize(("metrics", "shown"), [
    (rate("win_rate", 0.6) | rate("rm_prefers", 0.9), ["60.0"]), (rate("rm_prefers", 0.9), ["90.0"]),
    (rate("win_rate", 0.6), ["60.0"])])
def test_one_row_for_each_opponent(metrics: dict[str, Any], shown: list[str]) -> None:
    rows = _wins({"eval/arm": "ppo", "eval/arms": ["ppo"], **metrics})
    assert [(name, text[:4]) for name, text in rows] == [("sft", value) for value in shown]
