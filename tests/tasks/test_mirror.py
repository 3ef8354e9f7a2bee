"""The mirror against a real MLflow store (SQLite) and as a real process: each point once, whatever is killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from rlhf.files import write_json
from rlhf.journal import Journal
from tasks import mirror
from tasks.mirror import Follower, ensure_mirror, wait_until_mirrored
from tasks.mirror_lock import stage_alive, take_lock
from tasks.mirror_record import Record, Snapshot, Unreachable
from tasks.mlflow_client import EXPERIMENT, MlflowTracker

CLOSED_PORT = "http://127.0.0.1:9"
DATA_MD5 = "0123456789abcdef0123456789abcdef.dir"
COLUMNS = ["ppo/kl", "ppo/beta", "ppo/reward"]


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new MLflow database; making one takes seconds, so each test gets a copy."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def root(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout without code."""
    for name in ("MLFLOW_TRACKING_URI", "INSTRUCTFLOW_MIRROR", "INSTRUCTFLOW_LINE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "profiles").mkdir()
    (tmp_path / "params.yaml").write_text("seed: 7\nprofile: smoke\n")
    (tmp_path / "profiles" / "smoke.yaml").write_text("ppo:\n  kl_goal: 3.5\n")
    (tmp_path / "dvc.yaml").write_text("stages:\n  ppo:\n    deps: [tasks/ppo.py, data/ppo.jsonl, data/tax]\n")
    (tmp_path / "data.dvc").write_text(f"outs:\n- md5: {DATA_MD5}\n  path: data\n")
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return tmp_path


def start(root: Path, stage: str = "ppo", line: str = "brave-otter", folder: str = "c0ffee") -> Path:
    """What a starting stage does."""
    scratch = root / "scratch" / stage / folder
    (scratch / "done.json").unlink(missing_ok=True)
    write_json(scratch / "run.json", {"stage": stage, "profile": "smoke", "seed": 7, "line": line,
                                      "params": {"kl_goal": 3.5, "beta_rule": "step"} if stage == "ppo" else {}})
    return scratch


def write_rows(scratch: Path, steps: range, resume_after: int | None = None) -> None:
    journal = Journal(scratch / "journal.csv", COLUMNS, resume_after)
    for step in steps:
        journal.append(step, {"ppo/kl": step / 10, "ppo/beta": 0.05, "ppo/reward": float("nan") if step == 2 else step})
    journal.close()


def finish(root: Path, scratch: Path, win_rate: float = 0.75, artifacts: list[str] | None = None) -> None:
    stage = scratch.parent.name
    metrics = {f"{stage}/final": win_rate, "ppo/kl": 1.5, "note": "text"}
    write_json(root / "metrics" / f"{stage}.json", metrics)
    write_json(scratch / "done.json", {"metrics": metrics, "artifacts": artifacts or []})


def sweep(root: Path) -> None:
    assert Follower(root, MlflowTracker(root)).sweep()


def client(root: Path) -> MlflowClient:
    return MlflowClient(tracking_uri=f"sqlite:///{root}/mlflow.db")


def runs(root: Path, name: str | None = None) -> list[Run]:
    """All runs, or those with a name, oldest first."""
    store = client(root)
    experiment = store.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    found = store.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])
    return [run for run in found if name in (None, run.info.run_name)]


def assert_points_once(root: Path, run_id: str, steps: range) -> None:
    for column in COLUMNS:
        counted = Counter(point.step for point in client(root).get_metric_history(run_id, column))
        assert counted == dict.fromkeys(steps, 1), column


# --- what is sent ---------------------------------------------------------------------------------------------------


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


def test_line_is_the_parent_of_its_stages(root: Path) -> None:
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
    assert parent.data.tags["instructflow.line"] == "brave-otter"
    assert ppo.data.tags["mlflow.parentRunId"] == promote.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert parent.data.params.items() >= {"seed": "7", "profile": "smoke", "ppo.kl_goal": "3.5",
                                          "sft.epochs": "2"}.items()
    assert ppo.data.params == {"seed": "7", "profile": "smoke", "ppo.kl_goal": "3.5", "ppo.beta_rule": "step"}
    assert ppo.data.tags.items() >= {"stage": "ppo", "profile": "smoke", "data_version": DATA_MD5,
                                     "beta_rule": "step"}.items()
    assert parent.data.metrics == {"ppo/final": 0.75, "promote/final": 0.6, "ppo/kl": 1.5}
    assert ppo.data.metrics["ppo/final"] == 0.75
    assert ppo.data.metrics["ppo/kl"] == 0.2  # the journal's last, not a second point
    assert ppo.inputs is not None
    assert {(item.dataset.name, item.dataset.digest) for item in ppo.inputs.dataset_inputs} == {
        ("ppo", DATA_MD5), ("tax", DATA_MD5)}
    paths = [item.path for folder in ("models/ppo", "metrics") for item in client(root).list_artifacts(
        ppo.info.run_id, folder)]
    assert paths == ["models/ppo/config.json", "metrics/ppo.json"]
    assert (root / "mlartifacts" / promote.info.run_id / "artifacts" / "reports" / "report.html").exists()
    assert wait_until_mirrored(root, "brave-otter", 1) == {
        "stages": {"ppo": ppo.info.run_id, "promote": promote.info.run_id},
        "parent_run_id": parent.info.run_id, "experiment_id": parent.info.experiment_id}


def test_rounds_are_steps_of_their_line(root: Path) -> None:
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
    finish(root, start(root, "sft", line=""))
    finish(root, start(root, "rm", line=""))
    sweep(root)
    (root / "profiles" / "smoke.yaml").write_text("ppo:\n  kl_goal: 6.0\n")
    finish(root, start(root, "ppo", line=""))
    sweep(root)
    lines = {run.info.run_name: run.data.tags["mlflow.parentRunId"] for run in runs(root)
             if "mlflow.parentRunId" in run.data.tags}
    assert lines["sft"] == lines["rm"] != lines["ppo"]
    assert client(root).get_run(lines["sft"]).info.run_name.startswith("repro-")
    assert client(root).get_run(lines["ppo"]).data.params["ppo.kl_goal"] == "6.0"


def test_run_again(root: Path) -> None:
    def again(line: str, win_rate: float) -> list[str]:
        scratch = start(root, line=line)
        write_rows(scratch, range(4))
        sweep(root)
        finish(root, scratch, win_rate)
        sweep(root)
        return [run.info.run_id for run in runs(root, "ppo")]

    first = again("one", 0.5)
    assert again("one", 0.5) == first
    other_line = again("two", 0.5)
    assert len(other_line) == 2
    assert len(again("two", 0.6)) == 3, "another result must not be mixed into a finished run"
    assert len(runs(root, "one")) == len(runs(root, "two")) == 1
    for run in runs(root, "ppo"):
        assert run.info.status == "FINISHED"
        assert_points_once(root, run.info.run_id, range(4))


def test_killed_in_one_line_and_resumed_in_another(root: Path) -> None:
    write_rows(start(root, line="one"), range(4))
    sweep(root)
    scratch = start(root, line="two")
    sweep(root)
    assert [run.data.metrics for run in runs(root, "ppo")] == [{"ppo/kl": 0.3, "ppo/beta": 0.05, "ppo/reward": 3.0}, {}]
    write_rows(scratch, range(3, 6), resume_after=2)
    finish(root, scratch)
    sweep(root)
    before, after = runs(root, "ppo")
    assert (before.info.status, after.info.status) == ("KILLED", "FINISHED")
    assert_points_once(root, after.info.run_id, range(6))


# --- what goes wrong --------------------------------------------------------------------------------------------------


class Crash(BaseException):
    """Stands for kill -9."""


class Unsteady:
    """An MlflowClient that does what it is asked and then, at the n-th request, crashes or loses the answer."""

    def __init__(self, client: MlflowClient, error: type[BaseException], after: int) -> None:
        self.client, self.error, self.left = client, error, after

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def ask(*args: Any, **kwargs: Any) -> Any:
            answer = getattr(self.client, name)(*args, **kwargs)
            if name == "log_batch":
                getattr(self.client, name)(*args, **kwargs)  # a repeated request that arrives late
            self.left -= 1
            if self.left == 0:
                raise self.error("after the request")
            return answer

        return ask


@pytest.mark.parametrize("failure", ["after a request", "before a note"])
def test_each_point_once_wherever_it_fails(root: Path, monkeypatch: pytest.MonkeyPatch, failure: str) -> None:
    """Fails once at the n-th request or note, for every n there is, and goes on as a new mirror would."""
    monkeypatch.setattr("tasks.mirror_record.POINTS_PER_CALL", 12)
    notes = 0

    def failing_save(record: Record, folder: Path, save: Callable[[Record, Path], None] = Record.save) -> None:
        nonlocal notes
        notes -= 1
        if notes == 0:
            raise Crash
        save(record, folder)

    monkeypatch.setattr(Record, "save", failing_save)
    failures, failed = 0, True
    while failed:
        scratch = start(root, "ppo", folder=f"folder{failures}")
        notes = failures + 1 if failure == "before a note" else 0
        unsteady = Unsteady(client(root), (Crash, ConnectionError)[failures % 2],
                            failures + 1 if failure == "after a request" else 0)
        failed = False
        for turn in range(4):
            if turn < 2:  # the journal grows, is cut back and grows further
                write_rows(scratch, (range(6), range(4, 10))[turn], resume_after=(-1, 3)[turn])
            elif turn == 2:
                finish(root, scratch)
            try:
                tracker = MlflowTracker(root)
                tracker.__dict__["_client"] = unsteady
                Follower(root, tracker).sweep()
            except (Crash, Unreachable):
                assert not failed
                failed = True
        failures += failed
        record = Record.load(scratch)
        assert record is not None
        assert record.state == "done"
        assert_points_once(root, record.run_id, range(10))
        assert len(client(root).get_metric_history(record.run_id, "ppo/final")) == 1
    assert failures >= 8
    assert len(runs(root, "ppo")) == failures + 1
    assert all(run.info.status == "FINISHED" for run in runs(root, "ppo"))
    assert len(runs(root, "brave-otter")) == 1


def send_and_crash(record: Record, snapshot: Snapshot, folder: Path, tracker: MlflowTracker) -> None:
    record.open_upto, record.open_ms = snapshot.rows[-1].step, 1_700_000_000_000
    record.save(folder)
    tracker.send(record.run_id, snapshot.rows, record.open_ms)
    raise Crash


def crash_with_open_batch(root: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, MlflowTracker]:
    """Eight rows arrived, and the mirror died before it could note that."""
    scratch, tracker = start(root), MlflowTracker(root)
    write_rows(scratch, range(8))
    with monkeypatch.context() as patch:
        patch.setattr("tasks.mirror_record._send_rows", send_and_crash)
        with pytest.raises(Crash):
            Follower(root, tracker).sweep()
    return scratch, tracker


def test_resumed_below_an_open_batch(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage died too and repeats the batch's rows one by one; the server is late and does not show them yet."""
    scratch, tracker = crash_with_open_batch(root, monkeypatch)
    monkeypatch.setattr(tracker, "last_step", lambda *_: -1)
    start(root)
    for last in range(3, 9):
        write_rows(scratch, range(last, last + 1), resume_after=last - 1)
        Follower(root, tracker).sweep()
    assert_points_once(root, runs(root, "ppo")[0].info.run_id, range(9))


def test_resumed_with_other_values_below_an_open_batch(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU without deterministic kernels: what the server has stays."""
    scratch, tracker = crash_with_open_batch(root, monkeypatch)
    start(root)
    journal = (scratch / "journal.csv").read_text()
    (scratch / "journal.csv").write_text(journal.replace("0.05", "0.06"))
    Follower(root, tracker).sweep()
    assert_points_once(root, runs(root, "ppo")[0].info.run_id, range(8))


def test_absent_server_loses_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = start(root)
    write_rows(scratch, range(5))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", CLOSED_PORT)
    follower = Follower(root, MlflowTracker(root))
    for _ in range(2):
        with pytest.raises(Unreachable):
            follower.sweep()
    finish(root, scratch)
    follower.tracker = MlflowTracker(root)
    with pytest.raises(Unreachable):
        follower.sweep()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    sweep(root)
    [run] = runs(root, "ppo")
    assert_points_once(root, run.info.run_id, range(5))
    assert run.info.status == "FINISHED"


def test_replaced_store_gets_everything_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = start(root)
    shutil.copy(root / "mlflow.db", root / "first.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/first.db")
    write_rows(scratch, range(5))
    sweep(root)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    write_rows(scratch, range(5, 6), resume_after=4)
    follower = Follower(root, MlflowTracker(root))
    assert not follower.sweep()
    assert follower.sweep()
    assert_points_once(root, runs(root, "ppo")[0].info.run_id, range(6))


def test_one_refused_run_does_not_stop_the_others(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = start(root, "sft")
    (bad / "journal.csv").write_text("step,sft/loss\nzero,1.0\n")
    finish(root, start(root, "rm"))
    follower = Follower(root, MlflowTracker(root))
    assert follower.sweep()
    assert follower.sweep()
    assert capsys.readouterr().out.count("scratch/sft/c0ffee: ValueError") == 1
    assert [run.info.status for run in runs(root, "rm")] == ["FINISHED"]


def test_mirror_that_is_about_to_leave_sees_a_new_run(root: Path) -> None:
    start(root)
    marks = mirror.all_marks(root)
    lock = take_lock(root)
    assert lock is not None
    start(root, "rm")  # after the mirror's last look, while it held the lock: `ensure_mirror` starts no other
    assert take_lock(root) is None
    assert not mirror._leave(root, lock, marks)
    assert take_lock(root) is None, "it must hold the lock again"
    assert mirror._leave(root, lock, mirror.all_marks(root))
    assert take_lock(root) is not None
    os.close(lock)


def test_off(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSTRUCTFLOW_MIRROR", "off")
    scratch = start(root)
    ensure_mirror(root)
    finish(root, scratch)
    assert not (root / "scratch" / "mirror.lock").exists()
    assert wait_until_mirrored(root, "brave-otter", 5)["stages"] == {}


# --- as processes -------------------------------------------------------------------------------------------------

STAGE = """
import sys, time
from pathlib import Path
from rlhf.files import write_json
from rlhf.journal import Journal
from tasks.mirror import ensure_mirror
from tasks.stage import die_with_parent

die_with_parent()
first, pause, columns = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
scratch = Path("scratch/ppo/c0ffee")
write_json(scratch / "run.json", {"stage": "ppo", "profile": "smoke", "seed": 7, "line": "brave-otter", "params": {}})
ensure_mirror(Path.cwd())
ensure_mirror(Path.cwd())
assert "mlflow" not in sys.modules
journal = Journal(scratch / "journal.csv", columns, first - 1)
for step in range(first, 40):
    journal.append(step, dict.fromkeys(columns, step))
    time.sleep(60 if step == pause else 0.05)
write_json(scratch / "done.json", {"metrics": {"ppo/final": 1}, "artifacts": []})
"""


def mirrors(root: Path) -> list[int]:
    """The mirror processes that work in `root`."""
    found = []
    for proc in Path("/proc").glob("[0-9]*"):
        try:
            if (proc / "cwd").resolve() == root.resolve() and b"-m\0tasks.mirror\0" in (proc / "cmdline").read_bytes():
                found.append(int(proc.name))
        except OSError:
            continue
    return found


def until(condition: Callable[[], Any], seconds: float = 40) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def last_sent(scratch: Path) -> int:
    record = Record.load(scratch)
    return record.last_step if record else -1


def test_live_mirror_through_kills_of_both(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSTRUCTFLOW_MIRROR_POLL_S", "0.1")
    monkeypatch.setenv("INSTRUCTFLOW_MIRROR_IDLE_S", "2")
    scratch = root / "scratch" / "ppo" / "c0ffee"

    def stage(first: int, pause: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", STAGE, str(first), str(pause), *COLUMNS]
        return subprocess.Popen(command, cwd=root, start_new_session=True)

    one = stage(0, pause=15)
    [pid] = until(lambda: mirrors(root))
    until(lambda: last_sent(scratch) > 5)
    assert stage_alive(root)
    assert mirrors(root) == [pid], "two calls, one mirror"
    assert os.getpriority(os.PRIO_PROCESS, pid) >= 10
    os.kill(pid, signal.SIGKILL)
    until(lambda: not mirrors(root))
    one.kill()  # the stage dies as well; both are started again
    one.wait()
    two = stage(3, pause=30)
    [pid] = until(lambda: mirrors(root))
    until(lambda: last_sent(scratch) > 20)
    os.killpg(two.pid, signal.SIGTERM)  # the mirror outlives the stage and its session
    two.wait()
    assert mirrors(root) == [pid]
    assert stage(12, pause=-1).wait(30) == 0
    found = wait_until_mirrored(root, "brave-otter", 40)
    assert_points_once(root, found["stages"]["ppo"], range(40))
    [run] = runs(root, "ppo")
    assert run.info.status == "FINISHED"
    until(lambda: not mirrors(root))
    assert not stage_alive(root)
    log = (root / "scratch" / "mirror.log").read_text()
    assert all(" mirror " in text for text in log.splitlines()), log


def test_once_sends_a_backlog_or_says_why_not(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = start(root)
    write_rows(scratch, range(5))
    finish(root, scratch)
    command = [sys.executable, "-m", "tasks.mirror", "--once"]
    env = {**os.environ, "MLFLOW_TRACKING_URI": CLOSED_PORT}
    failed = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert len(failed.stderr.splitlines()) == 1
    assert "can't be reached" in failed.stderr
    sent = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert sent.stdout + sent.stderr == "mirror: nothing is pending in 1 stage runs\n"
    assert_points_once(root, runs(root, "ppo")[0].info.run_id, range(5))
    assert json.loads((scratch / "mirror.json").read_text())["state"] == "done"
