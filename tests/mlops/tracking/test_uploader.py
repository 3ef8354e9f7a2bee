"""What the uploader sends to a real MLflow store (SQLite), and when it leaves."""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from mlflow.entities import Run

from flows.workspaces import FOLDER, WORKSPACE_OF, end_runs_cut_short
from mlops.reporting.journals import RUN_MARK
from mlops.tracking import uploader
from mlops.tracking.locks import OLD_UPLOADER, take_lock
from mlops.tracking.mlflow_client import EXPERIMENT, MlflowTracker
from mlops.tracking.own_store import own_store
from mlops.tracking.parent_run import child_name
from mlops.tracking.upload_record import OLD_RECORD, RECORD, flow_of, unfinished
from mlops.tracking.uploader import Follower, ensure_uploader, wait_until_uploaded
from rlhf.errors import UserError
from rlhf.files import write_json
from rlhf.training.journal import Journal
from tests.mlops.tracking.uploaded import (
    CLOSED_PORT,
    DATA_MD5,
    assert_points_once,
    client,
    finish,
    runs,
    start,
    sweep,
    write_rows,
)


def test_growing_and_cut_back_journal_is_sent_once(root: Path) -> None:
    scratch = start(root)
    follower = Follower(root, MlflowTracker(root))
    assert follower.sweep()  # no journal yet
    write_rows(scratch, range(5))
    follower.sweep()
    assert_points_once(root, runs(root, "ppo")[0].info.run_id, range(5))
    start(root)  # killed, and resumed from the checkpoint of step 2
    follower.sweep()
    write_rows(scratch, range(3, 9), resume_after=2)
    follower.sweep()
    [run] = runs(root, "ppo")
    assert run.info.status == "RUNNING"
    finish(root, scratch)
    follower.sweep()
    follower.sweep()
    [run] = runs(root, "ppo")
    assert run.info.status == "FINISHED"
    assert_points_once(root, run.info.run_id, range(9))
    assert client(root).get_metric_history(run.info.run_id, "ppo/kl")[4].value == 0.4


def test_a_run_is_the_parent_of_its_stages(root: Path) -> None:
    (root / "models" / "ppo").mkdir(parents=True)
    (root / "models" / "ppo" / "config.json").write_text("{}")
    (root / "reports").mkdir()
    (root / "reports" / "report.html").write_text("<p>")
    scratch = start(root, "ppo")
    write_rows(scratch, range(3))
    finish(root, scratch, artifacts=["models/ppo", "models/none"])
    sweep(root)
    [parent] = runs(root, "brave-otter")
    assert parent.info.status == "RUNNING"
    finish(root, start(root, "promote"), 0.6, ["reports/report.html"])
    sweep(root)

    assert len(runs(root)) == 3
    [parent], [ppo], [promote] = runs(root, "brave-otter"), runs(root, "ppo"), runs(root, "promote")
    assert parent.info.status == promote.info.status == "FINISHED"
    assert parent.data.tags["instructflow.run_name"] == "brave-otter"
    assert ppo.data.tags["mlflow.parentRunId"] == promote.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert parent.data.params.items() >= {"seed": "7", "profile": "smoke", "ppo.kl_goal": "3.5",
                                          "sft.epochs": "2"}.items()
    assert ppo.data.params == {"seed": "7", "profile": "smoke", "ppo.kl_goal": "3.5", "ppo.beta_rule": "step"}
    assert ppo.data.tags.items() >= {"stage": "ppo", "profile": "smoke", "data_version": DATA_MD5,
                                     "beta_rule": "step"}.items()
    assert parent.data.metrics == {"detail/ppo/final": 0.75, "detail/promote/final": 0.6, "detail/ppo/kl": 1.5}
    assert ppo.data.metrics["ppo/final"] == 0.75
    assert ppo.data.metrics["ppo/kl"] == 0.2  # the journal's last, not a second point
    assert ppo.inputs is not None
    assert {(item.dataset.name, item.dataset.digest) for item in ppo.inputs.dataset_inputs} == {
        ("ppo", DATA_MD5), ("tax", DATA_MD5)}
    paths = [item.path for folder in ("models/ppo", "metrics") for item in client(root).list_artifacts(
        ppo.info.run_id, folder)]
    assert paths == ["models/ppo/config.json", "metrics/ppo.json"]
    assert (root / "mlartifacts" / promote.info.run_id / "artifacts" / "reports" / "report.html").exists()
    assert wait_until_uploaded(root, "brave-otter", 1) == {
        "stages": {"ppo": ppo.info.run_id, "promote": promote.info.run_id},
        "parent_run_id": parent.info.run_id, "experiment_id": parent.info.experiment_id}


def test_arms_are_runs_of_one_stage_and_stand_side_by_side_in_their_parent(root: Path) -> None:
    (root / "profiles" / "smoke.yaml").write_text(
        "ppo: {kl_goal: 3.5}\narms: {ppo: {}, ppo_ptx: {ptx_coef: 0.5}}\npromote: {arm: ppo_ptx}\n")
    (root / "params.yaml").write_text("seed: 7\nprofile: smoke\narms: [ppo, ppo_ptx]\npromoted: ppo_ptx\n")
    (root / "dvc.yaml").write_text("stages:\n  ppo:\n    foreach: ${arms}\n    do:\n      deps: [data/ppo.jsonl]\n")
    for arm, kl in (("ppo", 1.0), ("ppo_ptx", 2.0)):
        stage = f"ppo@{arm}"
        scratch = start(root, stage)
        write_json(scratch / "run.json", {**json.loads((scratch / "run.json").read_text()), "arm": arm,
                                          "params": {"kl_goal": 3.5, "ptx_coef": kl}})
        write_rows(scratch, range(3))
        metrics = {"ppo/kl_goal": 3.5, "ppo/gold_last": kl}
        write_json(root / "metrics" / "policies" / f"{arm}.json", metrics)
        write_json(scratch / "done.json", {"metrics": metrics, "artifacts": []})
        sweep(root)
    [parent] = runs(root, "brave-otter")
    found = {run.data.tags["arm"]: run for run in runs(root) if "arm" in run.data.tags}
    assert list(found) == ["ppo", "ppo_ptx"]
    for arm, run in found.items():
        assert run.info.run_name == f"{arm} · brave-otter"
        assert_points_once(root, parent.info.run_id, range(3), [f"{arm}/kl", f"{arm}/beta", f"{arm}/reward"])
        assert run.data.tags["stage"] == "ppo"
        assert run.data.params["arm"] == arm
        assert {"ppo/kl", "ppo/beta", "ppo/gold_last"} <= run.data.metrics.keys()  # the same keys: MLflow overlays them
        assert_points_once(root, run.info.run_id, range(3))
        assert [item.path for item in client(root).list_artifacts(run.info.run_id, "metrics/policies")] == [
            f"metrics/policies/{arm}.json"]
        assert run.inputs is not None
        assert [item.dataset.name for item in run.inputs.dataset_inputs] == ["ppo"]
    assert found["ppo_ptx"].data.params["ppo.ptx_coef"] == "2.0"
    assert parent.data.metrics.items() >= {"detail/ppo/gold_last": 1.0, "detail/ppo_ptx/gold_last": 2.0}.items()
    assert parent.inputs is not None
    assert {item.dataset.name for item in parent.inputs.dataset_inputs} == {"ppo"}
    assert parent.data.params.items() >= {"arms": "ppo, ppo_ptx", "promote.arm": "ppo_ptx",
                                          "arms.ppo_ptx.ptx_coef": "0.5", "ppo.ptx_coef": "0.0"}.items()


def test_rounds_are_steps_of_their_run(root: Path) -> None:
    for number in (1, 2):
        stage = f"round_scores@r{number}"
        scratch = start(root, stage)
        write_json(scratch / "run.json", {**json.loads((scratch / "run.json").read_text()), "round": number,
                                          "params": {"prompts": 30}})
        metrics = {"round/gold": 5.0 + number}
        write_json(root / "metrics" / f"{stage}.json", metrics)
        write_json(scratch / "done.json", {"metrics": metrics, "artifacts": []})
        sweep(root)
    [parent], [first] = runs(root, "brave-otter"), runs(root, "round_scores@r1")
    assert first.data.params["rounds.prompts"] == "30"
    points = client(root).get_metric_history(parent.info.run_id, "round/gold")
    assert [(point.step, point.value) for point in points] == [(1, 6.0), (2, 7.0)]
    assert parent.info.status == "FINISHED"
    assert [item.path for item in client(root).list_artifacts(first.info.run_id, "metrics")] == [
        "metrics/round_scores@r1.json"]


def test_plain_repro_gathers_a_configuration(root: Path) -> None:
    finish(root, start(root, "sft", run_name=""))
    finish(root, start(root, "rm", run_name=""))
    sweep(root)
    (root / "profiles" / "smoke.yaml").write_text("ppo:\n  kl_goal: 6.0\n")
    finish(root, start(root, "ppo", run_name=""))
    sweep(root)
    parents = {run.info.run_name.partition(" · ")[0]: run.data.tags["mlflow.parentRunId"] for run in runs(root)
             if "mlflow.parentRunId" in run.data.tags}
    assert parents["sft"] == parents["rm"] != parents["ppo"]
    assert client(root).get_run(parents["sft"]).info.run_name.startswith("repro-")
    assert client(root).get_run(parents["ppo"]).data.params["ppo.kl_goal"] == "6.0"


def test_run_again(root: Path) -> None:
    def again(run_name: str, win_rate: float) -> list[str]:
        scratch = start(root, run_name=run_name)
        write_rows(scratch, range(4))
        sweep(root)
        finish(root, scratch, win_rate)
        sweep(root)
        return [run.info.run_id for run in runs(root, "ppo")]

    first = again("one", 0.5)
    assert again("one", 0.5) == first
    assert len(again("two", 0.5)) == 2
    assert len(again("two", 0.6)) == 3, "another result must not be mixed into a finished run"
    assert len(runs(root, "one")) == len(runs(root, "two")) == 1
    for run in runs(root, "ppo"):
        assert run.info.status == "FINISHED"
        assert_points_once(root, run.info.run_id, range(4))


def test_killed_in_one_run_and_resumed_in_another(root: Path) -> None:
    write_rows(start(root, run_name="one"), range(4))
    sweep(root)
    scratch = start(root, run_name="two")
    sweep(root)
    assert [run.data.metrics for run in runs(root, "ppo")] == [{"ppo/kl": 0.3, "ppo/beta": 0.05, "ppo/reward": 3.0}, {}]
    write_rows(scratch, range(3, 6), resume_after=2)
    finish(root, scratch)
    sweep(root)
    before, after = runs(root, "ppo")
    assert (before.info.status, after.info.status) == ("KILLED", "FINISHED")
    assert_points_once(root, after.info.run_id, range(6))


def ends(root: Path, *names: str) -> list[tuple[str, str]]:
    """State and reason of the newest run of each name."""
    found = [runs(root, name)[-1] for name in names]
    return [(run.info.status, run.data.tags.get("ended", "")) for run in found]


def test_a_failed_stage_and_its_run_are_failed(root: Path) -> None:
    finish(root, start(root, "sft"))
    scratch = start(root)
    write_json(scratch / "failed.json", {"message": "ppo: KL ran away; https://ada:hf_abc@example.org"})
    follower = Follower(root, MlflowTracker(root))
    follower.sweep()
    assert ends(root, "ppo", "brave-otter") == [("RUNNING", ""), ("RUNNING", "")]
    follower.end_stopped()
    [(status, why), parent] = ends(root, "ppo", "brave-otter")
    assert (status, why.startswith("ppo: KL ran away"), "hf_abc" in why) == ("FAILED", True, False)
    assert parent == ("FAILED", "stage ppo: failed")
    assert ends(root, "sft") == [("FINISHED", "")]

    write_rows(start(root), range(2))  # the same command goes on
    follower = Follower(root, MlflowTracker(root))
    follower.sweep()
    assert ends(root, "ppo", "brave-otter") == [("RUNNING", ""), ("RUNNING", "")]
    finish(root, scratch)
    follower.sweep()
    follower.end_stopped()
    assert ends(root, "ppo", "brave-otter") == [("FINISHED", ""), ("FINISHED", "")]
    assert len(runs(root, "ppo")) == 1


def test_a_killed_stage_is_killed_also_after_the_fact(root: Path) -> None:
    """Stage, flow and uploader were killed with the machine; whichever uploader comes by tells it."""
    write_rows(start(root), range(3))
    sweep(root)
    assert ends(root, "ppo") == [("RUNNING", "")]
    subprocess.run([sys.executable, "-m", "mlops.tracking.uploader", "--once"], cwd=root, check=True)
    (status, why), parent = ends(root, "ppo", "brave-otter")
    assert (status, why) == ("KILLED", "its process was stopped or killed; the same command resumes it")
    assert parent == ("KILLED", "stage ppo: killed")


def test_a_run_killed_with_its_uploader_is_ended_when_another_run_of_the_checkout_begins(
        root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody comes by in its own folder any more: it counted as running for ever."""
    for name, value in (("INSTRUCTFLOW_UPLOADER", ""), ("INSTRUCTFLOW_UPLOADER_IDLE_S", "0.5"),
                        ("INSTRUCTFLOW_UPLOADER_POLL_S", "0.1")):
        monkeypatch.setenv(name, value)
    workspace = root / FOLDER / "cpu,seed=2"
    shutil.copytree(root, workspace, ignore=shutil.ignore_patterns("scratch"))
    write_json(workspace / WORKSPACE_OF, {"checkout": str(root), "files": []})
    with suppress(KeyboardInterrupt), flow_of(workspace, "brave-otter"):
        write_rows(start(workspace), range(3))
        with monkeypatch.context() as inside:
            inside.setenv("MLFLOW_TRACKING_URI", own_store(root))
            sweep(workspace)
        raise KeyboardInterrupt
    assert ends(root, "ppo", "brave-otter") == [("RUNNING", ""), ("RUNNING", "")]
    with (workspace / "scratch" / "run.lock").open("w") as held:  # somebody works there: not ours to end
        fcntl.flock(held, fcntl.LOCK_SH)
        end_runs_cut_short(root)
        assert not (workspace / "scratch" / uploader.LOG).exists()
    end_runs_cut_short(root)
    log = workspace / "scratch" / uploader.LOG
    deadline = time.monotonic() + 300
    while not (log.exists() and log.read_text().rstrip().endswith("ends")) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert [status for status, _ in ends(root, "ppo", "brave-otter")] == ["KILLED", "KILLED"], log.read_text()


def test_what_a_living_flow_or_stage_may_continue_is_not_ended(root: Path) -> None:
    start(root)
    sweep(root)
    follower = Follower(root, MlflowTracker(root))
    for name in ("run.lock", "stages.lock"):
        with (root / "scratch" / name).open("w") as held:
            fcntl.flock(held, fcntl.LOCK_SH)
            follower.end_stopped()
        assert ends(root, "ppo") == [("RUNNING", "")]
    follower.end_stopped()
    assert ends(root, "ppo")[0][0] == "KILLED"


def test_a_run_of_some_stages_is_finished_when_nothing_goes_on(root: Path) -> None:
    """`run --until rm`, or a stage by hand: its parent counted as running for ever."""
    for stage in ("sft", "rm"):
        finish(root, start(root, stage))
    sweep(root)
    Follower(root, MlflowTracker(root)).end_stopped()
    assert ends(root, "brave-otter", "rm") == [("FINISHED", ""), ("FINISHED", "")]


@pytest.mark.parametrize(("cut_short", "end"), [(True, "KILLED"), (False, "FINISHED")])
def test_a_run_cancelled_between_two_stages_is_no_finished_one(root: Path, cut_short: bool, end: str) -> None:
    with suppress(KeyboardInterrupt), flow_of(root, "brave-otter"):
        finish(root, start(root, "sft"))
        sweep(root)
        if cut_short:
            raise KeyboardInterrupt
    assert unfinished(root) == ({"brave-otter"} if cut_short else set())
    Follower(root, MlflowTracker(root)).end_stopped()
    assert [status for status, _ in ends(root, "brave-otter", "sft")] == [end, "FINISHED"]
    with flow_of(root, "brave-otter"):  # it goes on, and ends
        finish(root, start(root, "rm"))
        sweep(root)
    assert unfinished(root) == set()
    Follower(root, MlflowTracker(root)).end_stopped()
    assert ends(root, "brave-otter")[0][0] == "FINISHED"


@pytest.mark.parametrize(("run_name", "name"), [
    ("cpu,kl_goal=0.3 1f973d", "ppo_ptx · kl_goal=0.3"), ("smoke 9e72fe", "ppo_ptx · smoke"),
    ("cpu,seed=3,kl_goal=0.3 1f973d", "ppo_ptx · seed=3,kl_goal=0.3"), ("brave-otter", "ppo_ptx · brave-otter"),
    ("repro-1a2b3c4d", "ppo_ptx · repro-1a2b3c4d")])
def test_a_stages_run_is_named_after_what_differs(run_name: str, name: str) -> None:
    assert child_name({"stage": "ppo@ppo_ptx", "arm": "ppo_ptx"}, run_name) == name


def test_the_run_as_a_whole_is_described_and_has_its_report(root: Path) -> None:
    (root / "reports").mkdir()
    (root / "reports" / "report.html").write_text(f"<p>{RUN_MARK}é")
    write_json(root / "metrics" / "evaluate.json", {"eval/win_rate_vs_sft": 0.5})  # git's, of another run
    scratch = start(root, "evaluate", "smoke,kl_goal=0.3 1f973d")
    sweep(root)
    [parent] = runs(root, "smoke,kl_goal=0.3 1f973d")
    before = parent.data.tags["mlflow.note.content"]
    assert before.startswith("Profile `smoke`, `kl_goal=0.3`, data `01234567`, commit `")
    assert "win rate" not in before
    metrics = {"eval/win_rate_vs_sft": 0.61, "eval/win_rate_vs_sft_low": 0.6, "eval/win_rate_vs_sft_high": 0.62,
               "eval/kl_ppo": 1.5, "eval/toxic_sft": 0.1, "eval/prompts": 500}
    write_json(root / "metrics" / "evaluate.json", metrics)
    write_json(scratch / "done.json", {"metrics": metrics, "artifacts": ["reports/report.html"]})
    sweep(root)
    [parent] = runs(root, "smoke,kl_goal=0.3 1f973d")
    assert "a win rate of 61.0 %" in parent.data.tags["mlflow.note.content"]
    assert set(parent.data.metrics) == {"eval/win_rate_vs_sft", "eval/kl_ppo", "detail/eval/toxic_sft",
                                        "detail/eval/win_rate_vs_sft_low", "detail/eval/win_rate_vs_sft_high",
                                        "detail/eval/prompts"}
    assert [item.path for item in client(root).list_artifacts(parent.info.run_id, "reports")] == ["reports/report.html"]
    [child] = runs(root, "evaluate")
    for run in (parent, child):
        page = (root / "mlartifacts" / run.info.run_id / "artifacts" / "reports" / "report.html").read_text()
        assert page.startswith("<p><span>run <b>smoke,kl_goal=0.3 1f973d</b></span> <span>started <b>20")
        assert page.endswith("é")
    assert (root / "reports" / "report.html").read_text() == f"<p>{RUN_MARK}é"


def test_validation_values_are_a_curve_and_the_kept_weights_value_its_end(root: Path) -> None:
    """Of weights that are kept from an earlier step the final value is another than the journal's last."""
    for stage, kept in (("sft", 0.4), ("rm", 0.5)):
        scratch = start(root, stage)
        journal = Journal(scratch / "journal.csv", [f"{stage}/loss"], None, [f"{stage}/valid_loss"])
        for step in range(1, 5):
            measured = {f"{stage}/valid_loss": 0.3 + step / 20} if step % 2 == 0 else {}
            journal.append(step, {f"{stage}/loss": 1 / step, **measured})
        journal.close()
        metrics = {f"{stage}/valid_loss": kept, f"{stage}/loss": 9.0}
        write_json(root / "metrics" / f"{stage}.json", metrics)
        write_json(scratch / "done.json", {"metrics": metrics, "artifacts": []})
    sweep(root)
    [sft], [rm] = runs(root, "sft"), runs(root, "rm")

    def history(run: Run, name: str) -> list[tuple[int, float]]:
        points = client(root).get_metric_history(run.info.run_id, name)
        return [(point.step, point.value) for point in sorted(points, key=lambda point: (point.step, point.timestamp))]

    assert history(sft, "sft/valid_loss") == [(2, 0.4), (4, 0.5), (4, 0.4)]
    assert history(rm, "rm/valid_loss") == [(2, 0.4), (4, 0.5)]
    assert sft.data.metrics["sft/valid_loss"] == 0.4
    assert sft.data.metrics["sft/loss"] == 0.25  # the curve's own end


def test_an_uploader_that_is_about_to_leave_sees_a_new_stage(root: Path) -> None:
    start(root)
    marks = uploader.all_marks(root)
    lock = take_lock(root)
    assert lock is not None
    start(root, "rm")  # after the uploader's last look, while it held the lock: `ensure_uploader` starts no other
    assert take_lock(root) is None
    assert not uploader._leave(root, lock, marks)
    assert take_lock(root) is None, "it must hold the lock again"
    assert uploader._leave(root, lock, uploader.all_marks(root))
    assert take_lock(root) is not None
    os.close(lock)


def test_off(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSTRUCTFLOW_UPLOADER", "off")
    scratch = start(root)
    ensure_uploader(root)
    finish(root, scratch)
    assert not (root / "scratch" / "uploader.lock").exists()
    assert wait_until_uploaded(root, "brave-otter", 5)["stages"] == {}


def test_once_sends_a_backlog_or_says_why_not(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = start(root)
    write_rows(scratch, range(5))
    finish(root, scratch)
    command = [sys.executable, "-m", "mlops.tracking.uploader", "--once"]
    env = {**os.environ, "MLFLOW_TRACKING_URI": CLOSED_PORT}
    failed = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert len(failed.stderr.splitlines()) == 1
    assert "can't be reached" in failed.stderr
    sent = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert sent.stdout + sent.stderr == "uploader: nothing is pending in 1 stage runs\n"
    assert_points_once(root, runs(root, "ppo")[0].info.run_id, range(5))
    assert json.loads((scratch / "upload.json").read_text())["state"] == "done"


# --- what older code has left behind ------------------------------------------------------------------------------


def with_old_keys(source: Path, target: Path) -> None:
    """The file as older code wrote it: the run's name under `line`."""
    content = json.loads(source.read_text())
    content["line"] = content.pop("run_name")
    source.unlink()
    write_json(target, content)


def test_what_older_code_has_sent_is_not_sent_again(root: Path) -> None:
    scratch = start(root)
    with_old_keys(scratch / "run.json", scratch / "run.json")
    write_rows(scratch, range(5))
    sweep(root)
    with_old_keys(scratch / RECORD, scratch / OLD_RECORD)
    write_rows(scratch, range(5, 8), resume_after=4)
    finish(root, scratch)
    sweep(root)
    [run] = runs(root, "ppo")
    assert run.info.status == "FINISHED"
    assert_points_once(root, run.info.run_id, range(8))
    assert not (scratch / OLD_RECORD).exists()
    assert wait_until_uploaded(root, "brave-otter", 1)["stages"] == {"ppo": run.info.run_id}


def test_the_parent_run_that_older_code_made_gets_the_stages(root: Path) -> None:
    store = client(root)
    key = f"line-{hashlib.sha256(b'brave-otter').hexdigest()[:32]}"
    old = store.create_run(store.create_experiment(EXPERIMENT), 0, {
        "instructflow.key": key, "instructflow.line": "brave-otter"}, "brave-otter")
    finish(root, start(root))
    sweep(root)
    [parent], [ppo] = runs(root, "brave-otter"), runs(root, "ppo")
    assert parent.info.run_id == ppo.data.tags["mlflow.parentRunId"] == old.info.run_id
    assert parent.data.tags["instructflow.run_name"] == "brave-otter"


def test_no_second_uploader_starts_beside_one_of_older_code(root: Path) -> None:
    (root / "scratch").mkdir()
    with (root / "scratch" / OLD_UPLOADER).open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert take_lock(root) is None
    lock = take_lock(root)
    assert lock is not None
    os.close(lock)


@pytest.mark.parametrize(("old", "new"), [
    ("INSTRUCTFLOW_MIRROR", "INSTRUCTFLOW_UPLOADER"), ("INSTRUCTFLOW_MIRROR_POLL_S", "INSTRUCTFLOW_UPLOADER_POLL_S"),
    ("INSTRUCTFLOW_LINE", "INSTRUCTFLOW_RUN_NAME"),
])
def test_a_variable_with_its_former_name_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch, old: str,
                                                    new: str) -> None:
    monkeypatch.setenv(old, "off")
    with pytest.raises(UserError, match=f"^{old} is now called {new}: set that instead$"):
        ensure_uploader(root)
    command = [sys.executable, "-m", "mlops.tracking.uploader", "--once"]
    refused = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == f"uploader: {old} is now called {new}: set that instead\n"
