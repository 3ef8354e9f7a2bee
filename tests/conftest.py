"""What several test folders share: the small pipeline, whose files a test restores after changing them, and the
uploader's checkout."""

import shutil
from pathlib import Path

import pytest

from tests.tasks.small_pipeline import STAGES, SmallPipeline, Undisturbed


@pytest.fixture(scope="session")
def small_pipeline(tmp_path_factory: pytest.TempPathFactory) -> SmallPipeline:
    pipeline = SmallPipeline(tmp_path_factory.mktemp("pipeline"))
    pipeline.finish("ingest")
    shutil.copytree(pipeline.root / "build" / "data", pipeline.root / "data")
    (pipeline.root / "metrics" / "validate.json").write_text("{}\n")
    return pipeline


@pytest.fixture(scope="session")
def undisturbed(small_pipeline: SmallPipeline) -> Undisturbed:
    """Outputs of each training stage, run once from start to end."""
    outputs = {}
    for stage in STAGES:
        small_pipeline.finish(stage)
        outputs[stage] = small_pipeline.files(stage)
    return outputs


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new MLflow database; making one takes seconds, so each test gets a copy."""
    from mlflow import MlflowClient  # here: most files need not wait the seconds that its import takes

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def root(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout without code, for the uploader."""
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
