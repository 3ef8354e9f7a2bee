"""Two arms of PPO: trained one by one, compared with each other, one of them promoted."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlops.config.arms import write_arms
from mlops.config.loader import load_params
from tasks.stage import config_hash
from tests.tasks.small_pipeline import PROFILE, SmallPipeline, Undisturbed

ARMS = "arms: {ppo: {}, plain: {ptx_coef: 0, episodes: 64, lr: 0.002, warmup_iterations: 0}}\n"
OPEN = ("promote: {arm: ARM, registry: '', min_win_rate: 0, kl_band: 1000000, max_tax: 1, max_mean_tax: 1, "
        "max_toxic: 1}")


def profile_of(arm: str) -> str:
    """The small profile with two arms, of which `arm` is promoted, and a further model to compare them with."""
    changed = PROFILE.replace("promote: {}", OPEN.replace("ARM", arm))
    return changed.replace("best_of: 4", "best_of: 4, others: {peer: models/sft}") + ARMS


def failed(pipeline: SmallPipeline, stage: str, *flags: str) -> str:
    """The one line of a stage that a mistake ends."""
    process: subprocess.Popen[str] = pipeline.start(stage, *flags)
    _, err = process.communicate(timeout=600)
    assert (process.returncode, err.count("\n")) == (2, 1), err
    return err


@pytest.fixture(scope="module")
def two(small_pipeline: SmallPipeline, undisturbed: Undisturbed) -> Iterator[SmallPipeline]:
    """The small pipeline with a second arm, trained and evaluated; as it was afterwards."""
    root = small_pipeline.root
    profile, params = root / "profiles" / "mini.yaml", (root / "params.yaml").read_text()
    profile.write_text(profile_of("plain"))
    write_arms(root)
    small_pipeline.finish("ppo", "--arm", "plain")
    small_pipeline.finish("evaluate")
    try:
        yield small_pipeline
    finally:
        profile.write_text(PROFILE)
        (root / "params.yaml").write_text(params)
        for path in (*root.glob("metrics/policies/plain.*"), *root.glob("models/policies/plain/*")):
            path.unlink()
        (root / "models" / "policies" / "plain").rmdir()


def evaluation(root: Path) -> dict[str, Any]:
    return dict(json.loads((root / "metrics" / "evaluate.json").read_text()))


def test_bits_of_another_tokenizer_are_not_compared(two: SmallPipeline) -> None:
    found = evaluation(two.root)
    assert found["eval/gold_peer"] == found["eval/gold_sft"]
    assert "tax_of/peer/mean" in found
    assert {key.split("/")[1] for key in found if key.startswith("corpus_bits/")} == {"base", "sft", "ppo", "plain"}


def test_an_arm_of_the_same_parameters_gives_the_same_bytes(two: SmallPipeline, undisturbed: Undisturbed) -> None:
    assert two.files("ppo") == undisturbed["ppo"]
    assert "a run with these inputs has finished" in two.start("ppo", "--arm", "ppo", "--status").communicate()[0]
    assert (two.root / "metrics" / "policies" / "plain.csv").read_text().count("\n") == 1 + 64 // 16
    weights = [(two.root / "models" / "policies" / arm / "model.safetensors").read_bytes() for arm in ("ppo", "plain")]
    assert weights[0] != weights[1]


def test_which_arm_is_meant_is_asked_where_there_are_several(two: SmallPipeline) -> None:
    assert failed(two, "ppo").startswith("ppo: which arm? --arm must be one of ppo, plain (section arms of ")
    assert failed(two, "ppo", "--arm", "ptx").startswith("ppo: no arm ptx: must be one of ppo, plain (")


def test_the_evaluation_has_every_arm_and_what_lies_between_them(two: SmallPipeline) -> None:
    found = evaluation(two.root)
    assert (found["eval/arm"], found["eval/arms"]) == ("plain", ["ppo", "plain"])
    for arm in ("ppo", "plain"):
        assert {f"eval/{name}_{arm}" for name in ("gold", "kl", "toxic", "rm_score", "strength")} <= found.keys()
        assert f"eval/win_rate/{arm}_vs_sft_low" in found
        for step in (f"eval/gold_gain/{arm}_vs_sft", f"tax_of/{arm}/mean", f"tax_between/sft/{arm}/mean"):
            assert found[f"{step}_low"] <= found[step] <= found[f"{step}_high"], step
        own = found[f"tax_of/{arm}/mean"] - found["tax_of/sft/mean"]  # what PPO itself costs
        assert found[f"tax_between/sft/{arm}/mean"] == pytest.approx(own)
        assert found[f"eval/gold_gain/{arm}_vs_sft"] == pytest.approx(
            found[f"eval/gold_{arm}"] - found["eval/gold_sft"])
    assert found["tax_between/ppo/plain/mean"] == pytest.approx(
        found["tax_of/plain/mean"] - found["tax_of/ppo/mean"])
    assert found["eval/gold_gain/plain_vs_ppo"] == pytest.approx(found["eval/gold_plain"] - found["eval/gold_ppo"])
    assert found["eval/win_rate_vs_sft"] == found["eval/win_rate/plain_vs_sft"]  # those without a name: the promoted
    assert found["eval/gold_gain_vs_sft"] == found["eval/gold_gain/plain_vs_sft"]
    assert "eval/win_rate_vs_ppo" in found
    assert found["tax/mean"] == found["tax_of/plain/mean"]
    assert {"overopt/ppo_peak_kl", "overopt/plain_peak_kl"} <= found.keys()
    page = (two.root / "reports" / "report.html").read_text()
    assert page.count("goes to the gates") == 1


def test_the_named_arm_is_promoted_and_the_card_has_every_step(two: SmallPipeline) -> None:
    said = two.finish("promote")
    assert "promote: the policy passes every gate" in said
    folder = two.root / "models"
    assert (folder / "promoted" / "model.safetensors").read_bytes() == (
        folder / "policies" / "plain" / "model.safetensors").read_bytes()
    card = (folder / "promoted" / "README.md").read_text()
    assert "| | base | SFT | PPO | plain |" in card
    assert "| PPO (arm `plain`) | 64 episodes" in card
    assert "This model is in bold." in card
    [tax] = [line for line in card.splitlines() if line.startswith("| tax of PPO, mean |")]
    assert tax.count("|") == 6
    assert tax.count("**") == 2


def test_what_is_of_no_arm_is_refused(two: SmallPipeline) -> None:
    path = two.root / "models" / "policies" / "old"
    path.mkdir()
    try:
        assert failed(two, "evaluate").startswith("evaluate: models/policies/old: is of no arm of the profile")
    finally:
        path.rmdir()


def test_an_arm_s_key_covers_its_own_parameters_only(two: SmallPipeline) -> None:
    profile = two.root / "profiles" / "mini.yaml"

    def keys(text: str) -> list[str]:
        profile.write_text(text)
        params = load_params(two.root)
        return [config_hash(name, params, two.root) for name in ("ppo@ppo", "ppo@plain", "evaluate")]

    text = profile_of("plain")
    try:
        before = keys(text)
        other = keys(text.replace("episodes: 64", "episodes: 80"))
        assert [one == two_ for one, two_ in zip(before, other, strict=True)] == [True, False, False]
        # plain has its own number of episodes, so that of section ppo is none of its parameters
        other = keys(text.replace("episodes: 320", "episodes: 336"))
        assert [one == two_ for one, two_ in zip(before, other, strict=True)] == [False, True, False]
        gate = keys(text.replace("max_toxic: 1", "max_toxic: 0.9"))
        assert gate == before
    finally:
        profile.write_text(text)
