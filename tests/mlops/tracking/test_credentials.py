"""A login in an address goes where it is not printed."""

import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from mlops.tracking.credentials import move_logins, split_login, without_login
from tests.mlops.tracking.uploaded import finish, start, write_rows


@pytest.mark.parametrize(("url", "bare"), [
    ("http://ada:p%40ss@host:5000/x?y", ("http://host:5000/x?y", "ada", "p@ss")),
    ("http://host:5000", ("http://host:5000", "", "")), ("http://ada@host", ("http://ada@host", "", "")),
    ("postgresql://ada:pass@db/x", ("postgresql://ada:pass@db/x", "", "")),
    ("sqlite:///x.db", ("sqlite:///x.db", "", "")), ("", ("", "", "")), ("databricks", ("databricks", "", ""))])
def test_an_address_and_its_login(url: str, bare: tuple[str, str, str]) -> None:
    assert split_login(url) == bare


def test_the_variables_that_mlflow_and_prefect_read() -> None:
    environment = {"MLFLOW_TRACKING_URI": "https://ada:one@host", "PREFECT_API_URL": "http://bob:two@host/api"}
    move_logins(environment)
    assert environment == {"MLFLOW_TRACKING_URI": "https://host", "MLFLOW_TRACKING_USERNAME": "ada",
                           "MLFLOW_TRACKING_PASSWORD": "one", "PREFECT_API_URL": "http://host/api",
                           "PREFECT_API_AUTH_STRING": "bob:two"}
    before = dict(environment)
    move_logins(environment)
    assert environment == before


@pytest.mark.parametrize(("url", "bare"), [
    ("https://user:token@host/a.git", "https://host/a.git"), ("https://token@host/a.git", "https://host/a.git"),
    ("ssh://git:pass@host:22/a", "ssh://git@host:22/a"), ("ssh://git@host/a", "ssh://git@host/a"),
    ("git@host:a/b.git", "git@host:a/b.git"), ("/srv/a.git", "/srv/a.git"), ("file:///srv/a", "file:///srv/a"),
    ("https://host/a@b", "https://host/a@b")])
def test_a_repository_without_its_login(url: str, bare: str) -> None:
    assert without_login(url) == bare


@pytest.fixture
def asked() -> Any:
    """A server that refuses everything and keeps what it was told."""
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            server.seen.append(self.headers.get("Authorization"))  # type: ignore[attr-defined]
            self.send_response(401)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.seen = []  # type: ignore[attr-defined]
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_the_uploader_logs_in_and_says_no_password(root: Path, asked: Any) -> None:
    scratch = start(root)
    write_rows(scratch, range(2))
    finish(root, scratch)
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"http://ada:hidden-1@127.0.0.1:{asked.server_port}"}
    done = subprocess.run([sys.executable, "-m", "mlops.tracking.uploader", "--once"], cwd=root, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 1
    assert "can't be reached" in done.stderr
    assert "hidden-1" not in done.stdout + done.stderr
    assert asked.seen[0] == "Basic YWRhOmhpZGRlbi0x"
    assert not [path for path in root.rglob("*") if path.is_file() and b"hidden-1" in path.read_bytes()]
