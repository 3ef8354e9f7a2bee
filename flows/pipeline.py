"""The whole pipeline as a Prefect flow, one task per stage of dvc.yaml: `python -m flows.pipeline [--profile smoke]`.

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
from functools import partial
from pathlib import Path
from typing import Any

import flows.environment  # noqa: F401
from flows.process import continue_in_own_group
from flows.server import server_lasts, start_server

if __name__ == "__main__":  # the server starts while this process goes on with its own imports
    continue_in_own_group()
    start_server()

# isort: split
from prefect import State, flow
from prefect.artifacts import acreate_markdown_artifact
from prefect.runtime import flow_run
from prefect.settings import PREFECT_UI_URL
from prefect.states import Completed, Failed

from flows.artifacts import best_effort, show_curves, show_metrics
from flows.check import params_of, stop_early
from flows.execution import (
    check_params,
    close_earlier_tasks,
    ended_before,
    name_of_run,
    run_lock,
    run_stages,
    run_to_end,
    use_profile,
    wait_for_upload,
)
from flows.parameters import BetaRule, ChangedParameters, Hours, KlGoal, ProfileName, PtxCoef, Seed, assigned
from flows.stages import StageFailed, mend_dvc_lock
from flows.summary import StageResult, Summary, ceiling_note, compared_models, main_numbers
from flows.workspaces import FOLDER, Changes, changed_by, fill_workspace
from mlops import program
from mlops.config.loader import PARAMS_FILE, load_params, read_yaml
from mlops.config.stage_graph import pipeline_stages
from mlops.tracking.credentials import without_login
from rlhf.errors import UserError, without_secrets

NOT_PROMOTED = 5  # exit code of a run that is complete and missed a gate


class NotPromoted(Exception):
    """The run is complete and its policy did not pass a gate: the champion stays."""

    def __init__(self, summary: Summary, reasons: Sequence[str]) -> None:
        super().__init__("not promoted: " + "; ".join(reasons))
        self.summary = summary


@flow(persist_result=False, flow_run_name=lambda: name_of_run(changes_of, "pipeline"))
async def pipeline(profile: ProfileName | None = None, seed: Seed | None = None, kl_goal: KlGoal | None = None,
                   beta_rule: BetaRule | None = None, ptx_coef: PtxCoef | None = None,
                   changes: ChangedParameters | None = None, own_copy: bool = False, gpu_workers: bool = False,
                   stage_hours: Hours | None = None, until: str | None = None,
                   root: Path | None = None) -> Summary | State[Any]:
    """Runs every stage that is not up to date, in the order of dvc.yaml.

    Works in the checkout itself, unless you change a parameter or set `own_copy`: then in a workspace, which shares
    DVC's cache and MLflow's store and leaves the checkout as it is. Two runs in one folder wait for each other.

    Args:
        profile: Which file of profiles/ to use; in the checkout it is written into params.yaml. Empty: what that says.
        seed: The seed of everything. Empty: params.yaml's.
        kl_goal: The KL that beta is steered to, nats a response, in every arm. Empty: what the profile says of each.
        beta_rule: How beta follows the KL, in every arm. Empty: what the profile says of each.
        ptx_coef: Weight of the pretraining loss in PPO, in every arm; 0 is plain PPO. Arms that are then equal are
            trained once. Empty: what the profile says of each.
        changes: Other parameters by name, e.g. {"sft.epochs": 3, "arms.ppo_ptx.lr": 0.0001}. Empty: all as in the
            profile.
        own_copy: Work in a workspace even if no parameter differs.
        gpu_workers: Training and evaluation run on the workers of pool gpu, at the exact revision (flows/remote.py).
        stage_hours: A stage that takes longer is ended; its checkpoint stays. Empty: no limit.
        until: The last stage to run, e.g. rm; empty: all.
        root: The checkout; empty: the folder that the deployment was made in.
    """
    checkout = (root or Path()).resolve()
    run_name = str(flow_run.name)
    if end := await best_effort(ended_before()):
        return end
    try:
        check_params(checkout, profile)
        changed = changes_of({"profile": profile, "seed": seed, "kl_goal": kl_goal, "beta_rule": beta_rule,
                              "ptx_coef": ptx_coef, "changes": changes})
        in_workspace = own_copy or bool(changed)
        workdir = checkout / FOLDER / changed.name(checkout) if in_workspace else checkout
        async with run_lock(workdir):
            if in_workspace:
                await asyncio.to_thread(fill_workspace, checkout, workdir, changed)
            # Now: another run may have held the lock for hours. In the checkout before anything is written.
            params = load_params(workdir) if in_workspace else params_of(
                workdir, profile or str(read_yaml(workdir / PARAMS_FILE)["profile"]), Changes())
            await asyncio.to_thread(stop_early, params, workdir, gpu_workers)
            if not in_workspace:
                use_profile(workdir, profile)
            mend_dvc_lock(workdir)
            await best_effort(close_earlier_tasks())
            results = await run_stages(workdir, run_name, stage_hours, gpu_workers, last_stage(workdir, until))
    except (UserError, StageFailed) as error:
        return Failed(message=str(error), data=error)
    summary = await make_summary(workdir, run_name, results)
    await best_effort(acreate_markdown_artifact(summary.markdown(), key="pipeline-summary",
                                                description=f"Run {run_name}"))
    await show_metrics(workdir, run_name)
    await show_curves(workdir, run_name)
    reasons = not_promoted(workdir) if results[-1].stage == "promote" else []
    if reasons:
        refusal = NotPromoted(summary, reasons)
        return Completed(name="Not promoted", message=str(refusal), data=refusal)  # no failure: the run is complete
    return summary


def changes_of(parameters: Mapping[str, Any]) -> Changes:
    """What the flow's parameters change of the checkout's. Raises UserError for a parameter that does not exist."""
    given = {f"ppo.{name}": parameters[name] for name in ("kl_goal", "beta_rule", "ptx_coef")
             if parameters.get(name) is not None}
    other = parameters.get("changes") or {}
    if twice := sorted(set(given) & set(other)):
        raise UserError(f"{twice[0]}: is given twice")
    return Changes(parameters.get("profile"), parameters.get("seed"), changed_by({**given, **other}))


def known_stage(root: Path, name: str) -> None:
    """Raises UserError for a stage that no profile has; which arms there are is the profile's."""
    names = list(dict.fromkeys(stage.partition("@")[0] for stage in pipeline_stages(root)))
    if name.partition("@")[0] not in names:
        raise UserError(f"--until {name}: no such stage; stages: {', '.join(names)}")


def last_stage(root: Path, until: str | None) -> str:
    """The stage that `until` means: of several with that name, such as ppo@ppo and ppo@ppo_ptx, the last. Raises
    UserError."""
    if not until:
        return ""
    stages = pipeline_stages(root)
    found = [stage for stage in stages if until in (stage, stage.partition("@")[0])]
    if not found:
        raise UserError(f"--until {until}: no such stage; stages: {', '.join(stages)}")
    return found[-1]


def not_promoted(root: Path) -> list[str]:
    """Why the run's policy is not the champion; empty where it is, or where the pipeline has no such stage."""
    path = root / "metrics" / "promote.json"
    return list(json.loads(path.read_text(encoding="utf-8"))["reasons"]) if path.exists() else []


async def make_summary(root: Path, run_name: str, results: list[StageResult]) -> Summary:
    """Waits until MLflow has the journals of this run, so that the summary can link it there."""
    uploaded, note = await wait_for_upload(root, run_name)
    evaluated = any(result.stage == "evaluate" for result in results)  # else metrics/evaluate.json is of another run
    notes = [*([note] if note else []), *(ceiling_note(root) if evaluated else [])]
    if all(result.how == "up to date" for result in results):
        notes.insert(0, "Nothing ran: code, data, parameters and seed are those of the results that are here. A change "
                        "of any of them runs the stages that read it.")
    return Summary(results, main_numbers(root, [result.stage for result in results]),
                   compared_models(root) if evaluated else ([], []),
                   links_to(root, uploaded), notes, (str(uploaded.get("experiment_id", "")),
                                                     str(uploaded.get("parent_run_id", ""))))


def mlflow_address() -> str:
    """Where MLflow's pages are, or what starts them and where they are then."""
    tracker = without_secrets(without_login(os.environ.get("MLFLOW_TRACKING_URI", "")))
    store = f" --backend-store-uri {tracker}" if tracker else ""
    return tracker if tracker.startswith("http") else f"`mlflow ui{store}`, then http://127.0.0.1:5000"


def links_to(root: Path, uploaded: dict[str, Any]) -> list[tuple[str, str]]:
    """Where to look next: (what, where)."""
    mlflow = mlflow_address()
    if uploaded.get("parent_run_id"):
        mlflow += f"/#/experiments/{uploaded['experiment_id']}/runs/{uploaded['parent_run_id']}"
    prefect = PREFECT_UI_URL.value() if server_lasts() else "`prefect server start`, then http://127.0.0.1:4200"
    pages = [("report", root / "reports" / "report.html"), ("data docs", root / "reports" / "data_docs" / "index.html")]
    return [
        *((what, str(page)) for what, page in pages if page.is_file()),
        ("MLflow", mlflow),
        ("Prefect", f"{prefect}/runs"),
    ]


async def run_pipeline(parameters: Mapping[str, Any]) -> Any:
    """Runs the flow and returns its summary or its error."""
    state = await pipeline(**parameters, return_state=True)
    return await state.aresult(raise_on_failure=False)


def main() -> None:
    parser = argparse.ArgumentParser(prog=program("flows.pipeline"), description="Runs the whole pipeline.")
    parser.add_argument("--profile", help="the file of profiles/ to use; the checkout's params.yaml then names it")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.NAME=VALUE",
                        help="another value of a parameter; the run then works in a workspace of its own")
    parser.add_argument("--seed", type=int, help="another seed; in a workspace too")
    parser.add_argument("--until", metavar="STAGE", help="the last stage to run")
    parser.add_argument("--stage-hours", type=float, help="a stage that takes longer is ended; its checkpoint stays")
    args = parser.parse_args()
    try:
        check_params(Path(), args.profile)
        parameters = {"profile": args.profile, "seed": args.seed, "changes": assigned(args.set) or None,
                      "stage_hours": args.stage_hours, "until": args.until}
        if args.seed is not None and not 0 <= args.seed < 2**31:
            raise UserError(f"--seed {args.seed}: must be an int >= 0 and < 2^31")
        if args.stage_hours is not None and not 0 < args.stage_hours <= 1000:
            raise UserError(f"--stage-hours {args.stage_hours:g}: must be a number > 0 and <= 1000")
        changed = changes_of(parameters)
        if args.until:
            known_stage(Path(), args.until)
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    if changed:
        print(f"This run works in {FOLDER / changed.name(Path())}; the checkout stays as it is.", flush=True)
    result = run_to_end(partial(run_pipeline, parameters))
    if isinstance(result, NotPromoted):
        result.summary.show()
        print(next_step(args), flush=True)
        print(result, file=sys.stderr)
        raise SystemExit(NOT_PROMOTED)
    if not isinstance(result, Summary):
        raise result
    result.show()
    print(next_step(args))


def next_step(options: argparse.Namespace) -> str:
    """What a person does after a run."""
    if options.until:
        return "Next: the same command without --until goes on from here"
    profile = f" --profile {options.profile}" if options.profile else ""
    return f"Next: instructflow chat; to compare, instructflow sweep{profile} --set ppo.kl_goal=0.5,1.5"


if __name__ == "__main__":
    main()
