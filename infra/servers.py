"""Prefect server, MLflow server and a worker on this machine: `make ui` starts them, Ctrl-C or `make down` stops them.
Where `make labels` has installed Label Studio, that too.

    python -m infra.servers up | down | status
    python -m infra.servers links            the links that log you in
    eval "$(python -m infra.servers env)"    for Prefect's and MLflow's own commands

Prefect and MLflow ask for a password, made at the first start, kept in scratch/servers/login (docs/security.md). They
run under supervisord, which restarts what dies; its files are in scratch/servers/. Prefect keeps its database in
PREFECT_HOME, MLflow's is mlflow.db of the checkout: what runs without servers have written is there too.
INSTRUCTFLOW_PREFECT_PORT (4200), INSTRUCTFLOW_MLFLOW_PORT (5000) and INSTRUCTFLOW_LABELS_PORT (8080) say which ports to
try first.
"""

import argparse
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

import flows.environment  # noqa: F401

# isort: split
from flows.environment import LOGIN, SERVERS
from flows.preflight import check_checkout
from flows.workspaces import end_runs_cut_short
from infra import orphans
from infra.serve_local import HOST, link
from infra.setup import HEARTBEAT_SECONDS, LEASES
from mlops.tracking.own_store import keep_private, own_store
from rlhf.errors import UserError, one_line
from rlhf.files import write_atomic

ACCOUNT = Path("feedback/.label-studio/account.json")  # beside Label Studio's database: what people do is no scratch
HEALTHY_SECONDS = 180.0
STOP_SECONDS = 60
BIN = Path(sys.executable).parent
PYTHON = shlex.quote(sys.executable)
UNUSABLE = "%;#\"'\\\n"  # what begins variables, comments and quotes in supervisord's configuration


@dataclass(frozen=True)
class Links:
    """Where the servers are."""

    prefect: str
    mlflow: str
    labels: str = ""  # Label Studio, where it is installed

    def environment(self, login: str) -> dict[str, str]:
        """What a client needs to use the servers; `login` is NAME:PASSWORD."""
        name, _, password = login.partition(":")
        always = {"PREFECT_API_URL": f"{self.prefect}/api", "PREFECT_API_AUTH_STRING": login,
                  "MLFLOW_TRACKING_URI": self.mlflow, "MLFLOW_TRACKING_USERNAME": name,
                  "MLFLOW_TRACKING_PASSWORD": password}
        return always | ({"LABEL_STUDIO_URL": self.labels} if self.labels else {})

    def text(self, login: str) -> str:
        """What to open; without `login` the links do not log in."""
        prefect, mlflow = (link(url, login) if login else url for url in (self.prefect, self.mlflow))
        lines = [f"Prefect   {prefect}   start, schedule and watch runs", f"MLflow    {mlflow}   compare them"]
        if not login:
            lines.append("`python -m infra.servers links` prints the links that log you in")
        return "\n".join(lines + ([f"Labels    {self.labels}   rank completions; the account is in {ACCOUNT}"]
                                  if self.labels else []))


@dataclass(frozen=True)
class Servers:
    """The servers of one checkout."""

    root: Path

    @property
    def folder(self) -> Path:
        return self.root / SERVERS.parent

    @property
    def config(self) -> Path:
        return self.folder / "supervisord.conf"

    @property
    def label_studio(self) -> Path:
        return self.root / ".venv-labels" / "bin" / "label-studio"

    def account(self) -> dict[str, str]:
        """The first account of Label Studio, made once; only its owner may read it."""
        path = self.root / ACCOUNT
        path.parent.mkdir(parents=True, exist_ok=True)
        path.parent.chmod(0o700)
        if not path.exists():
            content = {"email": "admin@localhost.localdomain", "password": secrets.token_urlsafe(12),
                       "key": secrets.token_hex(20)}
            _write_private(path, json.dumps(content, indent=1) + "\n")
        account: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
        return account

    def login(self) -> str:
        """NAME:PASSWORD of Prefect and MLflow, made once; only its owner may read it."""
        path = self.root / LOGIN
        if not path.exists():
            _write_private(path, f"instructflow:{secrets.token_urlsafe(32)}\n")
        return path.read_text(encoding="utf-8").strip()

    def links(self) -> Links:
        return Links(**json.loads((self.root / SERVERS).read_text(encoding="utf-8")))

    def running(self) -> bool:
        """Whether this checkout's supervisord is alive, also while it is still stopping."""
        try:
            pid = int((self.folder / "supervisord.pid").read_text())
            return str(self.config) in Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        except (OSError, ValueError):
            return False

    def up(self) -> Links:
        """Starts what is not running and waits until it is healthy. Raises UserError with the log's last lines."""
        if found := next((character for character in f"{self.root}{sys.executable}" if character in UNUSABLE), ""):
            raise UserError(f"{self.root}: supervisord, which runs the servers, cannot read {found!r} in a path: "
                            "rename the folder (runs without servers work in it)")
        check_checkout(self.root)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)
        if self.running():
            return self.links()
        keep_private(self.root)
        self._end_orphans()  # before ports are chosen: they may hold them
        links = Links(f"http://{HOST}:{_port('INSTRUCTFLOW_PREFECT_PORT', 4200)}",
                      f"http://{HOST}:{_port('INSTRUCTFLOW_MLFLOW_PORT', 5000)}")
        if self.label_studio.exists():
            links = replace(links, labels=f"http://{HOST}:{_port('INSTRUCTFLOW_LABELS_PORT', 8080)}")
        write_atomic(self.root / SERVERS, json.dumps(asdict(links)).encode())
        _write_private(self.config, self._supervisord(links))  # has the logins
        started = subprocess.run([str(BIN / "supervisord"), "-c", str(self.config)], capture_output=True, text=True)
        if started.returncode:
            reason = (started.stderr or started.stdout).strip()
            reason = re.sub(r'="[^"]*"', '="…"', reason)  # it may quote its configuration, logins included
            raise UserError(f"supervisord: {reason}")
        try:
            self._wait("prefect", f"{links.prefect}/api/health")
            self._wait("mlflow", f"{links.mlflow}/health")
            if links.labels:
                self._wait("labels", f"{links.labels}/health")
            print("servers: deployments and automations are set up", flush=True)
            setup = subprocess.run([sys.executable, "-m", "infra.setup", "--workers-stopped"], cwd=self.root,
                                   capture_output=True, text=True,
                                   env={**os.environ, **links.environment(self.login())})
            if setup.returncode:
                raise UserError((setup.stderr or setup.stdout).strip().splitlines()[-1])
            print(setup.stdout.strip(), flush=True)
            self._control("start", "workers:*")
            end_runs_cut_short(self.root, links.environment(self.login()))
        except BaseException:
            self.down()
            raise
        return links

    def down(self) -> bool:
        """Stops the servers, the worker first: its runs save their state. False if none were running."""
        if self.running():
            self._control("shutdown")
            deadline = time.monotonic() + STOP_SECONDS + 30
            while self.running() and time.monotonic() < deadline:
                time.sleep(0.3)
            self._end_orphans()
        elif not self._end_orphans():
            return False
        (self.root / SERVERS).unlink(missing_ok=True)
        return True

    def status(self) -> str:
        return self._control("status").stdout.strip() if self.running() else "not running"

    # --- parts ---

    def _end_orphans(self) -> bool:
        """Ends servers' processes that no supervisord knows any more; workers' are left alone, they may be runs."""
        return bool(orphans.end(f"unix://{_socket(self.folder)}", "prefect", "mlflow", "labels"))

    def workers_left(self) -> list[int]:
        """Processes of workers whose supervisord was killed: first of each, its own children aside."""
        found = orphans.members(f"unix://{_socket(self.folder)}", "worker-cpu", "worker-gpu")
        return [pid for pid in found if psutil.Process(pid).ppid() not in found]

    def _control(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([str(BIN / "supervisorctl"), "-c", str(self.config), *command], capture_output=True,
                              text=True)

    def _wait(self, name: str, url: str) -> None:
        print(f"servers: {name} starts", flush=True)  # some seconds each, on a busy machine a minute
        deadline = time.monotonic() + HEALTHY_SECONDS
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(url, timeout=2) as answer:
                    if answer.status == 200:
                        return
            except (urllib.error.URLError, OSError):
                pass
            if "FATAL" in self._control("status", name).stdout:
                break
            time.sleep(0.3)
        log = self.folder / f"{name}.log"
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:] if log.exists() else []
        raise UserError(f"{name} does not start; {log} ends with: {' / '.join(last) or 'nothing'}")

    def _supervisord(self, links: Links) -> str:
        login = self.login()
        serve = f"{PYTHON} -m infra.serve_local"
        port = {name: url.rpartition(":")[2] for name, url in asdict(links).items()}
        labels_environment = {"LABEL_STUDIO_API_KEY": self.account()["key"]} if links.labels else {}
        pools = ["cpu"] + (["gpu"] if shutil.which("nvidia-smi") else [])
        parts = [f"""[unix_http_server]
file={_socket(self.folder)}
chmod=0700

[supervisord]
logfile={self.folder}/supervisord.log
pidfile={self.folder}/supervisord.pid
directory={self.root}

[rpcinterface:supervisor]
supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface

[supervisorctl]
serverurl=unix://{_socket(self.folder)}
""",
            self._program("prefect", f"{serve} prefect {port['prefect']}", 1,
                          {"INSTRUCTFLOW_LOGIN": login,
                           "PREFECT_UI_URL": links.prefect, "PREFECT_SERVER_UI_API_URL": f"{links.prefect}/api",
                           "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": links.prefect,
                           "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
                           "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": LEASES}),
            self._program("mlflow", f"{serve} mlflow {port['mlflow']}", 2,
                          {"INSTRUCTFLOW_LOGIN": login, "INSTRUCTFLOW_STORE": own_store(self.root),
                           "INSTRUCTFLOW_ARTIFACTS": str(self.root / "mlartifacts"),
                           "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"})]
        if links.labels:
            parts.append(self._labels(links))
        parts += [self._program(f"worker-{pool}", f"{PYTHON} -m infra.worker {pool}", 9,
                                {**links.environment(login), **labels_environment,
                                 "INSTRUCTFLOW_CHECKOUT": str(self.root),
                                 "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS)},
                                start=False)
                  for pool in pools]
        parts.append("[group:workers]\nprograms=" + ",".join(f"worker-{pool}" for pool in pools) + "\npriority=9\n")
        return "\n".join(parts)

    def _labels(self, links: Links) -> str:
        account = self.account()
        program = shlex.quote(str(self.label_studio))
        return self._program("labels", f"{program} start --no-browser --internal-host {HOST} --port "
                             f"{links.labels.rpartition(':')[2]}", 3,
                             {"DJANGO_SETTINGS_MODULE": "infra.label_studio_settings",
                              "PYTHONPATH": str(Path(__file__).parents[1]),
                              "LABEL_STUDIO_BASE_DATA_DIR": str((self.root / ACCOUNT).parent),
                              "LABEL_STUDIO_USERNAME": account["email"], "LABEL_STUDIO_PASSWORD": account["password"],
                              "LABEL_STUDIO_USER_TOKEN": account["key"], "LABEL_STUDIO_HOST": links.labels,
                              "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true",
                              "LABEL_STUDIO_DISABLE_SIGNUP_WITHOUT_LINK": "true",
                              "COLLECT_ANALYTICS": "false", "LATEST_VERSION_CHECK": "false", "SENTRY_DSN": "",
                              "FRONTEND_SENTRY_DSN": ""})

    def _program(self, name: str, command: str, priority: int, environment: dict[str, str], start: bool = True) -> str:
        if start:  # a server; a worker's runs may outlive it
            command = f"{PYTHON} -m infra.orphans {command}"
        umask = "umask=077\n" if start else ""  # what a server writes is for its owner alone
        values = {key: value.replace("%", "%%") for key, value in environment.items()}
        settings = ",".join(f'{key}="{value}"' for key, value in values.items())
        return f"""[program:{name}]
command={command}
environment={settings}
priority={priority}
autostart={str(start).lower()}
autorestart=true
startsecs=3
stopwaitsecs={STOP_SECONDS}
stopasgroup=true
killasgroup=true
redirect_stderr=true
stdout_logfile={self.folder}/{name}.log
stdout_logfile_maxbytes=10MB
stdout_logfile_backups=2
{umask}"""


def _write_private(path: Path, text: str) -> None:
    """A file that only its owner may read, from its first byte on."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)


def _port(variable: str, first: int) -> int:
    """The first free port from the wanted one on."""
    wanted = os.environ.get(variable, str(first))
    if not wanted.isdigit() or not 0 < int(wanted) < 65_436:
        raise UserError(f"{variable} = {wanted!r}: must be a port")
    for port in range(int(wanted), int(wanted) + 100):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
        if port != int(wanted):
            print(f"port {wanted} is in use, taking {port}", file=sys.stderr)
        return port
    raise UserError(f"no free port from {wanted} on; set {variable}")


def _socket(folder: Path) -> Path:
    """supervisord's socket: in the folder, or, where that path is too long for one, in the temporary folder."""
    path = folder / "supervisor.sock"
    if len(str(path)) < 90:
        return path
    import hashlib
    import tempfile

    return Path(tempfile.gettempdir()) / f"instructflow-{hashlib.sha256(str(folder).encode()).hexdigest()[:12]}.sock"


def up(servers: Servers, stay: bool) -> None:
    """Starts them, says where they are; with `stay` until Ctrl-C, which stops them."""
    def text() -> str:
        return servers.links().text(servers.login() if sys.stdout.isatty() else "")  # a log is no place for a login

    if servers.running():
        print(f"already running; `make down` stops them\n{text()}")
        return
    print("starting Prefect server, MLflow server and worker ...", flush=True)
    servers.up()
    print(text(), flush=True)
    if not stay:
        print("stop them with `make down`")
        return

    print("Ctrl-C stops them", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while servers.running():
            time.sleep(2)
        print("stopped from elsewhere")
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print("\nstopping; a run in progress saves its state and goes on at the next `make ui` ...", flush=True)
        servers.down()
        print("stopped")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m infra.servers", description="The local servers.")
    parser.add_argument("command", choices=("up", "down", "status", "links", "env"))
    parser.add_argument("--detach", action="store_true", help="with up: return when they are healthy")
    options = parser.parse_args()
    servers = Servers(Path.cwd())
    with one_line("servers"):
        if options.command == "up":
            up(servers, not options.detach)
        elif options.command == "down":
            print("stopped" if servers.down() else "not running")
            for pid in servers.workers_left():
                print(f"a worker still runs (process {pid}), perhaps with a run: `kill {pid}` ends both")
        elif options.command == "status":
            print(servers.status())
        elif not servers.running():
            raise UserError("not running; `make ui` starts them")
        elif options.command == "links":
            print(servers.links().text(servers.login()))
        else:
            print("".join(f"export {name}={shlex.quote(value)}\n"
                          for name, value in servers.links().environment(servers.login()).items()), end="")


if __name__ == "__main__":
    main()
