"""What the uploader's tests share: what a stage writes, and what arrived in MLflow."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Run

from mlops.tracking.mlflow_client import EXPERIMENT, MlflowTracker
from mlops.tracking.uploader import Follower
from rlhf.files import write_json
from rlhf.training.journal import Journal

CLOSED_PORT = "http://127.0.0.1:9"
DATA_MD5 = "0123456789abcdef0123456789abcdef.dir"
COLUMNS = ["ppo/kl", "ppo/beta", "ppo/reward"]


def start(root: Path, stage: str = "ppo", run_name: str = "brave-otter", folder: str = "c0ffee", arm: str = "") -> Path:
    """What a starting stage does."""
    scratch = root / "scratch" / stage / folder
    for name in ("done.json", "failed.json"):
        (scratch / name).unlink(missing_ok=True)
    write_json(scratch / "run.json", {"stage": stage, "profile": "smoke", "seed": 7, "run_name": run_name,
                                      "params": {"kl_goal": 3.5, "beta_rule": "step"} if stage == "ppo" else {}}
               | ({"arm": arm} if arm else {}))
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
    """All runs, or those with a name, or of a stage or arm of that name, oldest first."""
    store = client(root)
    experiment = store.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    every = store.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])
    return [run for run in every if name in (None, run.info.run_name) or run.info.run_name.startswith(f"{name} · ")]


def assert_points_once(root: Path, run_id: str, steps: range, columns: Sequence[str] = COLUMNS) -> None:
    for column in columns:
        counted = Counter(point.step for point in client(root).get_metric_history(run_id, column))
        assert counted == dict.fromkeys(steps, 1), column
