"""Servers and worker of the manifests run with a read-only root, as their user, without capabilities."""

import subprocess
from collections.abc import Iterator

import pytest

from tests.flows.checkout import REPOSITORY
from tests.infra.sandbox import SECRETS, Machine, possible, postgres_command
from tests.infra.site import wait
from tests.infra.stores import MISSING

pytestmark = [pytest.mark.drill,
              pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}: `make scan` installs weed"),
              pytest.mark.skipif(not possible(), reason="needs root and namespaces")]


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    made = Machine(tmp_path_factory.mktemp("sandbox"))
    try:
        made.start("postgres", command=postgres_command())
        made.start("s3")
        wait(lambda: answers(made, "8333/status"), "the object store", 120)
        wait(lambda: "ready to accept connections" in made.log("postgres"), "PostgreSQL", 120)
        for name in ("prefect", "mlflow"):
            made.ask("env", f"PGPASSWORD={SECRETS['POSTGRES_PASSWORD']}", "createdb", "-h", "127.0.0.1", "-U",
                     "instructflow", name)
        assert made.start("mlflow", "bucket").wait(60) == 0, made.log("mlflow", "bucket")
        made.start("prefect")
        made.start("mlflow")
        yield made
    finally:
        made.stop()


def answers(machine: Machine, where: str, *more: str) -> bool:
    return machine.ask("curl", "-fsS", "-o", "/dev/null", *more, f"http://127.0.0.1:{where}").returncode == 0


def test_prefect_serves_its_api_and_its_pages(machine: Machine) -> None:
    wait(lambda: answers(machine, "4200/api/health"), "Prefect", 300)
    assert not answers(machine, "4200/api/admin/version"), "it asks for the password"
    assert answers(machine, "4200/api/admin/version", "-u", SECRETS["PREFECT_AUTH"])
    assert machine.ask("curl", "-fsS", "http://127.0.0.1:4200/").stdout.lower().count("<html"), machine.log("prefect")
    assert "Read-only file system" not in machine.log("prefect")
    assert "Permission denied" not in machine.log("prefect")


def test_browsers_of_other_pages_may_not_call_prefect(machine: Machine) -> None:
    wait(lambda: answers(machine, "4200/api/health"), "Prefect", 300)
    for origin, allowed in (("http://evil.example", False), ("http://127.0.0.1:4200", True)):
        said = machine.ask("curl", "-si", "-u", SECRETS["PREFECT_AUTH"], "-H", f"Origin: {origin}",
                           "http://127.0.0.1:4200/api/admin/version").stdout.lower()
        assert ("access-control-allow-origin" in said) is allowed, said


def test_mlflow_serves_and_keeps_artifacts(machine: Machine) -> None:
    wait(lambda: answers(machine, "5000/health"), "MLflow", 300)
    login = f"admin:{SECRETS['MLFLOW_PASSWORD']}"
    path = "5000/api/2.0/mlflow-artifacts/artifacts/a.txt"
    assert not answers(machine, path, "-T", "/etc/hostname"), "it asks for the password"
    assert answers(machine, path, "-u", login, "-T", "/etc/hostname"), machine.log("mlflow")
    strange = machine.ask("curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "-u", login, "-H",
                          "Host: evil.example", "http://127.0.0.1:5000/api/2.0/mlflow/experiments/search?max_results=1")
    assert strange.stdout == "403"
    assert "Read-only file system" not in machine.log("mlflow")


def test_a_worker_clones_sets_up_and_comes_online(machine: Machine) -> None:
    wait(lambda: answers(machine, "4200/api/health"), "Prefect", 300)
    machine.start("worker")

    def online() -> bool:
        found = machine.ask("curl", "-fsS", "-u", SECRETS["PREFECT_AUTH"], "-H", "Content-Type: application/json",
                            "-d", "{}", "http://127.0.0.1:4200/api/work_pools/cpu/workers/filter")
        return '"status":"ONLINE"' in found.stdout.replace(" ", "")

    wait(online, "the worker", 300)
    assert (machine.folder / "volumes" / "worker" / "work" / ".git").is_dir()
    assert "Read-only file system" not in machine.log("worker")


@pytest.mark.parametrize("place", ["/usr/local/x", "/etc/x", "/var/tmp/x", "/srv/x", str(REPOSITORY / "x")])
def test_a_container_can_write_nowhere_else(machine: Machine, place: str) -> None:
    tried = machine.start("mlflow", "bucket", ["sh", "-c", f"touch /tmp/x /home/instructflow/x && touch {place}"])
    assert tried.wait(30) != 0
    assert f"cannot touch '{place}': Read-only file system" in machine.log("mlflow", "bucket")


def test_a_container_has_no_capabilities(machine: Machine) -> None:
    asked = "id -u; grep -E 'CapEff|CapBnd|NoNewPrivs' /proc/self/status"
    machine.start("mlflow", "bucket", ["sh", "-c", asked]).wait(30)
    said = machine.log("mlflow", "bucket").split()
    assert "10001" in said
    assert said[said.index("NoNewPrivs:") + 1] == "1"
    assert int(said[said.index("CapBnd:") + 1], 16) == 1 << 2  # only reading: the sandbox's docstring


def test_what_was_started_ends(machine: Machine) -> None:
    """Last: nothing of a container outlives the sandbox."""
    pid = machine.running[-1].pid
    machine.stop()
    assert subprocess.run(["pgrep", "-g", str(pid)], capture_output=True).returncode != 0
