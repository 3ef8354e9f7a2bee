"""The pipeline for every combination of some PPO parameters, one after the other, each in its own workspace.

Data, SFT and reward model are made once: workspaces share DVC's cache. In MLflow the runs stand side by side.
"""

import itertools
import json
from pathlib import Path
from typing import Annotated, Any

import flows.environment  # noqa: F401

# isort: split
from prefect import State, flow, get_run_logger
from prefect.artifacts import acreate_table_artifact
from prefect.states import Failed
from pydantic import Field

from flows.artifacts import best_effort
from flows.parameters import BetaRule, KlGoal, ProfileName, PtxCoef, Seed
from flows.pipeline import NotPromoted, pipeline
from flows.summary import Summary
from flows.workspaces import FOLDER, Changes
from mlops.config.loader import load_params
from mlops.config.paths import metrics_of
from rlhf.errors import UserError

SHOWN = {"KL": "ppo/kl", "beta": "ppo/beta", "win rate vs SFT": "eval/win_rate_vs_sft",
         "gold gain": "eval/gold_gain_vs_sft", "mean tax": "tax/mean"}  # of the promoted arm


@flow(persist_result=False)
async def sweep(kl_goals: Annotated[list[KlGoal], Field(min_length=1, max_length=10)],
                beta_rules: Annotated[list[BetaRule], Field(min_length=1)] = ["step_ahead"],  # noqa: B006
                ptx_coefs: Annotated[list[PtxCoef], Field(min_length=1, max_length=10)] = [0.0],  # noqa: B006
                seeds: Annotated[list[Seed], Field(min_length=1, max_length=10)] = [1],  # noqa: B006
                profile: ProfileName | None = None, root: Path | None = None) -> list[dict[str, Any]] | State[Any]:
    """Runs the pipeline for each combination and compares the results. A run that fails stops none of the others.

    Args:
        kl_goals: KL goals, nats a response.
        beta_rules: Rules for beta.
        ptx_coefs: Weights of the pretraining loss; 0 is plain PPO.
        seeds: Seeds of everything: with another seed all stages run.
        profile: Which file of profiles/ to use; empty: what params.yaml says.
        root: The checkout; empty: the folder that the deployment was made in.
    """
    checkout = (root or Path()).resolve()
    rows: list[dict[str, Any]] = []
    failed = 0
    for seed, rule, goal, ptx in itertools.product(seeds, beta_rules, kl_goals, ptx_coefs):
        ppo: dict[str, Any] = {"kl_goal": goal, "beta_rule": rule, "ptx_coef": ptx}
        state = await pipeline(profile=profile, seed=seed, **ppo, root=root, return_state=True)
        result = await state.aresult(raise_on_failure=False)
        row: dict[str, Any] = {"seed": seed, **ppo}
        if isinstance(result, Summary | NotPromoted):
            row |= _figures(checkout / FOLDER / Changes(profile, seed, {"ppo": ppo}).name(checkout))
        else:
            get_run_logger().error("%s: %s", row, result)
            failed += 1
            row["error"] = str(result)
            if isinstance(result, UserError):
                return Failed(message=str(result), data=result)
        rows.append(row)
    await best_effort(acreate_table_artifact(rows, key="sweep", description=f"{len(rows)} runs, {failed} failed"))
    return Failed(message=f"{failed} of {len(rows)} runs failed", data=rows) if failed else rows


def _figures(workspace: Path) -> dict[str, str]:
    """The main numbers of a workspace; what it has not measured is left out."""
    metrics: dict[str, float] = {}
    arm = load_params(workspace).stages.promoted
    for stage in (f"ppo@{arm}", "evaluate"):
        path = workspace / f"{metrics_of(stage)}.json"
        if path.exists():
            metrics |= json.loads(path.read_text(encoding="utf-8"))
    return {name: f"{metrics[key]:.3g}" for name, key in SHOWN.items() if key in metrics}
