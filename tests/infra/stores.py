"""PostgreSQL, an S3 server, Prefect and MLflow with passwords, on this machine: what compose starts, natively."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from base64 import b64encode
from pathlib import Path

from tests.flows.checkout import REPOSITORY
from tests.infra.site import wait

BIN = Path(sys.executable).parent
TOOLS = REPOSITORY / ".venv-tools" / "bin"  # `make scan` and `make drills` install weed there
WEED = shutil.which("weed", path=f"{BIN}{os.pathsep}{TOOLS}{os.pathsep}{os.environ['PATH']}")
POSTGRES = max(Path("/usr/lib/postgresql").glob("*/bin"), default=Path("/nowhere"))
MISSING = [name for name, there in (("PostgreSQL", POSTGRES.exists()), ("weed", WEED)) if not there]
PASSWORDS = {"POSTGRES": "pg-secret-of-the-drill", "S3_KEY": "drill", "S3_SECRET": "s3-secret-of-the-drill",
             "PREFECT": "ada:prefect-secret-of-the-drill", "MLFLOW": "mlflow-secret-of-the-drill"}
INNER = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc",
         "s3.port.grpc")  # the object store's own


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Stores:
    """Starts everything in `folder`; `environment` is a client's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []
        self.ports = {name: free_port() for name in ("postgres", "s3", "prefect", "mlflow")}
        self.inner = {name: free_port() for name in INNER}
        self.database = Path(tempfile.mkdtemp(prefix="instructflow-pg-"))  # its user must be able to reach it
        self.prefect, self.mlflow, self.s3 = (f"http://127.0.0.1:{self.ports[name]}"
                                              for name in ("prefect", "mlflow", "s3"))
        self.environment = {
            **os.environ, "PREFECT_API_URL": f"{self.prefect}/api", "PREFECT_API_AUTH_STRING": PASSWORDS["PREFECT"],
            "PREFECT_HOME": str(folder / "prefect"), "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
            "MLFLOW_TRACKING_URI": self.mlflow, "MLFLOW_TRACKING_USERNAME": "admin",
            "MLFLOW_TRACKING_PASSWORD": PASSWORDS["MLFLOW"], "AWS_ENDPOINT_URL": self.s3,
            "MLFLOW_S3_ENDPOINT_URL": self.s3, "AWS_ACCESS_KEY_ID": PASSWORDS["S3_KEY"],
            "AWS_SECRET_ACCESS_KEY": PASSWORDS["S3_SECRET"], "AWS_DEFAULT_REGION": "us-east-1",
            "PATH": os.pathsep.join([str(BIN), str(TOOLS), os.environ["PATH"]])}

    def start(self) -> None:
        self.start_postgres()
        (self.folder / "s3").mkdir()
        self.start_s3()
        subprocess.run([sys.executable, "-m", "infra.bucket", "mlflow", "dvc"], env=self.environment, check=True)
        self._start_servers()

    def start_s3(self) -> None:
        command = [sys.executable, "-m", "infra.serve_s3", "--dir", f"{self.folder}/s3",
                   "--port", str(self.ports["s3"]), *(f"-{name}={port}" for name, port in self.inner.items())]
        self.s3_process = self._run("s3", command, {name: PASSWORDS[name] for name in ("S3_KEY", "S3_SECRET")})
        wait(lambda: answer(f"{self.s3}/status") == 200, "the object store")

    def stop_s3(self) -> None:
        os.killpg(self.s3_process.pid, signal.SIGKILL)
        self.s3_process.wait()

    def _start_servers(self) -> None:
        password = PASSWORDS["POSTGRES"]
        self._run("prefect", [sys.executable, "-m", "infra.serve_prefect", "--port", str(self.ports["prefect"])], {
            "PREFECT_API_DATABASE_CONNECTION_URL":
                f"postgresql+asyncpg://drill:{password}@127.0.0.1:{self.ports['postgres']}/prefect",
            "PREFECT_SERVER_API_AUTH_STRING": PASSWORDS["PREFECT"]})
        self._run("mlflow", [sys.executable, "-m", "infra.serve_mlflow", "--port", str(self.ports["mlflow"])], {
            "MLFLOW_BACKEND_STORE_URI": f"postgresql://drill:{password}@127.0.0.1:{self.ports['postgres']}/mlflow",
            "MLFLOW_ARTIFACTS_DESTINATION": "s3://mlflow/artifacts", "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORDS["MLFLOW"],
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "signs-the-sessions-of-the-drill"})
        wait(lambda: answer(f"{self.prefect}/api/health", PASSWORDS["PREFECT"]) == 200, "Prefect", 300)
        wait(lambda: answer(f"{self.mlflow}/health") == 200, "MLflow", 300)

    def start_postgres(self) -> None:
        first = not (self.database / "data").exists()
        if first:
            shutil.chown(self.database, "postgres", "postgres")
            (self.database / "password").write_text(PASSWORDS["POSTGRES"])
            shutil.chown(self.database / "password", "postgres")
            self.as_postgres("initdb", "-D", f"{self.database}/data", "-U", "drill", "-A", "scram-sha-256",
                             f"--pwfile={self.database}/password")
        self.as_postgres("pg_ctl", "-D", f"{self.database}/data", "-w", "-l", f"{self.database}/log", "-o",
                         f"-p {self.ports['postgres']} -k {self.database} -c listen_addresses=127.0.0.1", "start")
        if first:
            for name in ("prefect", "mlflow"):
                self.as_postgres("createdb", "-h", "127.0.0.1", "-p", str(self.ports["postgres"]), "-U", "drill", name)

    def stop_postgres(self) -> None:
        self.as_postgres("pg_ctl", "-D", f"{self.database}/data", "-m", "immediate", "stop")

    def as_postgres(self, program: str, *arguments: str) -> None:
        done = subprocess.run(["runuser", "-u", "postgres", "--", str(POSTGRES / program), *arguments], cwd="/",
                              env={**os.environ, "PGPASSWORD": PASSWORDS["POSTGRES"]}, stdout=subprocess.DEVNULL)
        assert done.returncode == 0, program

    def worker(self, pool: str, checkout: Path, repositories: str = "") -> "subprocess.Popen[bytes]":
        """`repositories`: those that it runs besides its checkout's origin."""
        command = [sys.executable, "-m", "infra.worker", pool, f"{pool}@drill"]
        return self._run(f"worker-{pool}", command, {"INSTRUCTFLOW_CHECKOUT": str(checkout), **(
            {"INSTRUCTFLOW_REPOSITORIES": repositories} if repositories else {})}, checkout)

    def _run(self, name: str, command: list[str], more: dict[str, str] | None = None,
             where: Path | None = None) -> "subprocess.Popen[bytes]":
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(command, env={**self.environment, **(more or {})}, stdout=log, stderr=log,
                                       start_new_session=True, cwd=where or self.folder)
        self.processes.append(process)
        return process

    def stop(self) -> None:
        for process in reversed(self.processes):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if (self.database / "data").exists():
            self.stop_postgres()
        shutil.rmtree(self.database, ignore_errors=True)


def answer(url: str, login: str = "") -> int:
    """The status with which the address answers; 0 where nobody does."""
    request = urllib.request.Request(url)
    if login:
        request.add_header("Authorization", "Basic " + b64encode(login.encode()).decode())
    try:
        with urllib.request.urlopen(request, timeout=5) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0
