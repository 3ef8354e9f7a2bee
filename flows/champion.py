"""The champion of the model registry, measured on today's data and tasks beside the checkout's models.

It runs in a copy of the checkout, promotes nothing and changes nothing there.
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

from flows.artifacts import kept
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
    """Fetches the champion and runs the line up to evaluate with it among the models.

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
        where = checkout / FOLDER / changes.name(checkout)
        async with run_lock(where):
            await asyncio.to_thread(fill_workspace, checkout, where, changes)
            await run_stages(where, str(flow_run.name), last="evaluate")
    except (UserError, StageFailed) as error:
        return Failed(message=str(error), data=error)
    metrics = json.loads((where / "metrics" / "evaluate.json").read_text(encoding="utf-8"))
    rows = [{"metric": key, "value": f"{value:.4g}"} for key, value in sorted(metrics.items())
            if NAME in key and isinstance(value, int | float)]
    await kept(acreate_table_artifact(rows, key=NAME, description=f"version {version} on today's data"))
    return Completed(message=f"version {version}: {where / 'reports' / 'report.html'}")


def fetch(checkout: Path, params: Params) -> tuple[str, Path]:
    """The champion's version and its folder. Raises UserError where there is no champion."""
    from mlops.release.registry import Registry  # imports mlflow, which takes seconds

    registry = Registry(params.stages.promote.registry, checkout)
    found = registry.champion()
    if found is None:
        raise UserError(f"{registry.model('policy')} has no champion yet; a line that passes the gates makes one")
    folder = checkout / FETCHED / f"{found.name}-{found.version}"
    return str(found.version), registry.folder_of(found, folder)
