"""The study: claims judged on made-up numbers with a known answer; a tiny study from data to page, run twice."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import mlops.tools.study
from mlops.config.loader import Params, load_profile
from mlops.tools.claims import CLAIMS, judge_claims, missing, page
from mlops.tools.study import _changed, study
from rlhf.errors import UserError
from rlhf.params import SftParams
from tests.tasks.small_pipeline import PROFILE, REPO

MODELS = ("base_prompted", "sft", "ppo", "ppo_ptx", "ppo_high_beta", "ppo_free", "small_ppo")


def numbers(**changes: Any) -> dict[str, Any]:
    """A seed in which every claim holds."""
    scores: dict[str, float] = {}
    for key, value in (("eval/win_rate/ppo_vs_sft", 0.6), ("eval/win_rate/sft_vs_base_prompted", 0.6),
                       ("eval/win_rate/ppo_vs_base_prompted", 0.7), ("eval/win_rate/small_ppo_vs_base_prompted", 0.6),
                       ("tax_of/sft/mean", 0.5), ("tax_of/ppo/mean", 0.7),
                       ("tax_between/sft/ppo/mean", 0.2), ("tax_between/sft/ppo_ptx/mean", -0.1),
                       ("tax_between/sft/ppo_high_beta/mean", 0.18)):
        scores |= {key: value, f"{key}_low": value - 0.02, f"{key}_high": value + 0.02}
    for model in MODELS:
        good = 0.6 if model == "base_prompted" else 0.8
        scores |= {f"eval/{name}_{model}": good for name in ("gold", "truthful", "harmless", "toxic", "hallucination")}
    kl = [0.1 * step for step in range(60)]
    return {"scores": scores | changes.pop("scores", {}), "prompts": 1000,
            "rm": {"training": 0.72, "held_out": 0.7, "training_stderr": 0.005, "held_out_stderr": 0.006},
            "free_run": [{"kl": value, "rm_score": value, "gold": 6 - 0.1 * (value - 2) ** 2} for value in kl],
            "best_of_n": [{"gold": 6.0}, {"gold": 6.2}],
            "parameters": {"base": 880_000, "small_base": 240_000}} | changes


def test_all_claims_hold_on_numbers_like_the_paper_s() -> None:
    claims = judge_claims([numbers(), numbers()])
    assert len(claims) == len(CLAIMS) == 8
    assert all(claim["holds"] for claim in claims), [claim["claim"] for claim in claims if not claim["holds"]]
    assert set(claims[0]) >= {"claim", "paper", "ours", "low", "high", "holds"}
    assert (claims[0]["ours"], claims[0]["lowest"]) == (pytest.approx(0.6), pytest.approx(0.58))


@pytest.mark.parametrize(("failing", "change"), [
    (0, {"scores": {"eval/win_rate/small_ppo_vs_base_prompted_low": 0.49}}),
    (1, {"scores": {"eval/win_rate/ppo_vs_sft_low": 0.5}}),
    (1, {"scores": {"eval/win_rate/sft_vs_base_prompted_low": 0.4}}),
    (2, {"rm": {"training": 0.75, "held_out": 0.68, "training_stderr": 0.005, "held_out_stderr": 0.006}}),
    (3, {"scores": {"tax_between/sft/ppo/mean_low": -0.01}}),
    (4, {"scores": {"tax_between/sft/ppo_ptx/mean_high": 0.1}}),  # half of PPO's own tax: 0.09 at its low end
    (5, {"scores": {"tax_between/sft/ppo_high_beta/mean_low": 0.1}}),  # 0.11 at its high end
    (6, {"scores": {"eval/truthful_ppo": 0.61}}),
    (6, {"scores": {"eval/harmless_ppo": 0.6}}),
    (7, {"free_run": [{"kl": 0.1 * step, "rm_score": step, "gold": 5 + 0.01 * step} for step in range(60)]}),
    (7, {"free_run": [{"kl": 0.1 * step, "rm_score": -step, "gold": 6 - 0.1 * (0.1 * step - 2) ** 2}
                      for step in range(60)]}),
])
def test_one_seed_that_disagrees_is_enough(failing: int, change: dict[str, Any]) -> None:
    claims = judge_claims([numbers(), numbers(**change), numbers()])
    assert [number for number, claim in enumerate(claims) if not claim["holds"]] == [failing]
    text = page(claims, {1: numbers(), 2: numbers(**change)}, "cpu")
    assert "7 of 8 hold" in " ".join(text.split())
    assert [line.split()[2] for line in text.splitlines() if "does not hold: " in line] == [str(failing + 1)]


def test_what_sft_has_lost_is_no_tax_of_ppo() -> None:
    """Half of the base's score gone before PPO begins, and nothing after."""
    lost = {"tax_of/sft/mean": 0.5, "tax_of/ppo/mean": 0.5, "tax_between/sft/ppo/mean": 0.0,
            "tax_between/sft/ppo/mean_low": -0.02, "tax_between/sft/ppo/mean_high": 0.02}
    assert not judge_claims([numbers(scores=lost)])[3]["holds"]


def test_seeds_that_scatter_are_not_enough() -> None:
    """Each seed's own interval is above the bar, and three so different seeds say nothing about a fourth."""
    seeds = [numbers(scores={f"tax_between/sft/ppo/mean{end}": value + error
                             for end, error in (("", 0.0), ("_low", -0.001), ("_high", 0.001))})
             for value in (0.002, 0.01, 0.06)]
    claim = judge_claims(seeds)[3]
    assert claim["lowest"] > 0
    mean, half = 0.024, 4.302653 * 0.0314325 / 3**0.5  # Student's t for two degrees of freedom; the deviation by hand
    assert [claim["ours"], claim["low"], claim["high"]] == pytest.approx([mean, mean - half, mean + half], abs=1e-4)
    assert not claim["holds"]
    assert "each of the 3 seeds (0.002, 0.010, 0.060) meets the bar by its own interval" in missing(
        judge_claims(seeds))[0]


def test_only_values_that_differ_from_the_default_name_a_study() -> None:
    """So a parameter that is new does not change what was measured before it."""
    assert _changed(SftParams()) == {}
    assert _changed(SftParams(epochs=7, lr=1e-4)) == {"epochs": 7, "lr": 1e-4}


def test_a_win_rate_is_read_either_way_round() -> None:
    swapped = numbers()
    for name in ("", "_low", "_high"):
        swapped["scores"].pop(f"eval/win_rate/small_ppo_vs_base_prompted{name}")
    swapped["scores"] |= {"eval/win_rate/base_prompted_vs_small_ppo": 0.4,
                          "eval/win_rate/base_prompted_vs_small_ppo_low": 0.38,
                          "eval/win_rate/base_prompted_vs_small_ppo_high": 0.42}
    first = judge_claims([swapped])[0]
    assert [first["ours"], first["lowest"], first["highest"]] == pytest.approx([0.6, 0.58, 0.62])


@pytest.fixture
def params(tmp_path: Path) -> Params:
    text = PROFILE
    for before, after in (("steps: 120", "steps: 20"), ("epochs: 8", "epochs: 1"), ("epochs: 3", "epochs: 1"),
                          ("episodes: 320", "episodes: 96")):
        text = text.replace(before, after)
    (tmp_path / "mini.yaml").write_text(text)
    return Params(1, "mini", load_profile(tmp_path / "mini.yaml"))


def test_a_tiny_study_and_its_second_run(params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    claims = study(params, [1], tmp_path)
    text = (tmp_path / "docs" / "claims.md").read_text()
    assert json.loads((tmp_path / "metrics" / "claims.json").read_text()) == claims
    assert text.count("\n| ") > 20
    assert "took" in capsys.readouterr().out
    folder, = (tmp_path / "scratch" / "study").glob("*/seed-1")
    assert {"base", "small_base", "sft", "rm", "ppo", "ppo_ptx", "ppo_free", "small_ppo"} <= {
        path.name for path in folder.iterdir()}

    def never(*arguments: Any) -> None:
        raise AssertionError("trained again")

    for name in ("pretrain", "sft", "train_ppo", "train_reward_model"):
        monkeypatch.setattr(mlops.tools.study, name, never)
    (tmp_path / "metrics" / "study" / "seed-1.json").unlink()
    shutil.rmtree(folder / "scores")  # a measurement that was interrupted
    assert study(params, [1], tmp_path) == claims
    shutil.rmtree(tmp_path / "scratch")  # another day, another machine: the numbers in git are enough
    monkeypatch.setattr("mlops.tools.study.run_seed", lambda seed: pytest.fail("was measured again"))
    assert study(params, [1], tmp_path) == claims
    assert (tmp_path / "docs" / "claims.md").read_text() == text


def test_without_an_arm_with_ptx_there_is_no_study(params: Params, tmp_path: Path) -> None:
    plain = {name: dataclasses.replace(arm, ptx_coef=0.0) for name, arm in params.stages.arms.items()}
    with pytest.raises(UserError, match="no arm of the profile has ptx_coef > 0"):
        study(dataclasses.replace(params, stages=dataclasses.replace(params.stages, arms=plain)), [1], tmp_path)


def test_people_s_data_has_no_truth_to_judge_by(params: Params, tmp_path: Path) -> None:
    described = load_profile(REPO / "profiles" / "gpu.yaml")
    with pytest.raises(UserError, match="needs the embedded source"):
        study(Params(1, "gpu", described), [1], tmp_path)
