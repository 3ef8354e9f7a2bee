"""What the flows share: parameters checked, one run at a time in a folder, stages and programs run, results uploaded.

`async with run_lock(root): results = await run_stages(root, run_name)`.
"""

import asyncio
import fcntl
import itertools
import logging
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from typing import Any
from uuid import UUID

import flows.environment  # noqa: F401

# isort: split
from prefect import State, get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    TaskRunFilter,
    TaskRunFilterState,
    TaskRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from prefect.exceptions import TerminationSignal
from prefect.runtime import flow_run
from prefect.states import Cancelled, Crashed

from flows.artifacts import best_effort, findings_of, show_findings
from flows.parameters import profile_names
from flows.preflight import check_checkout, check_server
from flows.process import run_lines, work_begins
from flows.remote import delegated_task
from flows.server import server_lasts, wait_for_server
from flows.stages import ON_GPU, StageFailed, stage_task, training_slot
from flows.summary import StageResult
from flows.terminal import show_bars
from flows.workspaces import Changes, end_runs_cut_short
from mlops import imports_done
from mlops.config.arms import write_arms
from mlops.config.inputs import link_all
from mlops.config.loader import PARAMS_FILE, PROFILES_DIR, load_params, load_profile
from mlops.config.stage_graph import pipeline_stages
from mlops.tracking.upload_record import flow_of
from mlops.tracking.uploader import check_variables, wait_until_uploaded
from rlhf.errors import UserError

_runs: list[UUID] = []  # of this process
UPLOAD_SECONDS = 60.0  # at the end of a run, for journals that MLflow does not have yet
TIMED_OUT = 124  # exit code, as of the command timeout
TAKEN_UP = "Taken up again"  # the state by which a run whose process died is scheduled again (infra/setup.py)


# --- before anything starts -----------------------------------------------------------------------------------------


def name_of_run(changes_of: Callable[[dict[str, Any]], Changes], otherwise: str) -> str:
    """The run's name in Prefect and MLflow: what it runs and the start of its id, so the same after a restart.

    `otherwise` stands for what it runs where its parameters cannot be read: then the run fails by them.
    """
    parameters = flow_run.parameters
    _runs.append(UUID(str(flow_run.id)))
    try:
        what = changes_of(parameters).name(Path(parameters.get("root") or ".").resolve())
    except UserError:
        what = otherwise
    return f"{what} {str(flow_run.id)[:6]}"


def check_params(root: Path, profile: str | None) -> None:
    """Raises UserError if `profile`, or without one what params.yaml says, or the folder itself cannot be used. Changes
    nothing."""
    check_variables()
    check_checkout(root.resolve())
    if profile is None:
        load_params(root)
        return
    known = profile_names(root)
    if profile not in known:
        raise UserError(f"unknown profile {profile!r}: must be one of {', '.join(known)}")
    load_profile(root / PROFILES_DIR / f"{profile}.yaml")


def use_profile(root: Path, profile: str | None) -> None:
    """Writes the profile's name and arms into params.yaml, whose other lines stay; without a profile what is missing
    there."""
    if (root / PARAMS_FILE).exists():
        write_arms(root, profile)


@asynccontextmanager
async def run_lock(root: Path) -> AsyncIterator[None]:
    """Lets one run at a time work in a folder; the kernel frees the lock when the process ends, however."""
    path = root / "scratch" / "run.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        waiting = False
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waiting:
                    get_run_logger().info("another run works in %s; waiting for its end", root)
                waiting = True
                await asyncio.sleep(1)
        yield


async def ended_before() -> State[Any] | None:
    """The end that this run has already had, where an automation has scheduled it again all the same: on a busy server
    the event of the end comes after the time in which a sign of life was due. None for any other run."""
    if (flow_run.run_count or 0) < 2:
        return None
    async with get_client() as client:
        history = sorted(await client.read_flow_run_states(UUID(str(flow_run.id))), key=lambda state: state.timestamp)
    before: State[Any] | None = None
    for earlier, state in itertools.pairwise(history):
        if state.name == TAKEN_UP:
            before = earlier
    ended = before is not None and before.type in (StateType.COMPLETED, StateType.FAILED, StateType.CANCELLED)
    return State(type=before.type, name=before.name, message=before.message) if before and ended else None


async def close_earlier_tasks() -> None:
    """Where this run is taken up again: what its dead process could not end would count as running for ever."""
    if (flow_run.run_count or 0) < 2:
        return
    running = TaskRunFilter(state=TaskRunFilterState(type=TaskRunFilterStateType(any_=[StateType.RUNNING])))
    async with get_client() as client:
        this = FlowRunFilter(id=FlowRunFilterId(any_=[UUID(str(flow_run.id))]))
        for task_run in await client.read_task_runs(flow_run_filter=this, task_run_filter=running):
            await client.set_task_run_state(task_run.id, Crashed(message="its process ended"), force=True)


# --- stages and programs --------------------------------------------------------------------------------------------


async def run_stages(root: Path, run_name: str, stage_hours: float | None = None, gpu_workers: bool = False,
                     last: str = "") -> list[StageResult]:
    """Runs the stages up to `last`, all without it. Raises the error of the stage that failed."""
    results = []
    link_all(load_params(root), root)  # a missing file is better said now than after hours
    stages = pipeline_stages(root)
    end_runs_cut_short(root)
    with flow_of(root, run_name):
        for stage in stages[: stages.index(last) + 1 if last else None]:
            before = findings_of(root)
            try:
                results.append(await run_stage_of(stage, root, run_name, stage_hours, gpu_workers))
            finally:
                if stage == "validate":
                    await show_findings(root, before)
    return results


async def run_stage_of(stage: str, root: Path, run_name: str, stage_hours: float | None,
                       gpu_workers: bool) -> StageResult:
    """Runs one stage, here or on a worker of pool gpu. Raises its error."""
    on_gpu = stage.partition("@")[0] in ON_GPU
    remote = gpu_workers and on_gpu
    run = delegated_task(stage, stage_hours) if remote else stage_task(stage, stage_hours)
    async with training_slot() if on_gpu and not remote else nullcontext():
        state = await run(stage, root, run_name, return_state=True)
    result = await state.aresult(raise_on_failure=False)
    if isinstance(result, TimeoutError):
        result = StageFailed(f"{stage}: ended after {stage_hours:g} h (stage_hours); the next run goes on from the "
                             "checkpoint", TIMED_OUT)
    if not isinstance(result, StageResult):
        raise result
    return result


async def run_program(name: str, command: Sequence[str], root: Path, environment: Mapping[str, str]) -> None:
    """Runs a program that is no stage in `root`, its output to the log. Raises StageFailed with its last line."""
    logger = get_run_logger()
    output = ["no message"]

    def on_line(text: str) -> None:
        output.append(text)
        logger.info("%s", text)

    code = await run_lines(command, root, environment, on_line)
    if code:
        reason = output[-1].removeprefix(f"{name}: ") if code > 0 else f"ended by signal {-code}"
        raise StageFailed(f"{name}: {reason}", code)


# --- the end --------------------------------------------------------------------------------------------------------


async def wait_for_upload(root: Path, run_name: str) -> tuple[dict[str, Any], str]:
    """Waits until MLflow has the journals of this run.

    Returns the ids of `wait_until_uploaded`, and what to say where MLflow does not have them: the run is complete and
    its journals are on disk, whatever the upload does.
    """
    try:
        return await asyncio.to_thread(wait_until_uploaded, root, run_name, UPLOAD_SECONDS), ""
    except Exception as error:
        return {}, f"MLflow: {error}; `python -m mlops.tracking.uploader --once` sends what is missing"


def no_crash(record: logging.LogRecord) -> bool:
    """A logging filter: Prefect calls it a crash where a command's flow is cancelled, which only Ctrl-C does."""
    return "Execution was cancelled by the runtime environment" not in record.getMessage()


async def record_stop() -> None:
    """Tells the server that the runs of this process, and their tasks, were cancelled: Prefect recorded a crash."""
    crashed = TaskRunFilter(state=TaskRunFilterState(type=TaskRunFilterStateType(any_=[StateType.CRASHED])))
    stopped: State[Any] = Cancelled(message="stopped by Ctrl-C; the same command goes on from the last checkpoint")
    async with get_client() as client:
        for run_id in _runs:
            await client.set_flow_run_state(run_id, stopped, force=True)
            this = FlowRunFilter(id=FlowRunFilterId(any_=[run_id]))
            for task_run in await client.read_task_runs(flow_run_filter=this, task_run_filter=crashed):
                await client.set_task_run_state(task_run.id, stopped, force=True)


def run_to_end(start: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """Runs a flow from the command line and returns its result, which may be an error that the caller knows.

    Ends the process with one line and an exit code where somebody stopped it (130, 143), where a stage failed (the
    stage's own code) and at a user's mistake (2).
    """
    imports_done()
    show_bars()
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(no_crash)
    try:
        work_begins()
        wait_for_server()
        if server_lasts():
            asyncio.run(check_server())
        result = asyncio.run(start())
    except (KeyboardInterrupt, TerminationSignal, asyncio.CancelledError) as error:
        if isinstance(error, KeyboardInterrupt):
            asyncio.run(best_effort(record_stop()))
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        raise SystemExit(143 if isinstance(error, TerminationSignal) else 130) from None
    except UserError as error:
        result = error
    if isinstance(result, UserError | StageFailed):
        code = result.code if isinstance(result, StageFailed) else 2
        print(result, file=sys.stderr)
        raise SystemExit(code if code > 0 else 128 - code)
    return result
