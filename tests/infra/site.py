"""A checkout of shell stages with servers and a worker of its own: where the failure drills take place."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings
from prefect.states import Cancelling

from infra.servers import Links, Servers
from tests.flows.checkout import REPOSITORY, Checkout

PACKAGES = ("flows", "infra", "tasks", "mlops", "rlhf")
DEPLOYMENTS = """name: drills
pull:
  - prefect.deployments.steps.set_working_directory: {directory: "{{ $INSTRUCTFLOW_CHECKOUT }}"}
deployments:
  - name: run
    entrypoint: flows/pipeline.py:pipeline
    work_pool: {name: cpu}
"""
# Each stage says that it began, waits to be let go, and writes its output.
STAGES = """stages:
  sft:
    cmd: setpriv --pdeathsig TERM -- sh stage.sh sft
    deps: [stage.sh]
    outs: [models/sft]
  ppo:
    cmd: setpriv --pdeathsig TERM -- sh stage.sh ppo
    deps: [stage.sh, models/sft]
    outs: [models/ppo]
"""
STAGE = """top=$(pwd -P); top=${top%%/scratch/workspaces/*}
mkdir -p models
echo "$1 began" >> order.log
echo $$ > $1.pid
[ -e fail ] && { echo "$1: no luck"; exit 2; }
while [ ! -e $top/go ]; do sleep 0.2; done
echo "$1 $(cat $top/content)" > models/$1
echo "$1 ended" >> order.log
"""


def link_code(root: Path) -> None:
    """This repository's packages, for a checkout that has none of its own."""
    for name in PACKAGES:
        (root / name).symlink_to(REPOSITORY / name)


class Receiver:
    """A local address that failure notices are posted to."""

    def __init__(self) -> None:
        self.got: list[dict[str, Any]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.got.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/"


class Site(Checkout):
    """`begin()` starts a flow run by its deployment, `state()` asks the server, `let_go()` lets the stages end."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.write("dvc.yaml", STAGES)
        self.write("stage.sh", STAGE)
        self.write("prefect.yaml", DEPLOYMENTS)
        link_code(root)
        self.git()
        self.notices = Receiver()
        self.servers = Servers(root)
        self.environment = {**os.environ, "PREFECT_HOME": str(root / "prefect-home"), "INSTRUCTFLOW_UPLOADER": "off",
                            "INSTRUCTFLOW_WEBHOOK": self.notices.url, "PREFECT_API_URL": "",
                            "INSTRUCTFLOW_PREFECT_PORT": "4700", "INSTRUCTFLOW_MLFLOW_PORT": "5700"}
        del self.environment["PREFECT_API_URL"]

    def reset(self, content: str) -> None:
        """Other work for the stages, none of it done; nothing left of an earlier drill."""
        for name in ("go", "fail", "order.log", "sft.pid", "ppo.pid"):
            (self.root / name).unlink(missing_ok=True)
        self.write("content", content)
        self.write("stage.sh", f"# {content}\n{STAGE}")

    def control(self, command: str, *options: str) -> str:
        done = subprocess.run([sys.executable, "-m", "infra.servers", command, *options], cwd=self.root, text=True,
                              env=self.environment, capture_output=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @property
    def links(self) -> Links:
        return self.servers.links()

    def ask(self, question: Callable[[Any], Any]) -> Any:
        """What `await question(client)` returns."""
        async def answered() -> Any:
            async with get_client() as client:
                return await question(client)

        with temporary_settings({PREFECT_API_URL: f"{self.links.prefect}/api",
                                 PREFECT_API_AUTH_STRING: self.servers.login()}):
            return asyncio.run(answered())

    def begin(self, **parameters: Any) -> UUID:
        async def create(client: Any) -> UUID:
            deployment = await client.read_deployment_by_name("pipeline/run")
            run = await client.create_flow_run_from_deployment(deployment.id, parameters=parameters)
            return UUID(str(run.id))

        return UUID(str(self.ask(create)))

    def run_of(self, run: UUID) -> FlowRun:
        read: FlowRun = self.ask(lambda client: client.read_flow_run(run))
        return read

    def tasks_of(self, run: UUID) -> list[tuple[str, str]]:
        """(stage, state) of every task run."""
        tasks = self.ask(lambda client: client.read_task_runs())
        return [(item.name, item.state_name) for item in tasks if item.flow_run_id == run]

    def cancel(self, run: UUID) -> None:
        self.ask(lambda client: client.set_flow_run_state(run, Cancelling()))

    def finish(self) -> None:
        """Ends what a drill that failed has left running."""
        self.let_go()
        def begun() -> list[Any]:  # a schedule's runs of the future are none of ours
            return [run for run in self.ask(lambda client: client.read_flow_runs())
                    if not run.state.is_final() and not (run.auto_scheduled and run.state.is_scheduled())]

        with suppress(AssertionError):  # between two states of a run nobody hears that it is cancelled
            wait(lambda: not begun(), "an end by itself", 120)
        for run in begun():
            self.cancel(run.id)
        wait(lambda: not begun(), lambda: f"the end of {[(run.name, run.state_name) for run in begun()]}", 1200)

    def let_go(self) -> None:
        self.write("go", "")

    def pid(self, stage: str, where: str = ".") -> int:
        """The process of the running stage."""
        path = self.root / where / f"{stage}.pid"
        wait(lambda: path.exists() and path.read_text().strip(), f"{stage} to begin")
        return int(path.read_text())

    def ends(self, run: UUID, name: str, seconds: float = 900) -> FlowRun:
        """Waits for the run's end and returns it."""
        def state() -> str | None:
            return self.run_of(run).state_name

        wait(lambda: state() == name, lambda: f"{name}, it is {state()}", seconds)
        return self.run_of(run)

    def service(self, name: str) -> int:
        """The pid of a supervised program; 0 while it has none."""
        running = re.search(rf"\b{name}\s+RUNNING\s+pid (\d+)", self.control("status"))
        return int(running[1]) if running else 0

    def group(self, pid: int) -> list[int]:
        """The processes of a supervised program, its first one first: supervisord gives each a group of its own."""
        pids = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                if int(path.read_text().rpartition(")")[2].split()[2]) == pid:
                    pids.append(int(path.parent.name))
            except OSError:
                continue  # ended meanwhile
        return sorted(pids, key=lambda member: member != pid)

    def order(self) -> list[str]:
        log = self.root / "order.log"
        return log.read_text().splitlines() if log.exists() else []


def engine_of(run: UUID | str) -> int:
    """The process that executes a flow run: the first of those that have the run's id in their environment, but for
    the uploader, which outlives the run."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if (str(run).encode() in (path / "environ").read_bytes()
                    and b"mlops.tracking.uploader" not in (path / "cmdline").read_bytes()):
                parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # ended meanwhile, or not ours to read
    return next(pid for pid, parent in parents.items() if parent not in parents)


def wait(condition: Callable[[], Any], what: str | Callable[[], str], seconds: float = 900) -> None:
    """Returns when the condition holds. The limit only ends a test that hangs: it is long enough for a busy machine."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if condition():
                return
        except (OSError, ConnectionError):
            pass
        except Exception as error:  # the server is down in some drills
            if "onnect" not in str(error) and "onnect" not in type(error).__name__:
                raise
        time.sleep(0.3)
    raise AssertionError(f"waited {seconds:.0f} s for {what if isinstance(what, str) else what()}")


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
