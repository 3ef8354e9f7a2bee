"""The uploader and its stage killed at any moment, a server that is away or new: each point arrives once."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from mlops.tracking.locks import stage_alive
from mlops.tracking.mlflow_client import MlflowTracker
from mlops.tracking.upload_record import Record, Snapshot, Unreachable
from mlops.tracking.uploader import Follower, wait_until_uploaded
from tests.mlops.tracking.uploaded import (
    CLOSED_PORT,
    COLUMNS,
    assert_points_once,
    client,
    finish,
    runs,
    start,
    sweep,
    write_rows,
)


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
    """Fails once at the n-th request or note, for every n there is, and goes on as a new uploader would."""
    monkeypatch.setattr("mlops.tracking.upload_record.POINTS_PER_CALL", 12)
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
        scratch = start(root, "ppo", f"otter-{failures}", f"folder{failures}", arm="ppo")
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
        for run_id in (record.run_id, record.parent_run_id):
            assert_points_once(root, run_id, range(10))
        assert len(client(root).get_metric_history(record.run_id, "ppo/final")) == 1
        assert len(runs(root, f"otter-{failures - failed}")) == 1
    assert failures >= 8
    assert len(runs(root, "ppo")) == failures + 1
    assert all(run.info.status == "FINISHED" for run in runs(root, "ppo"))


def send_and_crash(record: Record, snapshot: Snapshot, folder: Path, tracker: MlflowTracker) -> None:
    record.open_upto, record.open_ms = snapshot.rows[-1].step, 1_700_000_000_000
    record.save(folder)
    tracker.send(record, snapshot.run, snapshot.rows, record.open_ms)
    raise Crash


def crash_with_open_batch(root: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, MlflowTracker]:
    """Eight rows arrived, and the uploader died before it could note that."""
    scratch, tracker = start(root), MlflowTracker(root)
    write_rows(scratch, range(8))
    with monkeypatch.context() as patch:
        patch.setattr("mlops.tracking.upload_record._send_rows", send_and_crash)
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


def test_a_deleted_store_gets_again_all_that_is_on_disk(root: Path, empty_store: Path,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    for stage in ("sft", "ppo"):
        scratch = start(root, stage)
        write_rows(scratch, range(4))
        finish(root, scratch)
    sweep(root)
    before = {name: runs(root, name)[0].data.metrics for name in ("sft", "ppo")}
    sweep(root)
    assert len(runs(root)) == 3  # with their parent; a store that has them gets nothing
    shutil.copy(empty_store, root / "mlflow.db")
    sweep(root)
    assert {name: runs(root, name)[0].data.metrics for name in ("sft", "ppo")} == before
    assert_points_once(root, runs(root, "ppo")[0].info.run_id, range(4))
    assert sorted(run.info.status for run in runs(root)) == ["FINISHED", "FINISHED", "RUNNING"]
    assert capsys.readouterr().out.count("MLflow has none of the 2 stage runs") == 1


def test_a_record_that_cannot_be_read_stops_no_other_folder(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for stage in ("sft", "ppo"):
        scratch = start(root, stage)
        write_rows(scratch, range(2))
        finish(root, scratch)
    (root / "scratch" / "sft" / "c0ffee" / "upload.json").write_text("{ cut off")
    Follower(root, MlflowTracker(root)).sweep()
    assert [run.info.status for run in runs(root, "ppo")] == ["FINISHED"]
    assert "scratch/sft/c0ffee: JSONDecodeError" in capsys.readouterr().out


def test_one_run_that_somebody_deleted_stays_deleted(root: Path) -> None:
    for stage in ("sft", "ppo"):
        scratch = start(root, stage)
        write_rows(scratch, range(2))
        finish(root, scratch)
    sweep(root)
    client(root).delete_run(runs(root, "sft")[0].info.run_id)
    sweep(root)
    assert runs(root, "sft") == []


def test_one_refused_run_does_not_stop_the_others(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = start(root, "sft")
    (bad / "journal.csv").write_text("step,sft/loss\nzero,1.0\n")
    finish(root, start(root, "rm"))
    follower = Follower(root, MlflowTracker(root))
    assert follower.sweep()
    assert follower.sweep()
    assert capsys.readouterr().out.count("scratch/sft/c0ffee: ValueError") == 1
    assert [run.info.status for run in runs(root, "rm")] == ["FINISHED"]


# --- as processes -------------------------------------------------------------------------------------------------

STAGE = """
import sys, time
from pathlib import Path
from rlhf.files import write_json
from rlhf.training.journal import Journal
from mlops.tracking.uploader import ensure_uploader
from mlops.processes import die_with_parent

die_with_parent()
first, pause, columns = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
scratch = Path("scratch/ppo/c0ffee")
write_json(scratch / "run.json", {"stage": "ppo", "profile": "smoke", "seed": 7, "run_name": "brave-otter",
                                  "params": {}})
ensure_uploader(Path.cwd())
ensure_uploader(Path.cwd())
assert "mlflow" not in sys.modules
journal = Journal(scratch / "journal.csv", columns, first - 1)
for step in range(first, 40):
    journal.append(step, dict.fromkeys(columns, step))
    time.sleep(3600 if step == pause else 0.05)  # the test ends what pauses
write_json(scratch / "done.json", {"metrics": {"ppo/final": 1}, "artifacts": []})
"""


def uploaders(root: Path) -> list[int]:
    """The uploader processes that work in `root`."""
    pids = []
    for proc in Path("/proc").glob("[0-9]*"):
        try:
            is_one = b"-m\0mlops.tracking.uploader\0" in (proc / "cmdline").read_bytes()
            if is_one and (proc / "cwd").resolve() == root.resolve():
                pids.append(int(proc.name))
        except OSError:
            continue
    return pids


def until(condition: Callable[[], Any], seconds: float = 300) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def last_sent(scratch: Path) -> int:
    record = Record.load(scratch)
    return record.last_step if record else -1


def test_a_live_uploader_through_kills_of_both(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSTRUCTFLOW_UPLOADER_POLL_S", "0.1")
    monkeypatch.setenv("INSTRUCTFLOW_UPLOADER_IDLE_S", "2")
    scratch = root / "scratch" / "ppo" / "c0ffee"

    def stage(first: int, pause: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", STAGE, str(first), str(pause), *COLUMNS]
        return subprocess.Popen(command, cwd=root, start_new_session=True)

    one = stage(0, pause=15)
    [pid] = until(lambda: uploaders(root))
    until(lambda: last_sent(scratch) > 5)
    assert stage_alive(root)
    assert uploaders(root) == [pid], "two calls, one uploader"
    assert os.getpriority(os.PRIO_PROCESS, pid) >= 10
    os.kill(pid, signal.SIGKILL)
    until(lambda: not uploaders(root))
    one.kill()  # the stage dies as well; both are started again
    one.wait()
    two = stage(3, pause=30)
    [pid] = until(lambda: uploaders(root))
    until(lambda: last_sent(scratch) > 20)
    os.killpg(two.pid, signal.SIGTERM)  # the uploader outlives the stage and its session: see its log below
    two.wait()
    assert stage(12, pause=-1).wait(300) == 0
    uploaded = wait_until_uploaded(root, "brave-otter", 300)
    assert_points_once(root, uploaded["stages"]["ppo"], range(40))
    [run] = runs(root, "ppo")
    assert run.info.status == "FINISHED"
    until(lambda: not uploaders(root))
    assert not stage_alive(root)
    log = (root / "scratch" / "uploader.log").read_text()
    assert all(" uploader " in text for text in log.splitlines()), log
    assert f"uploader {pid}: ends" in log
