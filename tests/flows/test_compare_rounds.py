"""What the comparison of several rounds with one says, and what it starts."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.compare_rounds import differences, page, parameters_of, read_arm, verdict
from flows.rounds import workdir_of
from mlops.config.stage_graph import unrolled
from rlhf.errors import UserError

ROW = {"gold": 6.0, "low": 5.9, "high": 6.1, "gold_sft": 5.5, "accuracy": 0.7, "win_rate": 0.6, "kl": 0.5, "rows": 100,
       "agreement": 0.73, "alpha": 0.4}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "profiles").mkdir()
    (tmp_path / "params.yaml").write_text("seed: 1\nprofile: mine\n")
    (tmp_path / "profiles" / "mine.yaml").write_text("rounds: {prompts: 10, episodes: 512}\n")
    return tmp_path


def test_both_arms_have_the_same_labels_and_rollouts(root: Path) -> None:
    several, one, restart, active = (parameters_of(arm, 2, root, 3) for arm in ("rounds", "one", "restart", "active"))
    assert several == {"count": 3, "seed": 2, "own_copy": True}
    assert one == {"count": 1, "seed": 2, "own_copy": True, "prompts": 30, "episodes": 1536}
    assert restart == several | {"restart": True, "episodes": 1536}
    assert active == several | {"select": "disagreement"}
    assert len({workdir_of(parameters, root) for parameters in (several, one, restart, active)}) == 4
    with pytest.raises(UserError, match="arm two"):
        parameters_of("two", 1, root, 3)


def test_what_a_workspace_has_measured(root: Path) -> None:
    (root / "params.yaml").write_text(yaml.safe_dump({"seed": 1, "profile": "mine", "rounds": unrolled(2)}))
    (root / "metrics").mkdir()
    for number in (1, 2):
        scores: dict[str, Any] = {"round/gold": 5 + number, "round/gold_low": 5.0, "round/gold_high": 8.0,
                                  "round/gold_sft": 5.5, "round/rm_accuracy_on_policy": 0.7, "round/kl": 0.4,
                                  "round/win_rate_vs_sft": 0.6}
        labels = {"labels/rows_so_far": 10 * number, "labels/agreement": 0.7, "labels/alpha": 0.4}
        (root / "metrics" / f"round_scores@r{number}.json").write_text(json.dumps(scores))
        (root / "metrics" / f"round_labels@r{number}.json").write_text(json.dumps(labels))
    assert [(row["gold"], row["rows"]) for row in read_arm(root)] == [(6, 10), (7, 20)]


def test_the_page_says_what_the_numbers_say() -> None:
    def arms(last: float) -> dict[str, Any]:
        return {"rounds": [ROW, {**ROW, "gold": last}], "one": [ROW]}

    results = {"1": arms(6.25), "2": arms(6.5)}
    assert differences(results, "rounds", "one") == [0.25, 0.5]
    assert differences(results, "active", "rounds") == []
    text = page(results, "mine")
    assert "beats labeling at once in every seed: gold score +0.375 in the mean (+0.250, +0.500)" in text
    assert "disagreement" not in text.split("| seed")[0]
    assert "| 2 | rounds | 2 | 100 | 6.500 [5.900, 6.100] |" in text
    assert "in 1 of 2 seeds" in page({"1": arms(6.25), "2": arms(5.5)}, "mine")
    assert "in no seed: gold score -0.500" in verdict([-0.5, -0.5], "a", "b")
