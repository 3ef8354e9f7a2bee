"""The command line where no Prefect server is named: it starts one, records the run there and ends it."""

import asyncio
import contextlib
import os
import signal
import sqlite3
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from prefect import flow, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
from prefect.client.schemas.schedules import CronSchedule
from prefect.server.services.scheduler import schedule_deployments

from flows.gate import basic
from flows.server import prefect_app
from tests.flows.checkout import Checkout, alive


def servers_of(checkout: Checkout) -> list[int]:
    """The living servers on the checkout's own database."""
    home = f"PREFECT_HOME={checkout.root / 'prefect'}".encode()
    pids = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if b"flows.server" in (process / "cmdline").read_bytes() and home in (process / "environ").read_bytes():
                pids.append(int(process.name))
        except OSError:
            continue  # ended meanwhile, or another user's
    return pids


def recorded(checkout: Checkout) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(name, state) of the flow runs and of their task runs."""
    with sqlite3.connect(checkout.root / "prefect" / "prefect.db") as database:
        return (database.execute("select state_name, state_type from flow_run").fetchall(),
                database.execute("select name, state_type from task_run order by start_time").fetchall())


def test_a_run_without_a_server_is_recorded_all_the_same(checkout: Checkout) -> None:
    process = checkout.start_command_line(server=False)
    out, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert "then http://127.0.0.1:4200/runs" in out  # not its own address, which is gone
    assert recorded(checkout) == ([("Completed", "COMPLETED")], [("sft", "COMPLETED"), ("ppo", "COMPLETED")])
    assert servers_of(checkout) == []
    assert checkout.order() == ["sft", "ppo"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_ctrl_c_and_kill_end_the_server_too(checkout: Checkout, number: signal.Signals) -> None:
    pid = checkout.root / "sft.pid"
    checkout.write("sft.sh", f"echo $$ > {pid.name}; sleep 3600\n")
    process = checkout.start_command_line(server=False)
    while not (pid.exists() and pid.read_text()):
        time.sleep(0.1)
        assert process.poll() is None
    assert len(servers_of(checkout)) == 1
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    _, errors = process.communicate(timeout=600)  # the pipes close with the last process, the server included
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert errors.splitlines()[-1] == "stopped; the same command goes on from the last checkpoint"
    assert "Traceback" not in errors
    assert servers_of(checkout) == []
    assert not alive(int(pid.read_text()))
    assert recorded(checkout)[0][0][1] != "RUNNING"


def asked(url: str, **headers: str) -> int:
    """The status with which the address answers."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_the_server_answers_the_flow_alone(checkout: Checkout) -> None:
    told = checkout.root / "told"
    checkout.write("sft.sh", "echo $PREFECT_API_URL $PREFECT_API_AUTH_STRING > new; mv new told; sleep 3600\n")
    process = checkout.start_command_line(server=False)
    while not told.exists():
        time.sleep(0.1)
        assert process.poll() is None
    url, login = told.read_text().split()
    host, ours = url.split("/")[2], basic(login)
    try:
        assert asked(f"{url}/admin/version", Authorization=ours) == 200
        assert asked(f"{url}/admin/version") == asked(f"{url}/flows/") == 401
        assert asked(f"{url}/admin/version", Authorization=basic("flow:wrong")) == 401
        assert asked(f"{url}/admin/version", Authorization=ours, Host=f"evil.example:{host.split(':')[1]}") == 400
        assert asked(f"{url}/admin/version", Authorization=ours, Origin="http://127.0.0.1:9999") == 403
        assert asked(f"{url}/health", Host="evil.example") == 400
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                assert login.split(":")[1].encode() not in path.read_bytes()
    finally:
        os.killpg(process.pid, signal.SIGINT)
        out, errors = process.communicate(timeout=600)
    assert login.split(":")[1] not in out + errors


def test_a_server_that_cannot_start_is_said(checkout: Checkout) -> None:
    checkout.write("prefect", "a file where its folder should be")
    process = checkout.start_command_line(server=False)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 1
    assert errors.splitlines()[-1].startswith("Prefect's server did not start: ")  # why: the server's own lines above
    assert checkout.order() == []


def test_a_schedule_makes_runs() -> None:
    """Prefect's scheduler works with the libraries that are installed: it fails in silence, only its log says so."""
    @flow
    def nothing() -> None: ...

    async def scheduled() -> list[str]:
        async with get_client() as client:
            every_night = DeploymentScheduleCreate(schedule=CronSchedule(cron="0 3 * * *"), active=True)
            made = await client.create_deployment(await client.create_flow(nothing), "nightly", schedules=[every_night])
            await schedule_deployments()
            runs = await client.read_flow_runs(
                deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[made])))
            for run in runs:  # the other tests ask for the newest run
                await client.delete_flow_run(run.id)
            await client.delete_deployment(made)
            return [str(run.state_name) for run in runs]

    states = asyncio.run(scheduled())
    assert len(states) >= 3
    assert set(states) == {"Scheduled"}


def test_a_transaction_of_the_server_waits_for_another_to_end(tmp_path: Path) -> None:
    """Of two that read first and then write, SQLite refuses one where both began without the write lock."""
    from prefect.server.database import provide_database_interface
    from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL, temporary_settings
    from sqlalchemy import text

    prefect_app(ephemeral=True)

    async def count_up(both_began: asyncio.Barrier) -> None:
        database = provide_database_interface()
        await both_began.wait()
        async with database.session_context(begin_transaction=True) as session:
            count = (await session.execute(text("select n from counts"))).scalar_one()
            await asyncio.sleep(0.2)  # the other reads meanwhile, where it may
            await session.execute(text(f"update counts set n = {count + 1}"))

    async def both() -> int:
        database = provide_database_interface()
        async with database.session_context(begin_transaction=True) as session:
            await session.execute(text("create table counts (n integer)"))
            await session.execute(text("insert into counts values (0)"))
        barrier = asyncio.Barrier(2)
        await asyncio.gather(count_up(barrier), count_up(barrier))
        async with database.session_context() as session:
            return int((await session.execute(text("select n from counts"))).scalar_one())

    with temporary_settings({PREFECT_API_DATABASE_CONNECTION_URL: f"sqlite+aiosqlite:///{tmp_path}/prefect.db"}):
        assert asyncio.run(both()) == 2
