"""The whole line as a Prefect flow, one task per stage of dvc.yaml: `python -m flows.pipeline [--profile smoke]`.

Prefect decides when and where, DVC what is up to date: each task runs `dvc repro --single-item <stage>`, so a
flow, a `dvc repro` by hand and a reproduction run the same commands. It needs no server; with PREFECT_API_URL set
the run shows in that server.
"""

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flows.environment  # noqa: F401
from flows.execution import UPLOAD_SECONDS, check_params, close_earlier_tasks, run_lock, run_stages, use_profile
from flows.process import continue_in_own_group
from flows.server import server_lasts, start_server, wait_for_server

if __name__ == "__main__":  # the server starts while this process goes on with its own imports
    continue_in_own_group()
    start_server()

# isort: split
from prefect import State, flow
from prefect.artifacts import acreate_markdown_artifact
from prefect.exceptions import TerminationSignal
from prefect.runtime import flow_run
from prefect.settings import PREFECT_UI_URL
from prefect.states import Failed

from flows.artifacts import kept, show_curves, show_metrics
from flows.parameters import BetaRule, Hours, KlGoal, ProfileName, PtxCoef, Seed
from flows.stages import StageFailed, mend_lock
from flows.summary import StageResult, Summary, main_numbers
from flows.terminal import show_bars
from flows.workspaces import FOLDER, Changes, fill_workspace
from mlops import imports_done
from mlops.config.loader import load_params
from mlops.tracking.uploader import wait_until_uploaded
from rlhf.errors import UserError

NOT_PROMOTED = 5  # exit code of a line that is complete and missed a gate


def run_name() -> str:
    """The line's name in Prefect and MLflow: what is run and the start of the run's id, the same after a restart."""
    given = flow_run.parameters
    try:
        what = changes_of(given).name(Path(given.get("root") or ".").resolve())
    except UserError:
        what = "line"
    return f"{what} {str(flow_run.id)[:6]}"


@flow(persist_result=False, flow_run_name=run_name)
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
        async with run_lock(where):
            if copied:
                await asyncio.to_thread(fill_workspace, checkout, where, changes)
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








# --- the end ----------------------------------------------------------------------------------------------------


async def make_summary(root: Path, line: str, results: list[StageResult]) -> Summary:
    """Waits until MLflow has the journals of this line, so that the summary can link its run."""
    notes, mirrored = [], {}
    advice = "`python -m mlops.tracking.uploader --once` sends what is missing"
    try:
        mirrored = await asyncio.to_thread(wait_until_uploaded, root, line, UPLOAD_SECONDS)
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


async def run_pipeline(profile: str | None) -> Any:
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
        result = asyncio.run(run_pipeline(args.profile))
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
