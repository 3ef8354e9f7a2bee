"""The champion of the model registry, measured on today's data and tasks beside the checkout's models.

It runs in a workspace, promotes nothing and changes nothing in the checkout.
"""

import asyncio
import json
from pathlib import Path
from typing import Any

import flows.environment  # noqa: F401

# isort: split
from prefect import State, flow
from prefect.artifacts import acreate_table_artifact
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from flows.artifacts import best_effort
from flows.execution import check_params, run_lock, run_stages
from flows.parameters import ProfileName
from flows.stages import StageFailed
from flows.workspaces import FOLDER, Changes, fill_workspace
from mlops.config.loader import Params, load_params
from rlhf.errors import UserError

NAME = "champion"
FETCHED = Path("scratch/champion")


@flow(name="champion", flow_run_name=lambda: f"champion {str(flow_run.id)[:6]}", persist_result=False)
async def evaluate_champion(profile: ProfileName | None = None, root: Path | None = None) -> State[Any]:
    """Fetches the champion and runs the pipeline up to evaluate with it among the models.

    Args:
        profile: Which file of profiles/ to use; empty: what params.yaml says.
        root: The checkout; empty: the folder that the deployment was made in.
    """
    checkout = (root or Path()).resolve()
    try:
        check_params(checkout, profile)
        params = load_params(checkout)
        version, folder = await asyncio.to_thread(fetch, checkout, params)
        others = {**params.stages.evaluate.others, NAME: str(folder)}
        changes = Changes(profile, None, {"evaluate": {"others": others}}, label=f"{NAME}-{version}")
        workdir = checkout / FOLDER / changes.name(checkout)
        async with run_lock(workdir):
            await asyncio.to_thread(fill_workspace, checkout, workdir, changes)
            await run_stages(workdir, str(flow_run.name), last="evaluate")
    except (UserError, StageFailed) as error:
        return Failed(message=str(error), data=error)
    metrics = json.loads((workdir / "metrics" / "evaluate.json").read_text(encoding="utf-8"))
    rows = [{"metric": key, "value": f"{value:.4g}"} for key, value in sorted(metrics.items())
            if NAME in key and isinstance(value, int | float)]
    await best_effort(acreate_table_artifact(rows, key=NAME, description=f"version {version} on today's data"))
    return Completed(message=f"version {version}: {workdir / 'reports' / 'report.html'}")


def fetch(checkout: Path, params: Params) -> tuple[str, Path]:
    """The champion's version and its folder. Raises UserError where there is no champion."""
    from mlops.release.registry import Registry  # imports mlflow, which takes seconds

    registry = Registry(params.stages.promote.registry, checkout)
    champion = registry.champion()
    if champion is None:
        raise UserError(f"{registry.model('policy')} has no champion yet; a run that passes the gates makes one")
    folder = checkout / FETCHED / f"{champion.name}-{champion.version}"
    return str(champion.version), registry.folder_of(champion, folder)
