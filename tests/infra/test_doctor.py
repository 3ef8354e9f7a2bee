"""The doctor's findings on a machine and a checkout where something is wrong."""

import base64
import socket
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from infra import doctor
from infra.doctor import run_checks
from tests.flows.checkout import REPOSITORY, Checkout


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI", "INSTRUCTFLOW_WEBHOOK", "MLFLOW_TRACKING_USERNAME",
                 "LABEL_STUDIO_URL", "LABEL_STUDIO_API_KEY", "LABEL_STUDIO_PYTHON"):
        monkeypatch.delenv(name, raising=False)
    made = Checkout(tmp_path)
    made.write("requirements.lock", "rich==0.0.1\nno-such-package==1.0\nwindows-only==1; sys_platform == 'win32'\n")
    made.write(".dvc/config", "[core]\n    no_scm = true\n    analytics = false\n    remote = store\n"
               "['remote \"store\"']\n    url = /nowhere/at/all\n")
    made.git()
    return tmp_path


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def guarded() -> Iterator[str]:
    """A server that asks for a password for everything but its health."""
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            allowed = self.headers.get("Authorization") in (
                "Basic " + base64.b64encode(b"ada:right").decode(), "Token right")
            self.send_response(200 if self.path == "/health" or allowed else 401)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_this_checkout_is_well() -> None:
    checks = (doctor.python, doctor.packages, doctor.programs, doctor.parameters, doctor.writable, doctor.memory)
    assert [item for item in run_checks(REPOSITORY, checks) if item.state == "fail"] == []


def test_packages(root: Path) -> None:
    finding = doctor.packages(root)
    assert (finding.state, finding.detail) == ("fail", "not installed: no-such-package")
    (root / "requirements.lock").write_text("rich==0.0.1\n")
    finding = doctor.packages(root)
    assert finding.state == "warn"
    assert finding.detail.startswith("rich ")
    assert finding.fix == "rm .venv/.installed; make setup"


def test_a_wrong_profile(root: Path) -> None:
    (root / "profiles" / "small.yaml").write_text("ppo: {bta: 1}\n")
    finding = doctor.parameters(root)
    assert finding.state == "fail"
    assert finding.detail.endswith("unknown key ppo.bta; did you mean beta?")


def test_uncommitted_files_and_no_repository(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert doctor.repository(root).state == "ok"
    (root / "new.py").write_text("")
    assert doctor.repository(root).detail == "1 uncommitted files"
    bare = tmp_path_factory.mktemp("bare")
    assert "not a git repository" in doctor.repository(bare).detail


def test_a_full_disk(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = doctor.shutil.disk_usage(root)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage._replace(free=10**9))
    finding = doctor.disk(root)
    assert finding.state == "fail"
    assert "dvc gc" in finding.fix


def test_the_gpu_profile_without_a_gpu(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert doctor.gpu(root).state == "unused"
    (root / "params.yaml").write_text("seed: 1\nprofile: gpu\n")
    (root / "profiles" / "gpu.yaml").write_text("ppo: {}\n")
    assert doctor.gpu(root).state == "fail"
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert "does not see it" in doctor.gpu(root).detail


def test_a_remote_that_is_not_there(root: Path) -> None:
    finding = doctor.remote(root)
    assert finding.detail.startswith("store /nowhere/at/all")
    config = root / ".dvc" / "config"
    config.write_text(config.read_text().replace("    remote = store\n", ""))
    assert doctor.remote(root).fix == "dvc remote add -d NAME URL"


def test_servers_that_do_not_answer(root: Path, closed_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{closed_port}/api")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{closed_port}")
    monkeypatch.setenv("INSTRUCTFLOW_WEBHOOK", f"http://127.0.0.1:{closed_port}/secret-part")
    checks = (doctor.prefect, doctor.worker, doctor.mlflow, doctor.webhook)
    findings = {item.what: item for item in run_checks(root, checks)}
    assert {name: item.state for name, item in findings.items()} == {
        "Prefect": "fail", "worker": "unused", "MLflow": "warn", "notices": "fail"}
    assert "refused" in findings["Prefect"].detail
    assert "secret-part" not in findings["notices"].detail


def test_a_wrong_password_is_told(root: Path, guarded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", guarded)
    assert doctor.mlflow(root).detail.endswith("answers 401 Unauthorized")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ada")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
    assert doctor.mlflow(root).state == "fail"
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "right")
    assert doctor.mlflow(root).state == "ok"


def test_label_studio(root: Path, guarded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.labels(root).state == "unused"
    monkeypatch.setenv("LABEL_STUDIO_URL", guarded)
    assert doctor.labels(root).fix.startswith("make labels")
    monkeypatch.setenv("LABEL_STUDIO_PYTHON", sys.executable)
    monkeypatch.setenv("LABEL_STUDIO_API_KEY", "wrong")
    assert doctor.labels(root).detail.endswith("answers 401 Unauthorized")
    monkeypatch.setenv("LABEL_STUDIO_API_KEY", "right")
    assert doctor.labels(root).state == "ok"


def test_a_store_that_is_damaged_or_lost_its_champion(root: Path) -> None:
    assert doctor.store(root).state == "unused"
    (root / "metrics").mkdir()
    (root / "models" / "promoted").mkdir(parents=True)
    (root / "models" / "promoted" / "config.json").write_text("{}")
    (root / "metrics" / "promote.json").write_text('{"promote/passed": 1.0}')
    assert "lacks the champion" in doctor.store(root).detail
    (root / "mlflow.db").write_bytes(b"no database, whatever its name says" * 100)
    assert doctor.store(root).state == "fail"
    assert "mlflow.db: is damaged" in doctor.store(root).detail


def test_notes_of_another_account(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(root))
    assert doctor.notes(root).state == "ok"
    monkeypatch.setattr("infra.doctor.os.getuid", lambda: 12345)
    assert doctor.notes(root).state == "warn"


def test_ports_in_use(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from infra.servers import _port

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setenv("A_PORT", str(port))
        assert _port("A_PORT", 1) > port


def test_the_exit_code(root: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "infra.doctor"], cwd=root, capture_output=True, text=True,
                          env={**doctor.os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "60"})
    assert done.returncode == 1
    assert "not installed: no-such-package" in done.stdout
    assert f"GB free at {root}\n" in done.stdout  # whole, in a narrow terminal
    assert "Traceback" not in done.stderr
