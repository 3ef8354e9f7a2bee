"""Who gets what from the servers of `make ui`: accounts of this machine, process lists, files, runs started by hand."""

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from supervisor.options import ServerOptions

from flows.environment import LOGIN, SERVERS
from infra.servers import Links, Servers
from mlops.tracking.own_store import own_store
from rlhf.errors import UserError
from tests.flows.checkout import REPOSITORY, Checkout
from tests.infra.site import wait
from tests.infra.stores import answer, free_port

SECRET = "the-secret-of-the-test"
USER = f"instructflow:{SECRET}"
NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
as_root = pytest.mark.skipif(os.getuid() != 0, reason="needs root, to act as another account")


class Mlflow:
    """MLflow's server as `make ui` starts it."""

    def __init__(self, folder: Path) -> None:
        self.port, self.folder = free_port(), folder
        self.url = f"http://127.0.0.1:{self.port}"
        self.environment = {
            **os.environ, "INSTRUCTFLOW_LOGIN": USER, "INSTRUCTFLOW_STORE": f"sqlite:///{folder}/mlflow.db",
            "INSTRUCTFLOW_ARTIFACTS": str(folder / "artifacts"), "PYTHONPATH": str(REPOSITORY),
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (folder / "log").open("wb") as log:
            self.process = subprocess.Popen([sys.executable, "-m", "infra.serve_local", "mlflow", str(self.port)],
                                            env=self.environment, cwd=folder, stdout=log, stderr=log,
                                            start_new_session=True)

    def healthy(self) -> bool:
        assert self.process.poll() is None, (self.folder / "log").read_text()
        return answer(f"{self.url}/health") == 200


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[Mlflow]:
    folder = tmp_path_factory.mktemp("mlflow")
    shutil.copy(empty_store, folder / "mlflow.db")
    server = Mlflow(folder)
    try:
        wait(server.healthy, "MLflow")
        yield server
    finally:
        os.killpg(server.process.pid, signal.SIGKILL)
        server.process.wait()


def test_mlflow_answers_those_who_know_the_password(mlflow: Mlflow) -> None:
    for path in ("/", "/version", "/api/2.0/mlflow/experiments/search?max_results=1", "/get-artifact",
                 "/ajax-api/3.0/mlflow/assistant/sessions", "/graphql", "/v1/traces", "/static-files/x"):
        assert answer(f"{mlflow.url}{path}") == answer(f"{mlflow.url}{path}", "instructflow:wrong") == 401, path
    assert answer(f"{mlflow.url}/api/2.0/mlflow/experiments/search?max_results=1", USER) == 200
    assert answer(f"{mlflow.url}/", USER) == 200


def test_mlflow_s_own_client_logs_in_by_the_environment(mlflow: Mlflow) -> None:
    code = """from mlflow import MlflowClient
client = MlflowClient()
run = client.create_run(client.create_experiment("by hand"))
client.log_text(run.info.run_id, "kept", "note.txt")
print(open(client.download_artifacts(run.info.run_id, "note.txt")).read())"""
    environment = {**os.environ, **Links("", mlflow.url).environment(USER), "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "kept\n", done.stderr
    assert SECRET not in done.stdout + done.stderr + (mlflow.folder / "log").read_text()


def test_no_process_list_has_the_password(mlflow: Mlflow) -> None:
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes())
        except OSError:
            continue  # ended meanwhile
    assert any(str(mlflow.port).encode() in line for line in lines)
    assert not [line for line in lines if SECRET.encode() in line]


@as_root
def test_another_account_gets_nothing(mlflow: Mlflow, tmp_path: Path) -> None:
    servers = Servers(tmp_path)
    servers.folder.mkdir(parents=True)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    login = servers.login()
    for path in (tmp_path / LOGIN, Path(f"/proc/{mlflow.process.pid}/environ")):
        done = subprocess.run([*NOBODY, "cat", str(path)], capture_output=True, text=True)
        assert "Permission denied" in done.stderr
        assert not done.stdout
    request = f"GET /version HTTP/1.1\r\nHost: 127.0.0.1:{mlflow.port}\r\nConnection: close\r\n\r\n"
    done = subprocess.run([*NOBODY, "bash", "-c", f"exec 3<>/dev/tcp/127.0.0.1/{mlflow.port}; cat >&3; cat <&3"],
                          input=request, capture_output=True, text=True)
    assert done.stdout.startswith("HTTP/1.1 401 ")
    assert login != USER


def test_files_with_logins_are_their_owner_s_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        servers = Servers(tmp_path)
        servers.folder.mkdir(parents=True)
        login, account = servers.login(), servers.account()
        assert Servers(tmp_path).login() == login
        config = servers._supervisord(Links("http://127.0.0.1:1", "http://127.0.0.1:2", "http://127.0.0.1:3"))
    finally:
        os.umask(before)
    assert len(login.split(":")[1]) >= 40
    for path in (tmp_path / LOGIN, tmp_path / "feedback/.label-studio/account.json"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "feedback/.label-studio").stat().st_mode) == 0o700
    secrets = [login.split(":")[1], account["password"], account["key"]]
    held = [line for line in config.splitlines() if any(secret in line for secret in secrets)]
    assert held
    assert all(line.startswith("environment=") for line in held)
    assert config.count("umask=077") == 3  # both servers and Label Studio; a run's files are as the worker makes them


@pytest.mark.parametrize("name", ["a%b", "a;b", "a #b", 'a"b', "it's", "a\\b"])
def test_a_path_that_supervisord_would_read_otherwise_is_refused(tmp_path: Path, name: str) -> None:
    root = tmp_path / name
    with pytest.raises(UserError, match="supervisord, which runs the servers, cannot read"):
        Servers(root).up()
    assert not root.exists()


def test_supervisord_reads_an_odd_path_as_it_is(tmp_path: Path) -> None:
    servers = Servers(tmp_path / "\u00fc ?[1] $x, y=z")
    servers.folder.mkdir(parents=True)
    servers.config.write_text(servers._supervisord(Links("http://127.0.0.1:1", "http://127.0.0.1:2")), encoding="utf-8")
    options = ServerOptions()
    options.realize(["-c", str(servers.config)])
    programs = {program.name: program for group in options.process_group_configs for program in group.process_configs}
    assert programs["mlflow"].environment["INSTRUCTFLOW_STORE"] == own_store(servers.root)
    assert programs["mlflow"].environment["INSTRUCTFLOW_ARTIFACTS"] == str(servers.root / "mlartifacts")
    assert programs["mlflow"].stdout_logfile == str(servers.folder / "mlflow.log")
    assert programs["worker-cpu"].environment["INSTRUCTFLOW_CHECKOUT"] == str(servers.root)


def test_a_complaint_of_supervisord_shows_no_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    servers = Servers(tmp_path)
    Checkout(tmp_path)
    monkeypatch.setattr(Servers, "_supervisord", lambda self, links: (
        f'[supervisord]\n[program:a]\ncommand=x\nenvironment=INSTRUCTFLOW_LOGIN="{self.login()}",B="%(no)s"\n'))
    with pytest.raises(UserError, match=r"^supervisord: ") as refused:
        servers.up()
    assert "INSTRUCTFLOW_LOGIN" in str(refused.value)
    assert servers.login().split(":")[1] not in str(refused.value)


def test_links_log_in_only_where_they_are_asked_for() -> None:
    links = Links("http://127.0.0.1:1", "http://127.0.0.1:2")
    assert SECRET not in links.text("")
    assert f"http://127.0.0.1:1/enter#{USER} " in links.text(USER)
    assert f"http://127.0.0.1:2/enter#{USER} " in links.text(USER)


# --- a run started by hand --------------------------------------------------------------------------------------------


def found_by_hand(root: Path, **more: str) -> str:
    """(the API, its login) that a run started by hand there would use."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_API_")}
    code = "import os, flows.environment; print(*(os.environ.get(f'PREFECT_API_{n}') for n in ('URL', 'AUTH_STRING')))"
    return subprocess.run([sys.executable, "-c", code], cwd=root, text=True, check=True, stdout=subprocess.PIPE,
                          env={**environment, "PYTHONPATH": str(REPOSITORY), **more}).stdout.strip()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    servers = Servers(tmp_path)
    servers.folder.mkdir(parents=True)
    return tmp_path


def test_a_run_by_hand_finds_server_and_password(root: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        (root / SERVERS).write_text(json.dumps({"prefect": url, "mlflow": ""}))
        login = Servers(root).login()
        assert found_by_hand(root) == f"{url}/api {login}"
        assert found_by_hand(root, PREFECT_API_URL=f"{url}/api") == f"{url}/api {login}"
        assert found_by_hand(root, PREFECT_API_URL="http://other/api") == "http://other/api None"
    assert found_by_hand(root) == "None None"  # nobody listens any more


@as_root
def test_another_account_that_took_the_port_is_told_no_password(root: Path) -> None:
    port = free_port()
    code = f"""import os, socket
os.setgid(65534); os.setuid(65534)
listener = socket.create_server(("127.0.0.1", {port})); print(flush=True); listener.accept()"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as thief:
        assert thief.stdout
        thief.stdout.readline()
        (root / SERVERS).write_text(json.dumps({"prefect": f"http://127.0.0.1:{port}", "mlflow": ""}))
        Servers(root).login()
        assert found_by_hand(root) == "None None"
        assert thief.poll() is None  # nobody even connected
        thief.kill()
