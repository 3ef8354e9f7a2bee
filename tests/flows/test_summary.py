"""The end of a run: the numbers of each stage, and base, SFT and every arm in one table."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from flows.summary import StageResult, Summary, compared_models, main_numbers
from mlops.reporting.picture import picture

EVALUATION = {
    "eval/arm": "ppo_ptx", "eval/arms": ["ppo", "ppo_ptx"], "eval/prompts": 60, "eval/win_rate_vs_sft": 0.61,
    "eval/gold_base": 4.5, "eval/gold_base_low": 4.4, "eval/gold_base_high": 4.6, "eval/gold_sft": 5.9,
    "eval/gold_ppo": 6.4, "eval/gold_ppo_ptx": 6.3, "eval/kl_ppo": 0.7, "eval/kl_ppo_ptx": 0.6,
    "eval/win_rate/ppo_vs_sft": 0.63, "eval/win_rate/ppo_ptx_vs_sft": 0.61, "eval/win_rate/sft_vs_base": 0.8,
    "tax_score/base/cloze": 0.9, "tax_of/sft/mean": 0.02, "tax_of/ppo/mean": 0.05, "tax_of/ppo_ptx/mean": 0.01,
    "tax_between/sft/ppo/mean": 0.03, "tax_between/sft/ppo_ptx/mean": -0.01,
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "metrics" / "policies"
    folder.mkdir(parents=True)
    (folder.parent / "evaluate.json").write_text(json.dumps(EVALUATION))
    for arm, kl in (("ppo", 0.75), ("ppo_ptx", 0.65)):
        (folder / f"{arm}.json").write_text(json.dumps({"ppo/kl": kl}))
        (folder / f"{arm}.csv").write_text("step,ppo/kl,ppo/kl_goal\n1,0.1,0.6\n2,0.5,0.6\n")
    return tmp_path


def test_the_models_stand_in_one_table_with_the_promoted_arm_marked(root: Path) -> None:
    titles, rows = compared_models(root)
    assert titles == ["gold score", "win rate against SFT", "KL to SFT, nats", "tax, mean", "tax of PPO, mean"]
    assert [row[0] for row in rows] == ["base", "SFT", "PPO", "PPO-ptx *"]
    assert rows[0][1] == "4.50 (4.40 to 4.60)"
    assert [row[-1] for row in rows] == ["\N{EN DASH}", "\N{EN DASH}", "3.0", "\N{MINUS SIGN}1.0"]
    results = [StageResult(stage, 1, "ran") for stage in ("ppo@ppo", "ppo@ppo_ptx", "evaluate")]
    numbers = main_numbers(root, [item.stage for item in results])
    assert numbers["ppo@ppo"] == "in training: kl=0.75"
    assert numbers["ppo@ppo_ptx"] == "in training: kl=0.65"
    assert numbers["evaluate"].startswith("arm=ppo_ptx  win_rate_vs_sft=0.61")
    summary = Summary(results, numbers, (titles, rows))
    assert "| PPO-ptx * | 6.30 |" in summary.markdown()
    shown = io.StringIO()
    summary.show(Console(file=shown, width=100))
    assert "PPO-ptx *" in shown.getvalue()
    assert max(map(len, shown.getvalue().splitlines())) <= 100
    narrow = io.StringIO()
    summary.show(Console(file=narrow, width=50))
    for whole in (rows[3][2], "4.40…4.60", "PPO-ptx *"):
        assert whole in shown.getvalue()
        assert whole in narrow.getvalue()


def test_without_an_evaluation_there_is_no_such_table(tmp_path: Path) -> None:
    assert compared_models(tmp_path) == ([], [])
    assert "model" not in Summary([], {}, compared_models(tmp_path)).markdown()


def test_the_arms_curves_are_in_one_picture(root: Path) -> None:
    both = picture(root)
    (root / "metrics" / "policies" / "ppo_ptx.csv").unlink()
    assert both.startswith(b"\x89PNG")
    assert picture(root) != both
    assert picture(root / "metrics") == b""
