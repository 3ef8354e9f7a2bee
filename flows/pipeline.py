"""The whole line as a Prefect flow, one task per stage of dvc.yaml: `python -m flows.pipeline [--profile smoke]`.

Prefect decides when and where, DVC what is up to date: each task runs `dvc repro --single-item <stage>`, so a
flow, a `dvc repro` by hand and a reproduction run the same commands. It needs no server; with PREFECT_API_URL set
the run shows in that server.
"""

import argparse
import asyncio
import fcntl
import json
import os
import re
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from typing import Any
from uuid import UUID

import flows.quiet  # noqa: F401
from flows.process import continue_in_own_group
from flows.server import server_lasts, start_server, wait_for_server

if __name__ == "__main__":  # the server starts while this process goes on with its own imports
    continue_in_own_group()
    start_server()

# isort: split
from prefect import State, flow, get_run_logger
from prefect.artifacts import acreate_markdown_artifact
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
from prefect.settings import PREFECT_UI_URL
from prefect.states import Crashed, Failed

from flows.artifacts import findings_of, kept, show_curves, show_findings, show_metrics
from flows.copies import FOLDER, Changes, fill_copy
from flows.parameters import BetaRule, Hours, KlGoal, ProfileName, PtxCoef, Seed
from flows.remote import delegated_task
from flows.stages import ON_GPU, StageFailed, mend_lock, stage_task, training_slot
from flows.summary import StageResult, Summary, main_numbers
from flows.terminal import show_bars
from rlhf.errors import UserError
from rlhf.files import write_atomic
from tasks import imports_done
from tasks.graph import line_stages
from tasks.mirror import wait_until_mirrored
from tasks.params import PARAMS_FILE, PROFILES_DIR, load_params, load_profile

MIRROR_SECONDS = 60.0
TIMED_OUT = 124
NOT_PROMOTED = 5  # exit code of a line that is complete and missed a gate


def line_name() -> str:
    """The line's name in Prefect and MLflow: what is run and the start of the run's id, the same after a restart."""
    given = flow_run.parameters
    try:
        what = changes_of(given).name(Path(given.get("root") or ".").resolve())
    except UserError:
        what = "line"
    return f"{what} {str(flow_run.id)[:6]}"


@flow(persist_result=False, flow_run_name=line_name)
async def pipeline(profile: ProfileName | None = None, seed: Seed | None = None, kl_goal: KlGoal | None = None,
                   beta_rule: BetaRule | None = None, ptx_coef: PtxCoef | None = None, own_copy: bool = False,
                   gpu_workers: bool = False, stage_hours: Hours | None = None,
                   root: Path | None = None) -> Summary | State[Any]:
    """Runs every stage that is not up to date, in the order of dvc.yaml.

    In the checkout itself, unless a parameter differs from the files': then, or with `own_copy`, in a copy that shares
    DVC's cache and MLflow's store and leaves the checkout as it is. Two lines in one folder wait for each other.

    Args:
        profile: Which file of profiles/ to use; in the checkout it is written into params.yaml. Empty: what that says.
        seed: Another seed than params.yaml's.
        kl_goal: The KL that beta is steered to, nats a response.
        beta_rule: How beta follows the KL.
        ptx_coef: Weight of the pretraining loss in PPO; 0 is plain PPO.
        own_copy: Work in a copy even if nothing differs.
        gpu_workers: Training and evaluation run on the workers of pool gpu, at the exact revision (flows/remote.py).
        stage_hours: A stage that takes longer is ended; its checkpoint stays.
        root: The checkout; empty: the folder that the deployment was made in.
    """
    checkout = (root or Path()).resolve()
    try:
        check_params(checkout, profile)
        changes = changes_of({"profile": profile, "seed": seed, "kl_goal": kl_goal, "beta_rule": beta_rule,
                              "ptx_coef": ptx_coef})
        copied = own_copy or bool(changes)
        where = checkout / FOLDER / changes.name(checkout) if copied else checkout
        async with line_lock(where):
            if copied:
                await asyncio.to_thread(fill_copy, checkout, where, changes)
            else:
                use_profile(where, profile)
            load_params(where)  # once more: another line may have held the lock for hours
            mend_lock(where)
            await kept(close_earlier_tasks())
            results = await run_stages(where, str(flow_run.name), stage_hours, gpu_workers)
    except (UserError, StageFailed) as error:
        return Failed(message=str(error), data=error)
    summary = await make_summary(where, str(flow_run.name), results)
    line = str(flow_run.name)
    await kept(acreate_markdown_artifact(summary.markdown(), key="pipeline-summary", description=f"Line {line}"))
    await show_metrics(where, line)
    await show_curves(where, line)
    reasons = not_promoted(where)
    if reasons:
        refused = NotPromoted(summary, reasons)
        return Failed(name="Not promoted", message=str(refused), data=refused)
    return summary


def changes_of(given: Mapping[str, Any]) -> Changes:
    """From the flow's parameters."""
    ppo = {name: given[name] for name in ("kl_goal", "beta_rule", "ptx_coef") if given.get(name) is not None}
    return Changes(given.get("profile"), given.get("seed"), {"ppo": ppo} if ppo else {})


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
    stages = line_stages(root)
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


class NotPromoted(Exception):
    """The line is complete and its policy did not pass a gate: the champion stays."""

    def __init__(self, summary: Summary, reasons: Sequence[str]) -> None:
        super().__init__("not promoted: " + "; ".join(reasons))
        self.summary = summary


def not_promoted(root: Path) -> list[str]:
    """Why the line's policy is not the champion; empty where it is, or where the line has no such stage."""
    path = root / "metrics" / "promote.json"
    return list(json.loads(path.read_text(encoding="utf-8"))["reasons"]) if path.exists() else []


# --- parameters and order, checked before anything starts ---------------------------------------------------------


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
async def line_lock(root: Path) -> AsyncIterator[None]:
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


# --- the end ----------------------------------------------------------------------------------------------------


async def make_summary(root: Path, line: str, results: list[StageResult]) -> Summary:
    """Waits until MLflow has the journals of this line, so that the summary can link its run."""
    notes, mirrored = [], {}
    advice = "`python -m tasks.mirror --once` sends what is missing"
    try:
        mirrored = await asyncio.to_thread(wait_until_mirrored, root, line, MIRROR_SECONDS)
    except TimeoutError:
        notes.append(f"MLflow is still catching up; {advice}")
    except Exception as error:  # the line is complete and its journals are on disk, whatever happened to the mirror
        notes.append(f"MLflow mirror: {error}; {advice}")
    return Summary(results, main_numbers(root, [result.stage for result in results]), look_at(root, mirrored), notes)


def look_at(root: Path, mirrored: dict[str, Any]) -> list[tuple[str, str]]:
    """Where to look next: (what, where)."""
    tracker = os.environ.get("MLFLOW_TRACKING_URI", "")
    mlflow = tracker if tracker.startswith("http") else "`mlflow ui`, then http://127.0.0.1:5000"
    if mirrored.get("parent_run_id"):
        mlflow += f"/#/experiments/{mirrored['experiment_id']}/runs/{mirrored['parent_run_id']}"
    prefect = PREFECT_UI_URL.value() if server_lasts() else "`prefect server start`, then http://127.0.0.1:4200"
    return [
        ("report", str(root / "reports" / "report.html")),
        ("data docs", str(root / "reports" / "data_docs" / "index.html")),
        ("MLflow", mlflow),
        ("Prefect", f"{prefect}/runs"),
    ]


async def run_line(profile: str | None) -> Any:
    """Runs the flow and returns its summary or its error."""
    state = await pipeline(profile=profile, return_state=True)
    return await state.aresult(raise_on_failure=False)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m flows.pipeline", description="Runs the whole line.")
    parser.add_argument("--profile", help="the file of profiles/ to use from now on; written into params.yaml")
    args = parser.parse_args()
    try:
        check_params(Path(), args.profile)
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    imports_done()
    show_bars()
    try:
        wait_for_server()
        result = asyncio.run(run_line(args.profile))
    except (KeyboardInterrupt, TerminationSignal, asyncio.CancelledError) as error:
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        raise SystemExit(143 if isinstance(error, TerminationSignal) else 130) from None
    if isinstance(result, NotPromoted):
        result.summary.show()
        print(result, file=sys.stderr)
        raise SystemExit(NOT_PROMOTED)
    if isinstance(result, Summary):
        result.show()
    elif isinstance(result, UserError | StageFailed):
        code = result.code if isinstance(result, StageFailed) else 2
        print(result, file=sys.stderr)
        raise SystemExit(code if code > 0 else 128 - code)
    else:
        raise result


if __name__ == "__main__":
    main()
