"""The small line that several test modules share (whoever changes a file of it puts it back), the mirror's checkout."""

import shutil
import time
from pathlib import Path

import pytest

from tests.tasks.small_pipeline import STAGES, Line, Undisturbed


@pytest.fixture(scope="session")
def line(tmp_path_factory: pytest.TempPathFactory) -> Line:
    made = Line(tmp_path_factory.mktemp("line"))
    made.finish("ingest")
    shutil.copytree(made.root / "build" / "data", made.root / "data")
    (made.root / "metrics" / "validate.json").write_text("{}\n")
    return made


@pytest.fixture(scope="session")
def undisturbed(line: Line) -> Undisturbed:
    """Outputs and seconds of each training stage, run once from start to end."""
    found = {}
    for stage in STAGES:
        before = time.monotonic()
        line.finish(stage)
        found[stage] = (line.files(stage), time.monotonic() - before)
    return found


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new MLflow database; making one takes seconds, so each test gets a copy."""
    from mlflow import MlflowClient  # here: most files need not wait the seconds that its import takes

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def root(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout without code, for the mirror."""
    from tests.mlops.tracking.uploaded import DATA_MD5

    for name in ("MLFLOW_TRACKING_URI", "INSTRUCTFLOW_UPLOADER", "INSTRUCTFLOW_RUN_NAME"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "profiles").mkdir()
    (tmp_path / "params.yaml").write_text("seed: 7\nprofile: smoke\n")
    (tmp_path / "profiles" / "smoke.yaml").write_text("ppo:\n  kl_goal: 3.5\n")
    (tmp_path / "dvc.yaml").write_text("stages:\n  ppo:\n    deps: [tasks/ppo.py, data/ppo.jsonl, data/tax]\n")
    (tmp_path / "data.dvc").write_text(f"outs:\n- md5: {DATA_MD5}\n  path: data\n")
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return tmp_path
