"""The machine's load in the running stage's MLflow run: `system/...`, which MLflow shows on a page of its own.

MLflow's own monitors are asked from the uploader's process, so that the training is not touched. It is no result: what
cannot be sent is lost, and it is in no journal. GPUs are seen where nvidia-ml-py is installed.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from mlops.tracking.upload_record import OPEN, Record, file_marks, scratch_folders

EVERY_S = 10.0


class Sink(Protocol):
    """Where the samples go (`mlops.tracking.mlflow_client.MlflowTracker`)."""

    def system(self, run_id: str, values: Mapping[str, float], step: int) -> None:
        """Logs them as they are; may raise anything."""


class SystemWatch:
    """`look()` samples and sends once in `EVERY_S` seconds, while a stage runs. Never raises."""

    def __init__(self, root: Path, sink: Sink) -> None:
        self.root, self.sink = root, sink
        self.monitors = monitors()
        self.next = 0.0

    def look(self) -> None:
        now = time.monotonic()
        if now < self.next:
            return
        self.next = now + EVERY_S
        running = running_stage(self.root)
        if running is None:
            return
        run_id, started_ns = running
        step = max(0, int((time.time() - started_ns / 1e9) / EVERY_S))  # goes on where the stage does
        try:
            self.sink.system(run_id, self.sample(), step)
        except Exception:  # MLflow away, a sensor that fails: nothing that a training should hear of
            return

    def sample(self) -> dict[str, float]:
        values: dict[str, float] = {}
        for monitor in self.monitors:
            monitor.collect_metrics()
            values |= {f"system/{name}": float(value) for name, value in monitor.aggregate_metrics().items()}
            monitor.clear_metrics()
        return values


def monitors() -> list[Any]:
    """MLflow's monitors of this machine."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    found: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    try:
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor

        found.append(GPUMonitor())
    except Exception:  # no nvidia-ml-py, or no GPU
        return found
    return found


def running_stage(root: Path) -> tuple[str, int] | None:
    """Run id and start of the newest stage that has an MLflow run and is not done."""
    for folder in reversed(scratch_folders(root)):
        record = Record.load(folder)
        if record is not None and record.run_id and record.state == OPEN and file_marks(folder).done is None:
            return record.run_id, record.started_ns
    return None
