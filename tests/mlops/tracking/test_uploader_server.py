"""The uploader against a real MLflow server: stopped and started in the middle of a run, slow, answering with errors.

Nothing is lost, nothing is sent twice, and the stage never waits for the server.
"""

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from mlflow import MlflowClient

from mlops.tracking.mlflow_client import EXPERIMENT
from mlops.tracking.upload_record import Record
from mlops.tracking.uploader import wait_until_uploaded

STEPS = 40
STAGE = """
import sys, time
from pathlib import Path
from rlhf.files import write_json
from rlhf.training.journal import Journal
from mlops.tracking.uploader import ensure_uploader
scratch = Path("scratch/ppo/c0ffee")
write_json(scratch / "run.json", {"stage": "ppo", "profile": "smoke", "seed": 7, "run_name": "calm-heron",
                                  "params": {}})
ensure_uploader(Path.cwd())
journal = Journal(scratch / "journal.csv", ["ppo/kl", "ppo/beta"], None)
for step in range(int(sys.argv[1])):
    journal.append(step, {"ppo/kl": step / 10, "ppo/beta": 0.05})
    time.sleep(0.1)
    while step == STEPS_BEFORE and not Path("go").exists():
        time.sleep(0.1)
write_json(scratch / "done.json", {"metrics": {"ppo/final": 1}, "artifacts": []})
""".replace("STEPS_BEFORE", str(STEPS // 2))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Server:
    """An MLflow server on its own store, started and killed at will."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{self.folder}/server.db",
                   "--default-artifact-root", str(self.folder / "artifacts"), "--host", "127.0.0.1",
                   "--port", str(self.port), "--workers", "1"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                        start_new_session=True)
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2)
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise AssertionError("the server did not start")

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("server"))
    made.start()
    yield made
    made.kill()


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("INSTRUCTFLOW_UPLOADER_POLL_S", "0.2")
    monkeypatch.setenv("INSTRUCTFLOW_UPLOADER_IDLE_S", "3")
    monkeypatch.delenv("INSTRUCTFLOW_UPLOADER", raising=False)
    (tmp_path / "profiles").mkdir()
    (tmp_path / "params.yaml").write_text("seed: 7\nprofile: smoke\n")
    (tmp_path / "profiles" / "smoke.yaml").write_text("ppo: {}\n")
    (tmp_path / "dvc.yaml").write_text("stages:\n  ppo:\n    deps: [tasks/ppo.py]\n")
    return tmp_path


def run_stage(root: Path) -> "subprocess.Popen[bytes]":
    """Halfway the stage waits for the file `go`."""
    return subprocess.Popen([sys.executable, "-c", STAGE, str(STEPS)], cwd=root)


def sent(root: Path) -> int:
    """The last step of which the uploader knows that the server has it."""
    record = Record.load(root / "scratch" / "ppo" / "c0ffee")
    return record.last_step if record else -1


def assert_everything_once(root: Path, uri: str) -> None:
    uploaded = wait_until_uploaded(root, "calm-heron", 600)
    client = MlflowClient(tracking_uri=uri)
    run_id = uploaded["stages"]["ppo"]
    for name in ("ppo/kl", "ppo/beta"):
        counted = Counter(point.step for point in client.get_metric_history(run_id, name))
        assert counted == dict.fromkeys(range(STEPS), 1)
    assert client.get_run(run_id).info.status == "FINISHED"
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    stages = client.search_runs([experiment.experiment_id], "tags.stage = 'ppo'")
    assert len([run for run in stages if run.info.run_id == run_id]) == 1


def test_a_server_killed_and_started_in_the_middle_of_a_run(root: Path, server: Server,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"http://127.0.0.1:{server.port}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    stage = run_stage(root)
    while sent(root) < 5:
        assert stage.poll() is None
        time.sleep(0.1)
    server.kill()
    (root / "go").touch()
    assert stage.wait(600) == 0  # a stage that waited for the server would never end
    server.start()
    assert_everything_once(root, uri)


class Difficult(BaseHTTPRequestHandler):
    """Hands requests on to the real server after a pause, and answers a quarter of them with an error of its own."""

    target = ""
    chance = random.Random(5)

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        time.sleep(0.3)
        if self.chance.random() < 0.25:
            self.answer(503, b"try later")
            return
        request = urllib.request.Request(self.target + self.path, body or None, method=self.command, headers={
            name: value for name, value in self.headers.items() if name.lower() in ("content-type", "accept")})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                self.answer(answer.status, answer.read(), answer.headers.get("Content-Type", ""))
        except urllib.error.HTTPError as error:
            self.answer(error.code, error.read(), error.headers.get("Content-Type", ""))

    def answer(self, status: int, body: bytes, kind: str = "text/plain") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PATCH = do_DELETE = handle_any

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_server_that_is_slow_and_fails_every_fourth_request(root: Path, server: Server,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    Difficult.target = f"http://127.0.0.1:{server.port}"
    with ThreadingHTTPServer(("127.0.0.1", 0), Difficult) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{proxy.server_port}")
        (root / "go").touch()
        assert run_stage(root).wait(600) == 0
        assert_everything_once(root, Difficult.target)
        proxy.shutdown()
