"""Resumes rounds that wait for people's labels: takes over what Label Studio has, resumes a run whose labels are there.

Its schedule starts it every few minutes, and it looks up what is missing: no message between servers can get lost.
The flow and its deployment keep the names `wake-rounds` and `wake`: servers store schedules by them.
"""

from pathlib import Path
from typing import Any

import flows.environment  # noqa: F401

# isort: split
from prefect import State, flow, get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.flow_runs import aresume_flow_run
from prefect.states import Failed

from flows.rounds import pull_labels, rounds, server_is_named, workdir_of
from flows.stages import StageFailed
from mlops.config.loader import load_params
from mlops.labeling.store import Batch


@flow(name="wake-rounds", persist_result=False)
async def resume_rounds(root: Path | None = None) -> dict[str, str] | State[Any]:
    """Looks at every suspended run of flow rounds.

    Args:
        root: The checkout; empty: the folder that the deployment was made in.
    """
    checkout = (root or Path()).resolve()
    outcomes: dict[str, str] = {}
    failures = []
    async with get_client() as client:
        paused = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.PAUSED])))
        waiting = await client.read_flow_runs(flow_filter=FlowFilter(name=FlowFilterName(any_=[rounds.name])),
                                              flow_run_filter=paused)
    for run in sorted(waiting, key=lambda item: str(item.id)):
        try:
            missing = await missing_labels(run, checkout)
        except StageFailed as failure:  # the server does not answer: the next look may
            failures.append(str(failure))
            continue
        outcomes[run.name] = f"{missing} labels are missing" if missing else "resumed"
        get_run_logger().info("%s: %s", run.name, outcomes[run.name])
        if not missing:
            await aresume_flow_run(run.id)
    return Failed(message="; ".join(failures), data=outcomes) if failures else outcomes


async def missing_labels(run: FlowRun, checkout: Path) -> int:
    """How many labels the run's round still needs, after a look at the labeling server."""
    parameters = {"count": 3, **run.parameters}
    workdir = workdir_of(parameters, Path(parameters.get("root") or checkout).resolve())
    for key in load_params(workdir).rounds:
        folder = Path("feedback") / key
        if not (workdir / folder / "assignments.jsonl").exists() or not Batch(workdir / folder).missing():
            continue
        if server_is_named():
            await pull_labels(workdir, run.name, folder)
        return len(Batch(workdir / folder).missing())
    return 0
