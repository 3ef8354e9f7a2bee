"""Lines in copies of a checkout: what is copied, what is shared, what is changed, what stays as it was."""

import subprocess
from pathlib import Path

import pytest

from flows.stages import StageFailed
from flows.summary import Summary
from flows.workspaces import FOLDER, Changes, checkout_of, fill_workspace, tracking_of
from mlops.config.loader import load_params
from rlhf.errors import UserError
from tests.flows.checkout import Checkout

STAGES = """stages:
  sft:
    cmd: echo sft >> order.log && sh sft.sh
    deps: [sft.sh]
    outs: [models/sft]
  ppo:
    cmd: echo ppo >> order.log && grep kl_goal profiles/small.yaml > models/ppo; echo $MLFLOW_TRACKING_URI >> models/ppo
    deps: [models/sft]
    params: [{"profiles/${profile}.yaml": [ppo]}]
    outs: [models/ppo]
"""


@pytest.fixture
def repository(checkout: Checkout) -> Checkout:
    checkout.write("dvc.yaml", "vars: [params.yaml]\n" + STAGES)
    checkout.write("profiles/small.yaml", "# comments stay here\nppo: {kl_goal: 3.0, beta: 0.2}\n")
    checkout.git()
    return checkout


def status(root: Path) -> str:
    return subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, check=True).stdout


def test_names_tell_the_changes(repository: Checkout) -> None:
    root = repository.root
    assert Changes().name(root) == "small"
    assert Changes("large", 3, {"ppo": {"kl_goal": 1.5, "beta_rule": "fixed"}}).name(root) == (
        "large,seed=3,beta_rule=fixed,kl_goal=1.5")
    assert Changes(label="champion-3").name(root) == "small,champion-3"
    assert not Changes("large")
    assert Changes(seed=0)


def test_a_changed_line_leaves_the_checkout_as_it_is(repository: Checkout) -> None:
    root = repository.root
    assert isinstance(repository.run(), Summary)
    before = status(root)
    result = repository.run(kl_goal=1.5, seed=7)
    assert isinstance(result, Summary), result
    copy = root / FOLDER / "small,seed=7,kl_goal=1.5"
    # the shared cache has sft, ppo's parameters differ
    assert [(item.stage, item.how) for item in result.results] == [("sft", "from cache"), ("ppo", "ran")]
    assert (copy / "models" / "ppo").read_text().splitlines() == ["  kl_goal: 1.5", f"sqlite:///{root}/mlflow.db"]
    params = load_params(copy)
    assert (params.seed, params.stages.ppo.kl_goal, params.stages.ppo.beta) == (7, 1.5, 0.2)
    assert params.stages.promote.registry == ""  # a copy promotes nothing
    assert status(root) == before
    assert (root / "models" / "ppo").read_text().startswith("ppo: {kl_goal: 3.0")
    assert checkout_of(copy) == root
    assert tracking_of(root) == {}

    assert [item.how for item in repository.run(kl_goal=1.5, seed=7).results] == ["up to date", "up to date"]


def test_a_copy_follows_the_checkout(repository: Checkout) -> None:
    root, copy = repository.root, repository.root / "scratch" / "copy"
    repository.write("old.py", "")
    fill_workspace(root, copy, Changes())
    (copy / "dvc.lock").write_text("the copy's own\n")
    (copy / "order.log").write_text("made by the copy\n")
    (root / "old.py").unlink()
    repository.write("sft.sh", "exit 0\n")
    repository.write("dvc.lock", "the checkout's\n")
    fill_workspace(root, copy, Changes())
    assert not (copy / "old.py").exists()
    assert (copy / "sft.sh").read_text() == "exit 0\n"
    assert (copy / "dvc.lock").read_text() == "the copy's own\n"
    assert (copy / "order.log").exists()


def test_raw_files_come_along_without_a_second_copy(repository: Checkout) -> None:
    root, copy = repository.root, repository.root / "scratch" / "copy"
    repository.write("raw/mine.jsonl", "{}\n")
    fill_workspace(root, copy, Changes())
    assert (copy / "raw" / "mine.jsonl").samefile(root / "raw" / "mine.jsonl")


def test_without_git_there_is_no_copy(checkout: Checkout) -> None:
    failed = checkout.run(kl_goal=1.0)
    assert isinstance(failed, UserError)
    assert "git says: fatal: not a git repository" in str(failed)
    assert checkout.order() == []


def test_a_parameter_out_of_range_is_refused_before_anything_runs(repository: Checkout) -> None:
    with pytest.raises(UserError, match=r"ppo\.beta_rule = 'slow': must be one of step, proportional, fixed"):
        fill_workspace(repository.root, repository.root / "scratch" / "copy", Changes(stages={"ppo": {"beta_rule": "slow"}}))


def test_a_stage_that_takes_too_long_is_ended(checkout: Checkout) -> None:
    checkout.write("sft.sh", "sleep 100\n")
    failed = checkout.run(stage_hours=1.5 / 3600)
    assert isinstance(failed, StageFailed)
    assert failed.code == 124
    assert str(failed).startswith("sft: ended after 0.000416667 h (stage_hours)")
    assert checkout.order() == ["sft"]  # no second try
