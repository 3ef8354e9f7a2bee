"""The pipeline for every combination of some parameters, one after the other, each in its own workspace.

    python -m flows.sweep --set ppo.kl_goal=0.3,0.6 [--set ...] [--profile NAME]

Data, SFT and reward model are made once: workspaces share DVC's cache. In MLflow the runs stand side by side.
"""

import argparse
import itertools
import json
import sys
import urllib.parse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import flows.environment  # noqa: F401
from flows.process import continue_in_own_group
from flows.server import start_server

if __name__ == "__main__":  # the server starts while this process goes on with its own imports
    continue_in_own_group()
    start_server()

# isort: split
from prefect import State, flow, get_run_logger
from prefect.artifacts import acreate_table_artifact
from prefect.states import Failed
from pydantic import Field
from rich.console import Console
from rich.table import Table

from flows.artifacts import best_effort
from flows.execution import check_params, run_to_end
from flows.parameters import BetaRule, KlGoal, ProfileName, PtxCoef, Seed, assigned_lists
from flows.pipeline import NotPromoted, changes_of, mlflow_address, pipeline
from flows.summary import WIDTH, Summary
from flows.workspaces import FOLDER
from mlops import program
from mlops.config.loader import load_params
from mlops.config.paths import POLICIES, metrics_of
from mlops.printing import show_table, terminal, whole
from rlhf.errors import UserError

SHOWN = {"KL": "eval/kl_{arm}", "KL in training": "ppo/kl", "beta": "ppo/beta",
         "win rate vs SFT": "eval/win_rate_vs_sft", "gold gain": "eval/gold_gain_vs_sft",
         "mean tax": "tax/mean"}  # of the promoted arm
MOST = 100  # runs
NOT_SHOWN = ("workspace", "error", "MLflow run")  # of a row


@flow(persist_result=False)
async def sweep(kl_goals: Annotated[list[KlGoal], Field(max_length=10)] = [],  # noqa: B006
                beta_rules: list[BetaRule] = [],  # noqa: B006
                ptx_coefs: Annotated[list[PtxCoef], Field(max_length=10)] = [],  # noqa: B006
                seeds: Annotated[list[Seed], Field(max_length=10)] = [],  # noqa: B006
                changes: Annotated[dict[str, list[Any]],
                                   Field(json_schema_extra={"example": {"sft.epochs": [1, 2]}})] = {},  # noqa: B006
                profile: ProfileName | None = None, root: Path | None = None) -> list[dict[str, Any]] | State[Any]:
    """Runs the pipeline for each combination and compares the results. A run that fails stops none of the others.

    Args:
        kl_goals: KL goals, nats a response, for every arm. Empty: the profile's own.
        beta_rules: Rules for beta, for every arm. Empty: the profile's own.
        ptx_coefs: Weights of the pretraining loss, for every arm; 0 is plain PPO. Empty: the profile's own.
        seeds: Seeds of everything: with another seed all stages run. Empty: params.yaml's.
        changes: Values of other parameters by name, e.g. {"sft.epochs": [1, 2]}. Empty: all as in the profile.
        profile: Which file of profiles/ to use; empty: what params.yaml says.
        root: The checkout; empty: the folder that the deployment was made in.
    """
    checkout = (root or Path()).resolve()
    rows: list[dict[str, Any]] = []
    failed, experiment = 0, ""
    try:
        named: dict[str, list[Any]] = {"kl_goal": kl_goals, "beta_rule": beta_rules, "ptx_coef": ptx_coefs,
                                       "seed": seeds}
        points = points_of(named, changes)
    except UserError as error:
        return Failed(message=str(error), data=error)
    for point in points:
        parameters = {"profile": profile, **point}
        state = await pipeline(**parameters, own_copy=True, root=root, return_state=True)
        result = await state.aresult(raise_on_failure=False)
        row: dict[str, Any] = {**point, **point.get("changes", {})}
        row.pop("changes", None)
        if isinstance(result, Summary | NotPromoted):
            name = changes_of(parameters).name(checkout)
            row |= {"workspace": name, **_figures(checkout / FOLDER / name)}
            summary = result.summary if isinstance(result, NotPromoted) else result
            if all(summary.in_mlflow):
                row["MLflow run"] = summary.in_mlflow[1]
                experiment = summary.in_mlflow[0]
        else:
            get_run_logger().error("%s: %s", row, result)
            failed += 1
            row["error"] = str(result)
            if isinstance(result, UserError):
                return Failed(message=str(result), data=result)
        rows.append(row)
    link = compare_link(experiment, [row["MLflow run"] for row in rows if "MLflow run" in row])
    linked = f". [Compare them in MLflow]({link})" if link.startswith("http") else ""
    await best_effort(acreate_table_artifact(rows, key="sweep", description=(
        f"{len(rows)} runs, {failed} failed{linked}")))
    if link:
        get_run_logger().info("compare them in MLflow: %s", link)
    return Failed(message=f"{failed} of {len(rows)} runs failed", data=rows) if failed else rows


def compare_link(experiment: str, runs: Sequence[str]) -> str:
    """MLflow's page that compares the runs, to keep; empty where there are fewer than two."""
    if len(runs) < 2:
        return ""
    chosen, of = (urllib.parse.quote(json.dumps(list(ids), separators=(",", ":"))) for ids in (runs, [experiment]))
    return f"{mlflow_address()}/#/compare-runs?runs={chosen}&experiments={of}"


def points_of(named: Mapping[str, list[Any]], changes: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    """The parameters of flow pipeline for each combination. Raises UserError: nothing to vary, a value that cannot be,
    too many runs."""
    lists = {name: values for name, values in named.items() if values}
    if not lists and not changes:
        raise UserError("sweep: name what to vary, e.g. kl_goals [0.3, 0.6]")
    for key, values in changes.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"sweep: {key}: must be a list of values")
    for key, values in {**lists, **changes}.items():
        if twice := next((value for value in values if values.count(value) > 1), None):
            raise UserError(f"sweep: {key} = {twice} stands twice")
    for seed in named.get("seed", []):
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**31:
            raise UserError(f"sweep: seed = {seed!r}: must be an int >= 0 and < 2^31")
    points = []
    for chosen in itertools.product(*lists.values(), *changes.values()):
        point: dict[str, Any] = dict(zip(lists, chosen, strict=False))
        other = dict(zip(changes, chosen[len(lists):], strict=True))
        changes_of({**point, "changes": other})
        points.append(point | ({"changes": other} if other else {}))
    if len(points) > MOST:
        raise UserError(f"sweep: {len(points)} combinations; at most {MOST} are run")
    return points


def _figures(workspace: Path) -> dict[str, str]:
    """The main numbers of a workspace; what it has not measured is left out."""
    metrics: dict[str, float] = {}
    arm = load_params(workspace).stages.promoted
    if not (workspace / POLICIES / arm).exists():
        return {}  # metrics/ is of another run: git has the reference run's
    for stage in (f"ppo@{arm}", "evaluate"):
        path = workspace / f"{metrics_of(stage)}.json"
        if path.exists():
            metrics |= json.loads(path.read_text(encoding="utf-8"))
    keys = {name: key.format(arm=arm) for name, key in SHOWN.items()}
    return {name: f"{metrics[key]:.3g}" for name, key in keys.items() if key in metrics}


async def run_sweep(parameters: Mapping[str, Any]) -> Any:
    """Runs the flow and returns its rows or its error."""
    state = await sweep(**parameters, return_state=True)
    return await state.aresult(raise_on_failure=False)


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """The rows as a table, below it why runs failed, and what to do next."""
    names = list(dict.fromkeys(name for row in rows for name in row if name not in NOT_SHOWN))
    table = Table(*names, "run", show_edge=False)
    for row in rows:
        table.add_row(*(whole(str(row.get(name, ""))) for name in names), whole(row.get("workspace", "failed")))
    show_table(table, console)
    for row in rows:
        if "error" in row:
            point = ", ".join(f"{name}={value}" for name, value in row.items() if name not in NOT_SHOWN)
            console.print(f"{point}: {row['error']}", soft_wrap=True)
    done = [row["workspace"] for row in rows if "workspace" in row]
    if len(done) > 1:
        console.print(f"\nNext: instructflow compare {' '.join(done[:2])}", soft_wrap=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog=program("flows.sweep"), description=(
        "Runs the pipeline for every combination of values, each in a workspace of its own."))
    parser.add_argument("--set", action="append", required=True, metavar="SECTION.NAME=VALUE,VALUE",
                        help="the values of a parameter, or seed=1,2; several --set make every combination")
    parser.add_argument("--profile", help="the file of profiles/ to use")
    args = parser.parse_args()
    try:
        check_params(Path(), args.profile)
        lists = assigned_lists(args.set)
        parameters = {"seeds": lists.pop("seed", []), "changes": lists, "profile": args.profile}
        points_of({"seed": parameters["seeds"]}, lists)
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    result = run_to_end(partial(run_sweep, parameters))
    if not isinstance(result, list):
        raise result
    console = terminal()
    console.width = min(console.width, WIDTH) if console.is_terminal else WIDTH
    show(result, console)
    if errors := [row["error"] for row in result if "error" in row]:
        print(f"{len(errors)} of {len(result)} runs failed", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
