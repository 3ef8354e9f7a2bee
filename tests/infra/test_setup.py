"""What people change in Prefect's pages survives `python -m infra.setup`, which a restart of the servers runs."""

import asyncio
import os
import re
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Coroutine, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import (
    DeploymentScheduleCreate,
    DeploymentUpdate,
    GlobalConcurrencyLimitUpdate,
    WorkPoolUpdate,
)
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule
from prefect.events.schemas.automations import EventTrigger

from infra.setup import as_left, schedule_words
from tests.flows.checkout import REPOSITORY

SILENT, CRASHED = (f"instructflow: take up {kind} runs again" for kind in ("silent", "crashed"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A Prefect server: its address and its home."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home = tmp_path_factory.mktemp("prefect")
    environment = {**os.environ, "PREFECT_HOME": str(home), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    prefect = str(Path(sys.executable).with_name("prefect"))
    with (home / "log").open("wb") as log:
        process = subprocess.Popen([prefect, "server", "start", "--port", str(port)], env=environment, stdout=log,
                                  stderr=log)
    found = f"http://127.0.0.1:{port}/api"
    while True:
        try:
            urllib.request.urlopen(f"{found}/health", timeout=5).close()
            break
        except OSError:
            assert process.poll() is None, (home / "log").read_text()
            time.sleep(0.2)
    yield found, home
    process.terminate()
    process.wait()


@pytest.fixture(scope="module")
def url(server: tuple[str, Path]) -> str:
    return server[0]


def set_up(url: str, *arguments: str) -> list[str]:
    """The lines that the command prints."""
    environment = {**os.environ, "PREFECT_API_URL": url, "PYTHONPATH": str(REPOSITORY)}
    environment.pop("INSTRUCTFLOW_WEBHOOK", None)
    done = subprocess.run([sys.executable, "-m", "infra.setup", *arguments], cwd=REPOSITORY, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def ask(url: str, question: Callable[[PrefectClient], Coroutine[Any, Any, Any]]) -> Any:
    async def answer() -> Any:
        async with PrefectClient(url) as client:
            return await question(client)

    return asyncio.run(answer())


async def state(client: PrefectClient) -> dict[str, Any]:
    """All that people can change."""
    found: dict[str, Any] = {}
    for item in await client.read_deployments():
        found[item.name] = (sorted(schedule_words(each.schedule, each.active) for each in item.schedules),
                            item.parameters,
                            item.global_concurrency_limit and item.global_concurrency_limit.limit,
                            item.concurrency_options and item.concurrency_options.collision_strategy.value,
                            item.work_queue_name, item.tags, item.paused)
    for automation in await client.read_automations():
        assert isinstance(automation.trigger, EventTrigger)
        found[automation.name] = (automation.enabled, automation.trigger.within)
    for limit in await client.read_global_concurrency_limits(limit=100, offset=0):
        if not limit.name.startswith("deployment:"):  # those of deployments are above
            found[limit.name] = limit.limit
    found["pools"] = {pool.name: pool.concurrency_limit for pool in await client.read_work_pools()}
    return found


async def change(client: PrefectClient) -> None:
    """As an operator does in the pages."""
    nightly = await client.read_deployment_by_name("pipeline/nightly")
    await client.update_deployment_schedule(nightly.id, nightly.schedules[0].id, active=True,
                                            schedule=CronSchedule(cron="30 3 * * *", timezone="Asia/Tokyo"))
    await client.update_deployment(nightly.id, DeploymentUpdate(parameters={"profile": "smoke"}, concurrency_limit=2,
                                                                tags=["ours"]))
    smoke = await client.read_deployment_by_name("pipeline/smoke")
    every = DeploymentScheduleCreate(schedule=IntervalSchedule(interval=timedelta(hours=6)), active=True)
    await client.create_deployment_schedules(smoke.id, [every])
    await client.update_deployment(smoke.id, DeploymentUpdate(paused=True))
    [silent] = await client.read_automations_by_name(SILENT)
    assert isinstance(silent.trigger, EventTrigger)
    silent.trigger.within = timedelta(seconds=300)
    changed = silent.model_dump(mode="json", exclude={"id", "owner_resource"})
    (await client._client.put(f"/automations/{silent.id}", json=changed)).raise_for_status()
    [crashed] = await client.read_automations_by_name(CRASHED)
    await client.pause_automation(crashed.id)
    await client.update_global_concurrency_limit("training", GlobalConcurrencyLimitUpdate(limit=3))
    await client.update_work_pool("gpu", WorkPoolUpdate(concurrency_limit=4))


def test_what_people_changed_stays_and_the_difference_is_told(url: str) -> None:
    assert len(set_up(url)) == 1  # nothing was there
    at_first = ask(url, state)
    assert at_first["nightly"][:4] == (["0 2 * * * UTC (off)"], {"profile": "cpu"}, 1, None)
    assert at_first["wake"][:4] == (["every 120 s UTC"], {}, 1, "CANCEL_NEW")
    assert len(set_up(url)) == 1
    assert ask(url, state) == at_first

    ask(url, change)
    theirs = ask(url, state)
    said = set_up(url)
    assert ask(url, state) == theirs
    assert theirs["nightly"][:3] == (["30 3 * * * Asia/Tokyo"], {"profile": "smoke"}, 2)
    assert (theirs[SILENT], theirs[CRASHED][0]) == ((True, timedelta(seconds=300)), False)
    [nightly] = [line for line in said if line.startswith("setup: nightly ")]
    assert "schedules 30 3 * * * Asia/Tokyo (prefect.yaml: 0 2 * * * UTC (off))" in nightly
    assert "concurrency limit 2 (prefect.yaml: 1)" in nightly
    assert any(re.match(r"setup: smoke .*every 21600 s UTC .prefect.yaml: none", line) for line in said)
    assert any(SILENT in line and "is changed and stays" in line for line in said)

    set_up(url, "--reset", "nightly", "smoke")
    again = ask(url, state)
    assert (again["nightly"], again["smoke"]) == (at_first["nightly"], at_first["smoke"])
    assert again["training"] == 3


def test_a_deployment_that_prefect_yaml_does_not_have(url: str) -> None:
    environment = {**os.environ, "PREFECT_API_URL": url, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-m", "infra.setup", "--reset", "nightli"], cwd=REPOSITORY, env=environment,
                          capture_output=True, text=True)
    assert (done.returncode, done.stderr.splitlines()[-1].partition(";")[0]) == (
        2, "setup: --reset nightli: no such deployment")


def test_a_new_entry_is_as_prefect_yaml_says(url: str) -> None:
    async def nightly(client: PrefectClient) -> Any:
        return await client.read_deployment_by_name("pipeline/nightly")

    set_up(url)
    kept, differences = as_left({"name": "nightly", "parameters": {"profile": "gpu"}, "entrypoint": "new.py:flow",
                                 "concurrency_limit": 1, "work_pool": {"name": "cpu"},
                                 "schedules": [{"cron": "0 2 * * *", "active": False}]}, ask(url, nightly))
    assert (kept["entrypoint"], kept["parameters"], "schedules" in kept) == ("new.py:flow", {"profile": "cpu"}, False)
    assert differences == ["parameters profile = cpu (prefect.yaml: profile = gpu)"]


def test_of_the_runs_missed_while_the_servers_were_stopped_the_last_one_is_done(server: tuple[str, Path]) -> None:
    """A night of two-minute runs, all due at once, kept the database locked for minutes."""
    url, home = server
    set_up(url)

    async def scheduled(client: PrefectClient) -> list[Any]:
        wake = await client.read_deployment_by_name("wake-rounds/wake")
        runs = await client.read_flow_runs(deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[wake.id])))
        return sorted((run.expected_start_time, run.id) for run in runs if run.auto_scheduled)

    while len(ask(url, scheduled)) < 6:  # Prefect's scheduler makes some ahead
        time.sleep(0.5)
    planned = ask(url, scheduled)
    other = planned.pop(0)[1]  # of a schedule with a parameter of its own: it is the last of its kind
    with sqlite3.connect(home / "prefect.db", timeout=60) as database:
        database.execute("UPDATE flow_run SET parameters = ? WHERE id = ?", ('{"root": "elsewhere"}', str(other)))
        for run in (other, *(run for _, run in planned[:4])):
            day_before = "strftime('%Y-%m-%d %H:%M:%f000', expected_start_time, '-1 day')"
            changed = database.execute(f"UPDATE flow_run SET expected_start_time = {day_before}, "
                                       f"next_scheduled_start_time = {day_before} WHERE id = ?", (str(run),))
            assert changed.rowcount == 1
    assert any(line.startswith("setup: 3 runs of schedules") for line in set_up(url, "--workers-stopped"))
    kept = {run for _, run in ask(url, scheduled)}
    assert [run in kept for _, run in planned[:4]] == [False, False, False, True]
    assert other in kept
    assert not any("left out" in line for line in set_up(url, "--workers-stopped"))
