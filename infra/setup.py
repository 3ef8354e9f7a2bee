"""What a Prefect server must have for the pipeline: pools, queues, the training limit, automations, deployments.

    python -m infra.setup                    the server at PREFECT_API_URL; `make ui` calls it
    python -m infra.setup --reset nightly    sets this deployment back to what prefect.yaml says

Run again, it adds what is new and renews the code's side of deployments and automations. What people have changed in
Prefect's pages stays as they left it, and one line tells the difference to prefect.yaml.
INSTRUCTFLOW_WEBHOOK is where failure notices are posted as JSON; without it none are.
"""

import argparse
import asyncio
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import UUID

import flows.environment  # noqa: F401

# isort: split
import yaml
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate, GlobalConcurrencyLimitUpdate, WorkPoolCreate
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterName,
    FlowRunFilter,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.sorting import FlowRunSort
from prefect.events.actions import ChangeFlowRunState, SendNotification
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.settings import PREFECT_API_URL
from prefect.states import Cancelled, Scheduled, State
from prefect.workers.process import ProcessWorker

from flows.execution import TAKEN_UP
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
        await _automation(client, automation)


async def _automation(client: PrefectClient, wanted: AutomationCore) -> None:
    """Creates it, or renews an earlier version of ours. One that is as it should be stays, for with it would go what it
    knows of the runs in progress; one that somebody has changed stays as it is; one that is switched off stays off."""
    wanted.description = _version_of(wanted)
    known = await client.read_automations_by_name(wanted.name)
    for earlier in known:
        does = _version_of(AutomationCore(**earlier.model_dump(exclude={"id", "enabled", "description"})))
        if earlier.description != does:
            print(f"setup: automation {wanted.name!r} is changed and stays; delete it there to get ours")
            return
        if does == wanted.description:
            return
    for earlier in known:
        await client.delete_automation(earlier.id)
    created = await client.create_automation(wanted)
    if any(not earlier.enabled for earlier in known):
        await client.pause_automation(created)


def _version_of(automation: AutomationCore) -> str:
    """What its description says: a hash of what it does."""
    def ordered(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: ordered(item) for key, item in sorted(value.items()) if key != "id"}
        return sorted(map(ordered, value), key=str) if isinstance(value, list) else value  # of sets, among others

    does = automation.model_dump(mode="json", include={"name", "trigger", "actions", "actions_on_trigger",
                                                       "actions_on_resolve"})
    return f"infra/setup.py {hashlib.sha256(json.dumps(ordered(does)).encode()).hexdigest()[:12]}"


async def take_up(client: PrefectClient) -> list[str]:
    """For a server whose workers have all stopped: schedules again what still counts as running. Returns the names."""
    alive = FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.PENDING, StateType.CANCELLING])
    stopped = await client.read_flow_runs(flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=alive)),
                                          work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=list(POOLS))))
    for run in stopped:
        cancelled = run.state_type == StateType.CANCELLING
        state: State[Any] = Cancelled(message="its process ended with the servers") if cancelled else \
            Scheduled(name=TAKEN_UP, message="the servers were stopped while it ran")
        await client.set_flow_run_state(run.id, state, force=True)
    for limit in await client.read_global_concurrency_limits(limit=200, offset=0):
        if limit.active_slots:
            await client.update_global_concurrency_limit(limit.name, GlobalConcurrencyLimitUpdate(active_slots=0))
    return [run.name for run in stopped if run.state_type != StateType.CANCELLING]


async def forget_missed(client: PrefectClient) -> int:
    """Of the runs of a schedule that were due while the servers were stopped, the last one is done now and the others
    never: a schedule of every two minutes had dozens, which kept Prefect's database locked for minutes. Returns how
    many were deleted."""
    now: Any = datetime.now(UTC)  # Prefect's type of it is an alias
    due = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED])),
                        expected_start_time=FlowRunFilterExpectedStartTime(before_=now))
    missed: dict[tuple[UUID, str], list[FlowRun]] = {}  # a schedule may have parameters of its own
    for run in await client.read_flow_runs(flow_run_filter=due, sort=FlowRunSort.EXPECTED_START_TIME_DESC):
        if run.auto_scheduled and run.deployment_id and run.run_count == 0:
            parameters = json.dumps(run.parameters, sort_keys=True, default=str)
            missed.setdefault((run.deployment_id, parameters), []).append(run)
    earlier = [run.id for runs in missed.values() for run in runs[1:]]
    for run_id in earlier:
        await client.delete_flow_run(run_id)
    return len(earlier)


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
    return ChangeFlowRunState(state=StateType.SCHEDULED, name=TAKEN_UP, message=message, force=False)


def revive_silent() -> AutomationCore:
    """A run whose process died with its machine says nothing more: it is scheduled again, and goes on from its
    checkpoints."""
    ends = {f"prefect.flow-run.{state}" for state in ("Completed", "Cancelled", "Suspended", *BAD_ENDS,
                                                     TAKEN_UP)}
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


def schedule_words(schedule: Any, active: bool) -> str:
    """A schedule, of the server or of prefect.yaml, for comparing and for people."""
    given = schedule if isinstance(schedule, dict) else schedule.model_dump()
    interval = given.get("interval")
    when = given.get("cron") or given.get("rrule") or (
        f"every {interval.total_seconds() if isinstance(interval, timedelta) else interval:g} s")
    return f"{when} {given.get('timezone') or 'UTC'}{'' if active else ' (off)'}"


def as_left(entry: Mapping[str, Any], there: DeploymentResponse) -> tuple[dict[str, Any], list[str]]:
    """An entry of prefect.yaml with what people can change in Prefect's pages as it is there, and the differences.
    Schedules are left out: Prefect then leaves them alone."""
    limit = there.global_concurrency_limit.limit if there.global_concurrency_limit else None
    strategy = there.concurrency_options.collision_strategy.value if there.concurrency_options else None
    own = entry.get("concurrency_limit")
    given = own if isinstance(own, Mapping) else {"limit": own}
    pool = entry.get("work_pool") or {}
    compared = {
        "schedules": (sorted(schedule_words(item.schedule, item.active) for item in there.schedules),
                      sorted(schedule_words(item, item.get("active", True)) for item in entry.get("schedules") or [])),
        "parameters": (there.parameters, entry.get("parameters") or {}),
        "concurrency limit": (limit, given["limit"]),
        "work queue": ((there.work_pool_name, there.work_queue_name),
                       (pool.get("name"), pool.get("work_queue_name", "default"))),
        "job variables": (there.job_variables or {}, pool.get("job_variables") or {}),
        "tags": (sorted(there.tags or []), sorted(entry.get("tags") or [])),
        "paused": (bool(there.paused), bool(entry.get("paused"))),
    }
    kept = {**entry, "parameters": there.parameters, "tags": there.tags, "paused": bool(there.paused),
            "concurrency_limit": {"limit": limit, "collision_strategy": strategy} if limit and strategy else limit,
            "work_pool": {"name": there.work_pool_name, "work_queue_name": there.work_queue_name,
                          "job_variables": there.job_variables or {}}}
    kept.pop("schedules", None)
    return kept, [f"{what} {_shown(theirs)} (prefect.yaml: {_shown(ours)})"
                  for what, (theirs, ours) in compared.items() if theirs != ours]


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} = {item}" for key, item in sorted(value.items())) or "none"
    return ", ".join(map(str, value)) or "none" if isinstance(value, list | tuple) else str(value).lower()


async def described(client: PrefectClient, root: Path, reset: Sequence[str]) -> dict[str, Any]:
    """prefect.yaml, with what people have changed on the server; tells the differences. Raises UserError for a name in
    `reset` that it does not have."""
    content = yaml.safe_load((root / "prefect.yaml").read_text(encoding="utf-8"))
    names = [entry["name"] for entry in content["deployments"]]
    if unknown := [name for name in reset if name not in names]:
        raise UserError(f"--reset {unknown[0]}: no such deployment; deployments: {', '.join(names)}")
    there = {item.name: item for item in await client.read_deployments(
        deployment_filter=DeploymentFilter(name=DeploymentFilterName(any_=names)))}
    for place, entry in enumerate(content["deployments"]):
        known = there.get(entry["name"])
        if known is None:
            continue
        if entry["name"] in reset:
            for item in known.schedules:
                await client.delete_deployment_schedule(known.id, item.id)
            continue
        content["deployments"][place], differences = as_left(entry, known)
        if differences:
            print(f"setup: {entry['name']} stays as it is there: {'; '.join(differences)}")
    return dict(content)


def deploy(root: Path, content: Mapping[str, Any]) -> None:
    """Registers the deployments that `content`, as prefect.yaml, describes. Raises UserError with what Prefect says."""
    prefect = Path(sys.executable).with_name("prefect")
    environment = {**os.environ, **_git_remote(root), "PREFECT_API_URL": str(PREFECT_API_URL.value())}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "prefect.yaml"
        path.write_text(yaml.safe_dump(dict(content), sort_keys=False), encoding="utf-8")
        done = subprocess.run([str(prefect), "--no-prompt", "deploy", "--all", "--prefect-file", str(path)], cwd=root,
                              capture_output=True, text=True, env=environment)
    if done.returncode:
        raise UserError(f"prefect deploy: {(done.stderr or done.stdout).strip().splitlines()[-1]}")


def _git_remote(root: Path) -> dict[str, str]:
    """Settings by which git names its remote without a login: Prefect asks for it and sends it with each deployment."""
    try:
        url = origin(root)
    except UserError:
        return {}  # no remote, or no repository
    return {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "remote.origin.url", "GIT_CONFIG_VALUE_0": without_login(url)}


async def _set_up(workers_stopped: bool, root: Path, reset: Sequence[str]) -> dict[str, Any]:
    async with get_client() as client:
        content = await described(client, root, reset)
        await set_up(client)
        if workers_stopped:
            for name in await take_up(client):
                print(f"setup: {name} goes on from its checkpoint")
            if missed := await forget_missed(client):
                print(f"setup: {missed} runs of schedules were due while the servers were stopped and are left out; "
                      "of each schedule the last one runs now")
    return content


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m infra.setup", description="Sets up a Prefect server.")
    parser.add_argument("--workers-stopped", action="store_true", help="take up again what counts as running")
    parser.add_argument("--reset", nargs="+", default=[], metavar="DEPLOYMENT",
                        help="set these back to what prefect.yaml says")
    options = parser.parse_args()
    url = without_secrets(PREFECT_API_URL.value() or "")
    if not url:
        print("setup: set PREFECT_API_URL to the server's address, or use `make ui`", file=sys.stderr)
        raise SystemExit(2)
    try:
        deploy(Path.cwd(), asyncio.run(_set_up(options.workers_stopped, Path.cwd(), options.reset)))
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
