"""MLflow's store in a checkout, whatever the checkout is called: the database is there and nowhere else."""

from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts

from mlops.tracking.mlflow_client import experiment_id
from mlops.tracking.own_store import artifacts_beside, own_store

NAMES = ("plain", "50%", "a?b", "[1]", "$x", "two  spaces", "it's", "\u00fc\u00e9 \U0001f600", "#a;b&c", "a%20b")


@pytest.mark.parametrize("name", NAMES)
def test_database_and_artifacts_lie_in_the_checkout(tmp_path: Path, name: str) -> None:
    root = tmp_path / name
    location = artifacts_beside(own_store(root))
    assert location is not None
    assert Path(unquote(urlsplit(location).path)) == root / "mlartifacts"


def test_a_run_is_stored_and_read_back_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "50% a?b #c"
    root.mkdir()
    (root / "rows.txt").write_text("x")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    client = MlflowClient(tracking_uri=own_store(root))
    run = client.create_run(experiment_id(client, root)).info.run_id
    client.log_artifact(run, str(root / "rows.txt"))
    read = download_artifacts(run_id=run, artifact_path="rows.txt", dst_path=str(tmp_path / "down"),
                              tracking_uri=own_store(root))
    assert Path(read).read_text() == "x"
    assert sorted(path.name for path in root.iterdir()) == ["mlartifacts", "mlflow.db", "rows.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["50% a?b #c", "down"]


def test_other_stores_have_no_folder_of_ours() -> None:
    assert artifacts_beside("http://127.0.0.1:5000") is None
    assert artifacts_beside("postgresql://127.0.0.1/mlflow") is None
