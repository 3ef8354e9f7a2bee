"""Runs the stages of dvc.yaml from a flow: parameters checked, one run at a time in a folder."""

import asyncio
import fcntl
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from uuid import UUID

from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    TaskRunFilter,
    TaskRunFilterState,
    TaskRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from prefect.runtime import flow_run
from prefect.states import Crashed

import flows.environment  # noqa: F401
from flows.artifacts import findings_of, show_findings
from flows.remote import delegated_task
from flows.stages import ON_GPU, StageFailed, stage_task, training_slot
from flows.summary import StageResult
from mlops.config.loader import PARAMS_FILE, PROFILES_DIR, load_params, load_profile
from mlops.config.stage_graph import pipeline_stages
from rlhf.errors import UserError
from rlhf.files import write_atomic

UPLOAD_SECONDS = 60.0
TIMED_OUT = 124


def check_params(root: Path, profile: str | None) -> None:
    """Raises UserError if `profile`, or without one what params.yaml says, cannot be used. Changes nothing."""
    if profile is None:
        load_params(root)
        return
    known = sorted(path.stem for path in (root / PROFILES_DIR).glob("*.yaml"))
    if profile not in known:
        raise UserError(f"unknown profile {profile!r}: must be one of {', '.join(known)}")
    load_profile(root / PROFILES_DIR / f"{profile}.yaml")


def use_profile(root: Path, profile: str | None) -> None:
    """Rewrites the line `profile: ...` of params.yaml, and only it, if it names another profile."""
    path = root / PARAMS_FILE
    if profile is None or not path.exists():
        return
    text = path.read_text(encoding="utf-8")
    changed, found = re.subn(r"(?m)^(profile:[ \t]*)[^\s#]+", rf"\g<1>{profile}", text)
    if found != 1:
        raise UserError(f"{path}: expected one line `profile: NAME`, found {found}")
    if changed != text:
        write_atomic(path, changed.encode())


@asynccontextmanager
async def run_lock(root: Path) -> AsyncIterator[None]:
    """Lets one line at a time work in a checkout; the kernel frees the lock when the process ends, however."""
    path = root / "scratch" / "line.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        told = False
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not told:
                    get_run_logger().info("another line is running in %s; waiting for its end", root)
                told = True
                await asyncio.sleep(1)
        yield


async def close_earlier_tasks() -> None:
    """Where this run is taken up again: what its dead process could not end would count as running for ever."""
    if (flow_run.run_count or 0) < 2:
        return
    running = TaskRunFilter(state=TaskRunFilterState(type=TaskRunFilterStateType(any_=[StateType.RUNNING])))
    async with get_client() as client:
        mine = FlowRunFilter(id=FlowRunFilterId(any_=[UUID(str(flow_run.id))]))
        for task_run in await client.read_task_runs(flow_run_filter=mine, task_run_filter=running):
            await client.set_task_run_state(task_run.id, Crashed(message="its process ended"), force=True)


async def run_stages(root: Path, line: str, stage_hours: float | None = None, gpu_workers: bool = False,
                     last: str = "") -> list[StageResult]:
    """Runs the stages up to `last`, all without it. Raises the error of the stage that failed."""
    results = []
    stages = pipeline_stages(root)
    for stage in stages[: stages.index(last) + 1 if last else None]:
        before = findings_of(root)
        try:
            results.append(await run_stage_of(stage, root, line, stage_hours, gpu_workers))
        finally:
            if stage == "validate":
                await show_findings(root, before)
    return results


async def run_stage_of(stage: str, root: Path, line: str, stage_hours: float | None, gpu_workers: bool) -> StageResult:
    """Runs one stage, here or on a worker of pool gpu. Raises its error."""
    on_gpu = stage.partition("@")[0] in ON_GPU
    remote = gpu_workers and on_gpu
    run = delegated_task(stage, stage_hours) if remote else stage_task(stage, stage_hours)
    async with training_slot() if on_gpu and not remote else nullcontext():
        state = await run(stage, root, line, return_state=True)
    result = await state.aresult(raise_on_failure=False)
    if isinstance(result, TimeoutError):
        result = StageFailed(f"{stage}: ended after {stage_hours:g} h (stage_hours); the next run goes on from the "
                             "checkpoint", TIMED_OUT)
    if not isinstance(result, StageResult):
        raise result
    return result
