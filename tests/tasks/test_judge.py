"""The judge of own data learns from other comparisons than the reward model, of other prompts."""

from pathlib import Path

import pytest

from rlhf.evaluation.held_out import judge_of
from rlhf.params import EvaluateParams
from tasks.rm import rows_of

ROWS = [{"prompt": f"p{number // 2}", "split": "valid" if number % 10 == 0 else "train", "number": number}
        for number in range(4000)]


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_a_prompt_s_training_rows_are_all_the_one_s_or_all_the_other_s(share: float) -> None:
    mine, judges = ([row for row in rows_of(ROWS, share, 1, part) if row["split"] == "train"] for part in (False, True))
    assert not {row["prompt"] for row in mine} & {row["prompt"] for row in judges}
    assert len(mine) + len(judges) == sum(row["split"] == "train" for row in ROWS)
    assert len(judges) / (len(mine) + len(judges)) == pytest.approx(share, abs=0.04)
    for part in (False, True):  # both are measured on all valid rows
        assert [row for row in rows_of(ROWS, share, 1, part) if row["split"] == "valid"] == [
            row for row in ROWS if row["split"] == "valid"]


def test_another_seed_divides_otherwise_and_no_share_not_at_all() -> None:
    assert list(rows_of(ROWS, 0.5, 1)) == list(rows_of(ROWS, 0.5, 1)) != list(rows_of(ROWS, 0.5, 2))
    assert rows_of(ROWS, 0, 1) is ROWS


def test_who_judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reward model that PPO was trained on judges last, and is no independent judge."""
    asked = []
    monkeypatch.setattr("rlhf.evaluation.held_out.reward_judge", lambda folder, _: asked.append(folder))
    rm, judge = tmp_path / "rm", tmp_path / "judge"
    assert judge_of(EvaluateParams(), None, rm, judge)[1] == "own"
    judge.mkdir()
    (judge / "none.json").write_text("{}")
    assert judge_of(EvaluateParams(), None, rm, judge)[1] == "own"
    (judge / "config.json").write_text("{}")
    assert judge_of(EvaluateParams(), None, rm, judge)[1] == "held_out"
    assert judge_of(EvaluateParams(judge="reward_model", judge_model="x"), None, rm, judge)[1] == "reward_model"
    assert asked == [rm, rm, judge, Path("x")]
