"""The machine's load goes to the running stage's run, at its pace, and never troubles the uploader."""

import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow import MlflowClient

from mlops.tracking import system_metrics
from mlops.tracking.mlflow_client import MlflowTracker
from mlops.tracking.system_metrics import SystemWatch, running_stage
from mlops.tracking.upload_record import Record
from rlhf.files import write_json

STARTED_S = 1_700_000_000


class Sink:
    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.got: list[tuple[str, dict[str, float], int]] = []

    def system(self, run_id: str, values: Mapping[str, float], step: int) -> None:
        if self.error:
            raise self.error
        self.got.append((run_id, dict(values), step))


def stage(root: Path, name: str, run_id: str, done: bool = False) -> None:
    folder = root / "scratch" / name / "c0ffee"
    write_json(folder / "run.json", {"stage": name})
    Record("run", "key", STARTED_S * 10**9, run_id).save(folder)
    if done:
        write_json(folder / "done.json", {})
    started = len(list(root.glob("scratch/*/*/run.json")))  # the order of their starts is that of the files' times
    os.utime(folder / "run.json", (started, started))


def test_the_running_stage_gets_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system_metrics, "time", SimpleNamespace(time=lambda: STARTED_S + 25.0, monotonic=lambda: 100.0))
    stage(tmp_path, "sft", "run-1", done=True)
    stage(tmp_path, "rm", "run-2")
    assert (running_stage(tmp_path) or ("",))[0] == "run-2"
    sink = Sink()
    watch = SystemWatch(tmp_path, sink)
    watch.look()
    watch.look()  # too soon
    (run_id, values, step), = sink.got
    assert (run_id, step) == ("run-2", 2)  # 25 s after its start, every 10 s
    assert 0 < values["system/system_memory_usage_percentage"] <= 100
    assert {"system/cpu_utilization_percentage", "system/disk_usage_percentage"} <= set(values)


def test_nothing_runs(tmp_path: Path) -> None:
    stage(tmp_path, "sft", "run-1", done=True)
    stage(tmp_path, "rm", "")  # no run in MLflow yet
    sink = Sink()
    SystemWatch(tmp_path, sink).look()
    assert sink.got == []


def test_what_cannot_be_sent_is_lost(tmp_path: Path) -> None:
    stage(tmp_path, "ppo", "run-1")
    SystemWatch(tmp_path, Sink(ConnectionError("away"))).look()


def test_samples_are_fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system_metrics, "EVERY_S", 0.0)
    watch = SystemWatch(tmp_path, Sink())
    watch.sample()
    assert all(not monitor._metrics for monitor in watch.monitors)  # no mean over the whole run


def test_they_are_in_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    run = client.create_run(client.create_experiment("x"))
    MlflowTracker(tmp_path).system(run.info.run_id, {"system/cpu_utilization_percentage": 50.0}, 3)
    point, = client.get_metric_history(run.info.run_id, "system/cpu_utilization_percentage")
    assert (point.value, point.step) == (50.0, 3)
