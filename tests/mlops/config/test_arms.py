"""The arms in params.yaml: written as the profile says, and nothing left of those that are gone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mlops.config.arms import refuse_leftovers, write_arms
from mlops.config.loader import load_params
from rlhf.errors import UserError

REPO = Path(__file__).resolve().parents[3]
TWO = "arms: {ppo: {}, ppo_ptx: {ptx_coef: 0.5}}\npromote: {arm: ppo_ptx}\n"
LOCK = {"stages": {"ppo@old": {"outs": [{"path": f"{folder}/policies/{name}", "hash": "md5", "md5": "1"}
                                        for folder, name in (("models", "old"), ("metrics", "old.csv"),
                                                             ("metrics", "old.json"))]}}}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "one.yaml").write_text("arms: {ppo: {}}\n")
    (tmp_path / "profiles" / "two.yaml").write_text(TWO)
    (tmp_path / "params.yaml").write_text("# mine\nseed: 7 # why\nprofile: one # which\n# rounds\nrounds: {}\n")
    return tmp_path


def command(root: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", "mlops.config.arms", *arguments], cwd=root, text=True,
                          capture_output=True, env={**os.environ, "PYTHONPATH": str(REPO)})


def made(root: Path, *names: str) -> None:
    """What the arms of these names have made."""
    for name in names:
        (root / "models" / "policies" / name).mkdir(parents=True)
        (root / "models" / "policies" / name / "config.json").write_text("{}")
        for ending in ("csv", "json"):
            (root / "metrics" / "policies").mkdir(parents=True, exist_ok=True)
            (root / "metrics" / "policies" / f"{name}.{ending}").write_text("")


def test_the_command_writes_profile_and_arms_and_nothing_else(root: Path) -> None:
    done = command(root, "--profile", "two")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "profile: two\narms: [ppo, ppo_ptx]\npromoted: ppo_ptx\n"
    text = (root / "params.yaml").read_text()
    assert text == ("# mine\nseed: 7 # why\nprofile: two # which\narms: [ppo, ppo_ptx]\npromoted: ppo_ptx\n"
                    "# rounds\nrounds: {}\n")
    before = (root / "params.yaml").stat()
    write_arms(root)
    assert (root / "params.yaml").stat() == before
    write_arms(root, "one")
    assert (root / "params.yaml").read_text() == text.replace("two", "one").replace("[ppo, ppo_ptx]", "[ppo]").replace(
        "promoted: ppo_ptx", "promoted: ppo")


def test_a_list_over_several_lines_is_replaced(root: Path) -> None:
    (root / "params.yaml").write_text("arms:\n- ppo\n- old\n# here\nprofile: two\npromoted: old\nseed: 7")
    write_arms(root)
    assert (root / "params.yaml").read_text() == (
        "arms: [ppo, ppo_ptx]\n# here\nprofile: two\npromoted: ppo_ptx\nseed: 7")
    assert load_params(root).stages.promoted == "ppo_ptx"


def test_an_unknown_profile_is_one_line_and_changes_nothing(root: Path) -> None:
    before = (root / "params.yaml").read_text()
    done = command(root, "--profile", "three")
    assert (done.returncode, done.stderr) == (2, "arms: profiles/three.yaml: no such file\n")
    assert (root / "params.yaml").read_text() == before


def test_what_an_earlier_arm_has_made_is_refused_and_removed(root: Path) -> None:
    made(root, "ppo", "old")
    (root / "dvc.lock").write_text(yaml.safe_dump(LOCK))
    with pytest.raises(UserError, match=r"models/policies/old: is of no arm of the profile \(ppo\); `python -m mlops"):
        refuse_leftovers(root, ["ppo"])
    write_arms(root)
    refuse_leftovers(root, ["ppo"])
    assert sorted(path.name for path in root.glob("m*/policies/*")) == ["ppo", "ppo.csv", "ppo.json"]


def test_what_no_stage_has_made_is_somebody_s_and_stays(root: Path) -> None:
    made(root, "ppo", "old")
    (root / "dvc.lock").write_text(yaml.safe_dump(LOCK))
    made(root, "mine")
    with pytest.raises(UserError, match=r"models/policies/mine: is of no arm \(ppo\) and not in dvc.lock; move it"):
        write_arms(root)
    assert (root / "models" / "policies" / "old").is_dir()
