"""Two checkouts as two machines, with PostgreSQL, an S3 server and passwords on everything. `make drills`."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from tests.flows.checkout import Checkout
from tests.infra.site import PACKAGES, STAGE, STAGES, link_code, wait
from tests.infra.stores import BIN, MISSING, PASSWORDS, Stores, answer

pytestmark = [pytest.mark.drill, pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")]
DEPLOYMENTS = """name: drills
pull:
  - prefect.deployments.steps.set_working_directory: {directory: "{{ $INSTRUCTFLOW_CHECKOUT }}"}
deployments:
  - {name: run, entrypoint: "flows/pipeline.py:pipeline", work_pool: {name: cpu}}
  - {name: gpu, entrypoint: "flows/remote.py:remote_stage", work_pool: {name: gpu}}
"""


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stores]:
    made = Stores(tmp_path_factory.mktemp("stores"))
    link_code(made.folder)
    try:
        made.start()
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="module")
def machines(stores: Stores, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """The controller's checkout, with workers for it and for another folder."""
    here = Checkout(tmp_path_factory.mktemp("controller"))
    subprocess.run(["git", "init", "-q", "--bare", str(stores.folder / "git")], check=True)
    here.write("dvc.yaml", STAGES)
    here.write("stage.sh", STAGE)
    here.write("content", "the work")
    here.write("prefect.yaml", DEPLOYMENTS)
    here.write(".dvc/config", "[core]\n    analytics = false\n    remote = store\n['remote \"store\"']\n    url = s3://dvc/x\n"
               f"    endpointurl = {stores.s3}\n")
    here.write("models/.gitignore", "/sft\n/ppo\n")
    here.git()
    for command in (["add", "-f", "models/.gitignore"],
                    ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "b"],
                    ["remote", "add", "origin", str(stores.folder / "git")]):
        subprocess.run(["git", *command], cwd=here.root, check=True)
    link_code(here.root)
    (here.root / ".git" / "info" / "exclude").write_text("".join(f"/{name}\n" for name in PACKAGES) + "*.pid\n")
    done = subprocess.run([sys.executable, "-m", "infra.setup"], cwd=here.root, env=stores.environment, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    there = tmp_path_factory.mktemp("gpu-machine")
    link_code(there)
    stores.worker("cpu", here.root)
    stores.worker("gpu", there, str(stores.folder / "git"))
    here.write("go", "")  # the stages need not wait
    return here


def ask(stores: Stores, question: Any) -> Any:
    async def answered() -> Any:
        async with get_client() as client:
            return await question(client)

    with temporary_settings({PREFECT_API_URL: f"{stores.prefect}/api",
                             PREFECT_API_AUTH_STRING: PASSWORDS["PREFECT"]}):
        return asyncio.run(answered())


def begin(stores: Stores, **parameters: Any) -> Any:
    async def create(client: Any) -> Any:
        deployment = await client.read_deployment_by_name("pipeline/run")
        return (await client.create_flow_run_from_deployment(deployment.id, parameters=parameters)).id

    return ask(stores, create)


def ends(stores: Stores, run: Any, seconds: float = 300) -> tuple[str, str]:
    def state() -> Any:
        latest = ask(stores, lambda client: client.read_flow_run(run)).state
        return latest if latest and latest.is_final() else None

    wait(state, "the run's end", seconds)
    final = state()
    return final.name, final.message or ""


@pytest.mark.parametrize("login", ["", "ada:wrong"])
def test_wrong_passwords_are_refused(stores: Stores, login: str) -> None:
    assert answer(f"{stores.prefect}/api/flows/count", login) in (401, 403, 405)
    assert answer(f"{stores.prefect}/api/admin/version", login) == 401
    assert answer(f"{stores.mlflow}/api/2.0/mlflow/experiments/search?max_results=1", login) == 401
    assert answer(f"{stores.s3}/dvc?list-type=2", login) == 403
    wrong = {**stores.environment, "AWS_SECRET_ACCESS_KEY": "wrong"}
    done = subprocess.run([sys.executable, "-m", "infra.bucket", "more"], env=wrong, capture_output=True, text=True,
                          cwd=stores.folder)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    import psycopg

    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(host="127.0.0.1", port=stores.ports["postgres"], user="drill", password="wrong",
                         dbname="prefect")


def test_right_passwords_are_not(stores: Stores) -> None:
    assert answer(f"{stores.prefect}/api/admin/version", PASSWORDS["PREFECT"]) == 200
    assert answer(f"{stores.mlflow}/api/2.0/mlflow/experiments/search?max_results=1",
                  f"admin:{PASSWORDS['MLFLOW']}") == 200


def test_training_on_the_other_machine(machines: Checkout, stores: Stores) -> None:
    gate = stores.folder / "open"  # files that git does not track stay here: the stage there waits for this one
    gate.write_text("")
    machines.write("stage.sh", STAGE.replace("$top/go", str(gate)))
    run = begin(stores, gpu_workers=True)
    assert ends(stores, run) == ("Completed", ends(stores, run)[1])
    for stage in ("sft", "ppo"):
        assert (machines.root / "models" / stage).read_text() == f"{stage} the work\n"
    assert machines.order() == []  # nothing ran here
    environment = {**stores.environment, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["dvc", "repro"], cwd=machines.root, env=environment, capture_output=True, text=True)
    assert done.stdout.count("didn't change, skipping") >= 2, done.stdout + done.stderr
    assert machines.order() == []


def test_postgres_restarted_in_the_middle(machines: Checkout, stores: Stores) -> None:
    (machines.root / "go").unlink()
    machines.write("stage.sh", "# postgres\n" + STAGE)
    run = begin(stores)
    pid = machines.root / "sft.pid"
    wait(pid.exists, "sft to begin")
    stores.stop_postgres()
    stores.start_postgres()
    machines.write("go", "")
    assert ends(stores, run)[0] == "Completed"
    assert machines.order() == ["sft", "began", "sft", "ended", "ppo", "began", "ppo", "ended"]


def test_s3_away_while_outputs_are_pushed(machines: Checkout, stores: Stores) -> None:
    (machines.root / "go").unlink(missing_ok=True)
    gate, begun = stores.folder / "gate", stores.folder / "begun"
    machines.write("stage.sh", f"touch {begun}\n" + STAGE.replace("$top/go", str(gate)))
    run = begin(stores, gpu_workers=True)
    wait(begun.exists, "sft to begin on the other machine")
    stores.stop_s3()
    gate.write_text("")
    time.sleep(20)  # the push fails and is tried again
    stores.start_s3()
    assert ends(stores, run, 900)[0] == "Completed"
    assert (machines.root / "models" / "ppo").read_text() == "ppo the work\n"
