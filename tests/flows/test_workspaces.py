"""Runs in workspaces: what is copied, what is shared, what is changed, what stays as it was."""

import re
import subprocess
from pathlib import Path

import pytest

from flows.stages import StageFailed
from flows.summary import Summary
from flows.workspaces import FOLDER, Changes, checkout_of, fill_workspace, tracking_of
from mlops.config.arms import write_arms
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
    assert Changes(stages={"sft": {"epochs": 3}, "arms.ptx": {"lr": 0.1}}).name(root) == (
        "small,arms.ptx.lr=0.1,sft.epochs=3")
    odd = [Changes(stages={"pretrain": {"base_model": name}}).name(root) for name in ("a/b", "a_b", "a b", "x" * 300)]
    assert len(set(odd)) == 4  # different changes never share a workspace
    assert all(re.fullmatch(r"[\w.,=+-]{1,140}", name) for name in odd)
    assert not Changes("large")
    assert Changes(seed=0)


def test_a_changed_run_leaves_the_checkout_as_it_is(repository: Checkout) -> None:
    root = repository.root
    assert isinstance(repository.run(), Summary)
    before = status(root)
    result = repository.run(kl_goal=1.5, seed=7)
    assert isinstance(result, Summary), result
    workspace = root / FOLDER / "small,seed=7,kl_goal=1.5"
    # the shared cache has sft, ppo's parameters differ
    assert [(item.stage, item.how) for item in result.results] == [("sft", "from cache"), ("ppo", "ran")]
    assert (workspace / "models" / "ppo").read_text().splitlines() == ["  kl_goal: 1.5", f"sqlite:///{root}/mlflow.db"]
    params = load_params(workspace)
    assert (params.seed, params.stages.ppo.kl_goal, params.stages.ppo.beta) == (7, 1.5, 0.2)
    assert params.stages.promote.registry == ""  # a workspace promotes nothing
    assert status(root) == before
    assert (root / "models" / "ppo").read_text().startswith("ppo: {kl_goal: 3.0")
    assert checkout_of(workspace) == root
    assert tracking_of(root) == {}

    assert [item.how for item in repository.run(kl_goal=1.5, seed=7).results] == ["up to date", "up to date"]


def test_a_workspace_follows_the_checkout(repository: Checkout) -> None:
    root, workspace = repository.root, repository.root / "scratch" / "workspace"
    repository.write("old.py", "")
    fill_workspace(root, workspace, Changes())
    (workspace / "dvc.lock").write_text("schema: '2.0'  # the workspace's own\n")
    (workspace / "order.log").write_text("made by the workspace\n")
    (root / "old.py").unlink()
    repository.write("sft.sh", "exit 0\n")
    repository.write("dvc.lock", "schema: '2.0'  # the checkout's\n")
    fill_workspace(root, workspace, Changes())
    assert not (workspace / "old.py").exists()
    assert (workspace / "sft.sh").read_text() == "exit 0\n"
    assert (workspace / "dvc.lock").read_text() == "schema: '2.0'  # the workspace's own\n"
    assert (workspace / "order.log").exists()


def test_raw_files_come_along_without_a_second_copy(repository: Checkout) -> None:
    root, workspace = repository.root, repository.root / "scratch" / "workspace"
    repository.write("raw/mine.jsonl", "{}\n")
    fill_workspace(root, workspace, Changes())
    assert (workspace / "raw" / "mine.jsonl").samefile(root / "raw" / "mine.jsonl")


def test_without_git_there_is_no_workspace(checkout: Checkout) -> None:
    failed = checkout.run(kl_goal=1.0)
    assert isinstance(failed, UserError)
    assert "git says: fatal: not a git repository" in str(failed)
    assert checkout.order() == []


def test_a_parameter_out_of_range_is_refused_before_anything_runs(repository: Checkout) -> None:
    allowed = "step, step_ahead, proportional, fixed"
    with pytest.raises(UserError, match=rf"ppo\.beta_rule = 'slow': must be one of {allowed}"):
        fill_workspace(repository.root, repository.root / "scratch" / "workspace",
                       Changes(stages={"ppo": {"beta_rule": "slow"}}))


def test_a_stage_that_takes_too_long_is_ended(checkout: Checkout) -> None:
    checkout.write("sft.sh", "sleep 3600\n")
    seconds = 1.5
    while not checkout.order():  # in too few seconds DVC does not get as far as the stage
        failed = checkout.run(stage_hours=seconds / 3600)
        assert isinstance(failed, StageFailed)
        assert failed.code == 124
        assert str(failed).startswith(f"sft: ended after {seconds / 3600:g} h (stage_hours)")
        seconds *= 2
    assert checkout.order() == ["sft"]  # no second try


def test_a_changed_parameter_of_ppo_holds_for_every_arm_and_equal_arms_are_trained_once(repository: Checkout) -> None:
    root, workspace = repository.root, repository.root / "scratch" / "workspace"
    repository.write("profiles/small.yaml", "ppo: {kl_goal: 3.0}\npromote: {arm: ptx}\n"
                     "arms: {plain: {}, ptx: {ptx_coef: 0.5}, low: {kl_goal: 1.0, ptx_coef: 0.2}}\n")
    write_arms(root)
    fill_workspace(root, workspace, Changes(stages={"ppo": {"kl_goal": 2.0}}))
    stages = load_params(workspace).stages
    assert {name: (arm.kl_goal, arm.ptx_coef) for name, arm in stages.arms.items()} == {
        "plain": (2, 0), "ptx": (2, 0.5), "low": (2, 0.2)}
    assert stages.promoted == "ptx"
    fill_workspace(root, workspace, Changes(stages={"ppo": {"ptx_coef": 0.1}}))
    stages = load_params(workspace).stages
    assert {name: (arm.kl_goal, arm.ptx_coef) for name, arm in stages.arms.items()} == {
        "plain": (3, 0.1), "low": (1, 0.1)}
    assert stages.promoted == "plain"  # the same as ptx now
    assert (workspace / "params.yaml").read_text().count("arms: [plain, low]") == 1
    assert load_params(root).stages.promoted == "ptx"
