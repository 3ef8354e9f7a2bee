"""What a killed server leaves behind is ended before its successor starts, and nothing else is."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from infra import orphans
from tests.flows.checkout import alive

Begin = Callable[..., tuple["subprocess.Popen[str]", int]]


def environment(supervisor: str, program: str) -> dict[str, str]:
    return {**os.environ, "SUPERVISOR_SERVER_URL": supervisor, "SUPERVISOR_PROCESS_NAME": program}


def succeed(supervisor: str, program: str) -> str:
    """What a program says that starts after the earlier one's end."""
    return subprocess.run([sys.executable, "-m", "infra.orphans", "echo", "it", "starts"], text=True, check=True,
                          stdout=subprocess.PIPE, env=environment(supervisor, program)).stdout


@pytest.fixture
def here(tmp_path: Path) -> str:
    return f"unix://{tmp_path}/supervisor.sock"


@pytest.fixture
def begin() -> Iterator[Begin]:
    """Starts a program with a child, as supervisord would; gives its process and the child's pid."""
    processes = []

    def started(supervisor: str, program: str, first: str = ":") -> tuple["subprocess.Popen[str]", int]:
        process = subprocess.Popen(["sh", "-c", f"{first}; sleep 3600 & echo $!; wait"], stdout=subprocess.PIPE,
                                   text=True, env=environment(supervisor, program), start_new_session=True)
        processes.append(process)
        assert process.stdout
        return process, int(process.stdout.readline())

    yield started
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_a_successor_ends_the_child_of_a_killed_server(begin: Begin, here: str) -> None:
    parent, child = begin(here, "mlflow")
    others = [begin(f"{here}.of-another-checkout", "mlflow"), begin(here, "worker-cpu")]
    parent.kill()
    parent.wait()
    assert alive(child)
    assert succeed(here, "mlflow") == f"orphans: ended what an earlier mlflow had left: {child}\nit starts\n"
    assert not alive(child)
    assert all(alive(process.pid) and alive(pid) for process, pid in others)


def test_where_nothing_is_left_nothing_is_said(here: str) -> None:
    assert succeed(here, "mlflow") == "it starts\n"


def test_what_ignores_term_is_killed(begin: Begin, here: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orphans, "GRACE_SECONDS", 0.5)
    parent, child = begin(here, "mlflow", "trap '' TERM")
    parent.kill()
    parent.wait()
    assert orphans.end(here, "prefect", "mlflow") == [child]
    assert not alive(child)
    assert orphans.end(here, "prefect", "mlflow") == []
