"""Runs by name, and side by side: what differs, what came out, a page; the newest policy."""

import io
import json
import os
from pathlib import Path

import pytest
from rich.console import Console

from mlops.config.loader import load_profile, write_resolved
from mlops.printing import show_table
from mlops.tools.compare import goal_note, policies_of, result_rows, show, write_page
from mlops.tools.runs import Run, differing, find_run, newest_policy, policy_folder, runs_of
from mlops.tools.status import run_table
from rlhf.errors import UserError

COLUMNS = "step,ppo/kl,ppo/kl_smoothed,ppo/kl_goal,ppo/beta,ppo/rm_score"


def make_run(folder: Path, goal: float, arms: str = "ppo: {}", trained: tuple[str, ...] = ("ppo",),
             model: str = "") -> None:
    (folder / "profiles").mkdir(parents=True)
    (folder / "build").mkdir()
    (folder / "params.yaml").write_text("seed: 1\nprofile: p\n" + (
        "arms: [ppo, ptx]\npromoted: ptx\n" if "ptx" in arms else ""))
    (folder / "profiles" / "p.yaml").write_text(
        f"pretrain: {{base_model: {model!r}}}\n"
        f"ppo: {{kl_goal: {goal}}}\narms: {{{arms}}}\n" + ("promote: {arm: ptx}\n" if "ptx" in arms else ""))
    write_resolved(load_profile(folder / "profiles" / "p.yaml"), folder)
    for arm in trained:
        (folder / "models" / "policies" / arm).mkdir(parents=True)
        (folder / "models" / "policies" / arm / "config.json").write_text("{}")
        (folder / "metrics" / "policies").mkdir(parents=True, exist_ok=True)
        (folder / "metrics" / "policies" / f"{arm}.csv").write_text(
            f"{COLUMNS}\n" + "".join(f"{step},{goal * step / 9},{goal * step / 9},{goal},0.1,{step}\n"
                                     for step in range(1, 10)))
    if not trained:
        return
    (folder / "metrics" / "evaluate.json").write_text(json.dumps({
        "eval/arm": "ppo", "eval/prompts": 50, "eval/kl_ppo": goal, "eval/kl_ppo_low": goal / 2,
        "eval/kl_ppo_high": goal * 2, "eval/win_rate/ppo_vs_sft": 0.6}))
    (folder / "metrics" / "promote.json").write_text(json.dumps({"reasons": [] if goal > 1 else ["KL"]}))
    (folder / "reports").mkdir()
    (folder / "reports" / "report.html").write_text("")
    (folder / "models" / "promoted").mkdir()


def test_what_git_has_of_the_reference_run_is_no_result_of_this_one(tmp_path: Path) -> None:
    """A clone and a run that failed showed the committed metrics as their own."""
    make_run(tmp_path, 2)
    run = Run("checkout", tmp_path)
    assert run.metrics("evaluate")["eval/prompts"] == 50
    (tmp_path / "reports" / "report.html").unlink()
    assert (run.metrics("evaluate"), run.metrics("promote")) == ({}, {"reasons": []})
    (tmp_path / "models" / "policies" / "ppo" / "config.json").unlink()
    assert run.metrics("promote") == {}


def test_a_goal_that_could_not_act_is_said(tmp_path: Path) -> None:
    make_run(tmp_path, 2)
    path = tmp_path / "metrics" / "evaluate.json"
    assert goal_note(policies_of([Run("checkout", tmp_path)])[0]) == ""
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eval/kl_ppo": 0.17}))
    assert goal_note(policies_of([Run("checkout", tmp_path)])[0]).startswith(
        "its KL of 0.17 nats is far from its goal of 2 after 9 iterations")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_run(tmp_path, 2)
    for goal in (0.3, 0.6):
        make_run(tmp_path / "scratch" / "workspaces" / f"p,kl_goal={goal}", goal)
    make_run(tmp_path / "scratch" / "workspaces" / "p,sft.epochs=3", 2, trained=())
    return tmp_path


def test_runs_by_name(root: Path) -> None:
    assert [run.name for run in runs_of(root)] == ["checkout", "p,kl_goal=0.3", "p,kl_goal=0.6", "p,sft.epochs=3"]
    for wanted, name in (("checkout", "checkout"), (".", "checkout"), ("kl_goal=0.3", "p,kl_goal=0.3"),
                         ("epochs", "p,sft.epochs=3"), (str(root / "scratch/workspaces/p,kl_goal=0.6"),
                                                        "p,kl_goal=0.6")):
        assert find_run(root, wanted).name == name
    with pytest.raises(UserError, match=r"kl_goal: several runs are called so: p,kl_goal=0.3, p,kl_goal=0.6"):
        find_run(root, "kl_goal")
    with pytest.raises(UserError, match=r"nowhere: no such run: checkout, p,kl_goal=0.3"):
        find_run(root, "nowhere")


def test_what_differs_and_what_came_out(root: Path) -> None:
    runs = [find_run(root, "kl_goal=0.3"), find_run(root, "kl_goal=0.6"), find_run(root, "checkout")]
    assert differing(runs) == {"ppo.kl_goal": [0.3, 0.6, 2.0]}
    rows = dict(result_rows(policies_of(runs)))
    assert rows["KL to SFT, nats"] == ["0.300 [0.150, 0.600]", "0.600 [0.300, 1.20]", "2.00 [1.00, 4.00]"]
    assert rows["win rate against SFT"] == ["60.0\u202f%"] * 3 or rows["win rate against SFT"][0].startswith("60")
    assert rows["gates"] == ["missed 1", "missed 1", "passed"]
    assert rows["held-out prompts"] == ["50"] * 3
    assert "gold score" not in rows  # nobody measured it
    with pytest.raises(UserError, match=r"p,sft.epochs=3: has no trained policy yet"):
        policies_of([find_run(root, "epochs")])


def test_names_and_paths_are_whole_in_a_narrow_terminal(root: Path) -> None:
    model = f"/home/someone/{'long folder/' * 6}model"
    name = f"p,base_model=_home_{'long_' * 12}"
    make_run(root / "scratch" / "workspaces" / name, 1, model=model)
    runs = [find_run(root, "kl_goal=0.3"), find_run(root, name)]
    printed = io.StringIO()
    console = Console(file=printed, width=60)
    show(runs, policies_of(runs), console)
    assert model in printed.getvalue()
    assert printed.getvalue().count(name) == 2
    show_table(run_table(runs), console)
    assert printed.getvalue().count(name) == 3


def test_the_page_has_every_curve_and_no_script(root: Path) -> None:
    runs = [find_run(root, "kl_goal=0.3"), find_run(root, "kl_goal=0.6")]
    write_page(runs, policies_of(runs), root / "compare.html")
    page = (root / "compare.html").read_text()
    assert page.count("<svg") == 3  # KL, beta, reward-model score
    assert "<script" not in page
    assert "<td>ppo.kl_goal</td><td>0.3</td><td>0.6</td>" in page
    write_page(runs, policies_of(runs), root / "again.html")
    assert (root / "again.html").read_text() == page


def test_several_arms_of_a_run(tmp_path: Path) -> None:
    make_run(tmp_path, 1, "ppo: {}, ptx: {ptx_coef: 0.5}", ("ppo", "ptx"))
    policies = policies_of([Run("checkout", tmp_path)])
    assert [policy.name for policy in policies] == ["checkout · ppo", "checkout · ptx"]
    assert Run("checkout", tmp_path).parameters()["arms.ptx.ptx_coef"] == 0.5
    assert dict(result_rows(policies))["KL to SFT, nats"] == ["1.00 [0.500, 2.00]", "–"]


def test_the_newest_policy_is_that_of_whichever_run(root: Path) -> None:
    for when, name in enumerate(("models", "scratch/workspaces/p,kl_goal=0.6/models",
                                 "scratch/workspaces/p,kl_goal=0.3/models"), start=1):
        os.utime(root / name / "policies/ppo/config.json", (when, when))
    found = newest_policy(root)
    assert found is not None
    assert (found[0].name, found[1]) == ("p,kl_goal=0.3", "ppo")
    assert policy_folder(root, "kl_goal=0.3:ppo") == root / "scratch/workspaces/p,kl_goal=0.3/models/policies/ppo"
    assert policy_folder(root, "ppo") == root / "models/policies/ppo"
    assert policy_folder(root, "none") is None
    assert policy_folder(root, "checkout:sft") is None
