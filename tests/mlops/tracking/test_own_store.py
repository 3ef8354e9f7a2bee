"""MLflow's store in a checkout: where it is, whatever the checkout is called; whether it is whole; what it lost."""

import json
import shutil
import sqlite3
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts

from mlops.tracking.mlflow_client import experiment_id, tracking_uri
from mlops.tracking.own_store import artifacts_beside, champion_lost, damage, own_store

NAMES = ("plain", "50%", "a?b", "[1]", "$x", "two  spaces", "it's", "\u00fc\u00e9 \U0001f600", "#a;b&c", "a%20b")


@pytest.mark.parametrize("name", NAMES)
def test_database_and_artifacts_lie_in_the_checkout(tmp_path: Path, name: str) -> None:
    root = tmp_path / name
    location = artifacts_beside(own_store(root))
    assert location is not None
    assert Path(unquote(urlsplit(location).path)) == root / "mlartifacts"


@pytest.mark.parametrize("before", [False, True])
def test_the_database_is_its_owners_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bool) -> None:
    """A run without servers made it with the account's umask, and `make ui` left it so."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if before:
        (tmp_path / "mlflow.db").touch(0o644)
        (tmp_path / "mlartifacts").mkdir(0o755)
    uri = tracking_uri(tmp_path)
    MlflowClient(tracking_uri=uri).create_experiment("e")
    assert oct((tmp_path / "mlflow.db").stat().st_mode & 0o777) == "0o600"
    assert oct((tmp_path / "mlartifacts").stat().st_mode & 0o777) == "0o700"


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


@pytest.fixture
def checkout(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return tmp_path


def test_a_whole_database_and_none_are_well(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert damage(checkout) == ""
    assert damage(tmp_path_factory.mktemp("empty")) == ""


@pytest.mark.parametrize("place", [0, 30, 0.3, 0.6])
def test_a_damaged_database_is_told_with_the_remedy(checkout: Path, place: float,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkout / "mlflow.db"
    content = bytearray(path.read_bytes())
    start = int(place if place > 1 or place == 0 else place * len(content) // 4096 * 4096)
    content[start: start + 2000] = b"\xff" * 2000
    path.write_bytes(content)
    assert damage(checkout).startswith(f"{path}: is damaged (")
    assert "`mv mlflow.db mlflow.db.damaged`" in damage(checkout)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert damage(checkout) == ""  # it is not the one that is used


def test_a_database_that_was_cut_off(checkout: Path) -> None:
    path = checkout / "mlflow.db"
    path.write_bytes(path.read_bytes()[:100_000])
    assert "is damaged" in damage(checkout)


def test_whether_the_champion_is_lost(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not champion_lost(checkout, "mine")  # nothing was promoted yet
    (checkout / "metrics").mkdir()
    (checkout / "metrics" / "promote.json").write_text(json.dumps({"promote/passed": 0.0}))
    assert not champion_lost(checkout, "mine")
    (checkout / "metrics" / "promote.json").write_text(json.dumps({"promote/passed": 1.0}))
    assert not champion_lost(checkout, "mine")  # a fresh clone
    (checkout / "models" / "promoted").mkdir(parents=True)
    (checkout / "models" / "promoted" / "config.json").write_text("{}")
    assert champion_lost(checkout, "mine")
    assert not champion_lost(checkout, "")  # a profile without a registry
    client = MlflowClient(tracking_uri=own_store(checkout))
    client.create_registered_model("mine-policy")
    client.create_model_version("mine-policy", "file:///nowhere")
    assert champion_lost(checkout, "mine")
    client.set_registered_model_alias("mine-policy", "champion", "1")
    assert not champion_lost(checkout, "mine")
    with sqlite3.connect(checkout / "mlflow.db") as database:
        database.execute("BEGIN EXCLUSIVE")
        assert not champion_lost(checkout, "mine")  # who cannot look does not say so
    (checkout / "mlflow.db").unlink()
    assert champion_lost(checkout, "mine")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert not champion_lost(checkout, "mine")
