"""What a Prefect server must have for the pipeline: pools, queues, the training limit, automations, deployments.

    python -m infra.setup                    the server at PREFECT_API_URL; `make ui` calls it

Run again, it renews automations and deployments and leaves limits, pools and schedules that somebody has changed.
INSTRUCTFLOW_WEBHOOK is where failure notices are posted as JSON; without it none are.
"""

import argparse
import asyncio
import hashlib
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import flows.environment  # noqa: F401

# isort: split
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate, GlobalConcurrencyLimitUpdate, WorkPoolCreate
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState, SendNotification
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.settings import PREFECT_API_URL
from prefect.states import Cancelled, Scheduled, State
from prefect.workers.process import ProcessWorker

from flows.remote import origin
from flows.stages import TRAINING_LIMIT
from mlops.tracking.credentials import without_login
from rlhf.errors import UserError, without_secrets

POOLS: dict[str, int | None] = {"cpu": None, "gpu": 1}  # flow runs at once
QUEUES = {"urgent": 1, "default": 2, "background": 3}  # priority: 1 goes first
TRAININGS = 1  # at once, over all pools
HEARTBEAT_SECONDS = 30  # the least that Prefect allows; the workers' environment sets it
SILENT_SECONDS = 90
RESTARTS = 3
# Where the server keeps who holds a slot. Prefect's default, its memory, forgets it at a restart: the slot is lost.
LEASES = "prefect.server.concurrency.lease_storage.filesystem"
BLOCK = "instructflow-notices"
BAD_ENDS = ("Failed", "Crashed", "TimedOut", "Not promoted", "Late")
NOTIFIED = (*BAD_ENDS, "Suspended")  # a suspended run waits for people's labels


async def set_up(client: PrefectClient) -> None:
    await _pools(client)
    try:
        await client.read_global_concurrency_limit_by_name(TRAINING_LIMIT)
    except ObjectNotFound:
        await client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=TRAINING_LIMIT, limit=TRAININGS))
    wanted = [revive_silent(), revive_crashed()]
    if url := os.environ.get("INSTRUCTFLOW_WEBHOOK"):
        wanted.append(notices(await _webhook(url)))
    for automation in wanted:
        # One that is as it should be stays: with it would go what it knows of the runs in progress.
        text = automation.model_dump_json(exclude={"owner_resource"})
        automation.description = f"infra/setup.py {hashlib.sha256(text.encode()).hexdigest()[:12]}"
        known = await client.read_automations_by_name(automation.name)
        for earlier in known:
            if earlier.description != automation.description:
                await client.delete_automation(earlier.id)
        if not any(earlier.description == automation.description for earlier in known):
            await client.create_automation(automation)


async def take_up(client: PrefectClient) -> list[str]:
    """For a server whose workers have all stopped: schedules again what still counts as running. Returns the names."""
    alive = FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.PENDING, StateType.CANCELLING])
    stopped = await client.read_flow_runs(flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=alive)),
                                          work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=list(POOLS))))
    for run in stopped:
        cancelled = run.state_type == StateType.CANCELLING
        state: State[Any] = Cancelled(message="its process ended with the servers") if cancelled else \
            Scheduled(name="Taken up again", message="the servers were stopped while it ran")
        await client.set_flow_run_state(run.id, state, force=True)
    for limit in await client.read_global_concurrency_limits(limit=200, offset=0):
        if limit.active_slots:
            await client.update_global_concurrency_limit(limit.name, GlobalConcurrencyLimitUpdate(active_slots=0))
    return [run.name for run in stopped if run.state_type != StateType.CANCELLING]


async def _pools(client: PrefectClient) -> None:
    for name, limit in POOLS.items():
        pool = WorkPoolCreate(name=name, type="process", concurrency_limit=limit,
                              base_job_template=ProcessWorker.get_default_base_job_template())
        try:
            await client.create_work_pool(pool)
        except ObjectAlreadyExists:
            continue
        for queue, priority in QUEUES.items():
            if queue == "default":
                existing = await client.read_work_queue_by_name(queue, work_pool_name=name)
                await client.update_work_queue(existing.id, priority=priority)
            else:
                await client.create_work_queue(queue, work_pool_name=name, priority=priority)


async def _webhook(url: str) -> UUID:
    block = CustomWebhookNotificationBlock(name=BLOCK, url=url, headers=None, cookies=None,
                                           json_data={"subject": "{{subject}}", "text": "{{body}}"})
    return await block.save(BLOCK, overwrite=True)


def _flow_runs(**labels: list[str]) -> ResourceSpecification:
    return ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"], **labels})


def _again(message: str) -> ChangeFlowRunState:
    return ChangeFlowRunState(state=StateType.SCHEDULED, name="Taken up again", message=message, force=False)


def revive_silent() -> AutomationCore:
    """A run whose process died with its machine says nothing more: it is scheduled again, and goes on from its
    checkpoints."""
    ends = {f"prefect.flow-run.{state}" for state in ("Completed", "Cancelled", "Suspended", *BAD_ENDS,
                                                     "Taken up again")}
    return AutomationCore(
        name="instructflow: take up silent runs again",
        trigger=EventTrigger(after={"prefect.flow-run.heartbeat"}, expect={"prefect.flow-run.heartbeat", *ends},
                             match=_flow_runs(), for_each={"prefect.resource.id"}, posture=Posture.Proactive,
                             threshold=1, within=timedelta(seconds=SILENT_SECONDS)),
        actions=[_again(f"no sign of life for {SILENT_SECONDS} s")])


def revive_crashed() -> AutomationCore:
    """A crash is no verdict on the work: the run is scheduled again, `RESTARTS` times at most."""
    counts = [str(count) for count in range(1, RESTARTS + 1)]  # 0: it never began; it would crash again
    return AutomationCore(
        name="instructflow: take up crashed runs again",
        trigger=EventTrigger(expect={"prefect.flow-run.Crashed"}, match=_flow_runs(**{"prefect.run-count": counts}),
                             for_each={"prefect.resource.id"}, posture=Posture.Reactive, threshold=1),
        actions=[_again("its process ended unexpectedly")])


def notices(block: UUID) -> AutomationCore:
    return AutomationCore(
        name="instructflow: notices",
        trigger=EventTrigger(expect={f"prefect.flow-run.{state}" for state in NOTIFIED}, match=_flow_runs(),
                             for_each={"prefect.resource.id"}, posture=Posture.Reactive, threshold=1),
        actions=[SendNotification(
            block_document_id=block, subject="{{ flow.name }} / {{ flow_run.name }}: {{ flow_run.state.name }}",
            body="{{ flow_run.state.message }}\n{{ flow_run|ui_url }}")])


def deploy(root: Path) -> None:
    """Registers what prefect.yaml describes. Raises UserError with what Prefect says."""
    prefect = Path(sys.executable).with_name("prefect")
    environment = {**os.environ, **_git_remote(root), "PREFECT_API_URL": str(PREFECT_API_URL.value())}
    done = subprocess.run([str(prefect), "--no-prompt", "deploy", "--all"], cwd=root, capture_output=True, text=True,
                          env=environment)
    if done.returncode:
        raise UserError(f"prefect deploy: {(done.stderr or done.stdout).strip().splitlines()[-1]}")


def _git_remote(root: Path) -> dict[str, str]:
    """Settings by which git names its remote without a login: Prefect asks for it and sends it with each deployment."""
    try:
        url = origin(root)
    except UserError:
        return {}  # no remote, or no repository
    return {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "remote.origin.url", "GIT_CONFIG_VALUE_0": without_login(url)}


async def _set_up(workers_stopped: bool) -> None:
    async with get_client() as client:
        await set_up(client)
        if workers_stopped:
            for name in await take_up(client):
                print(f"setup: {name} goes on from its checkpoint")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m infra.setup", description="Sets up a Prefect server.")
    parser.add_argument("--workers-stopped", action="store_true", help="take up again what counts as running")
    options = parser.parse_args()
    url = without_secrets(PREFECT_API_URL.value() or "")
    if not url:
        print("setup: set PREFECT_API_URL to the server's address, or use `make ui`", file=sys.stderr)
        raise SystemExit(2)
    try:
        asyncio.run(_set_up(options.workers_stopped))
        deploy(Path.cwd())
    except UserError as error:
        print(f"setup: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except Exception as error:
        if "connect" not in str(error).lower():
            raise
        print(f"setup: no Prefect server answers at {url}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"setup: {url} has pools, limits, automations and deployments")


if __name__ == "__main__":
    main()
