"""Prefect's worker for one of this project's pools: `prefect worker start`, which tells of a crash once.

    python -m infra.worker POOL [NAME]      NAME: POOL@HOST

A flow whose process is killed is reported as crashed twice: at once by Prefect's runner, and by the worker after it has
looked for hooks in the flow's code, on a busy machine ten seconds later. By then the run has been taken up again, and
the second report would count as a crash of its new start: a third start beside the second one, and one less to come.
"""

import socket
import sys
from typing import Any

import flows.environment  # noqa: F401

# isort: split
from prefect.cli import app
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.workers.process import ProcessWorker


async def of_an_earlier_start(run: FlowRun, client: PrefectClient) -> bool:
    """Whether the start of `run`, as it was when the worker took it, is over and the run waits for another or is in it.

    A start is counted when its process begins with the flow; before that it is PENDING.
    """
    now = await client.read_flow_run(run.id)
    if now.state is None or not (now.state.is_scheduled() or now.state.is_pending() or now.state.is_running()):
        return False
    began = now.run_count - run.run_count
    return began > 1 or (began == 1 and not now.state.is_running())


def report_crashes_once() -> None:
    """Has the workers of this process keep reports to themselves that are of an earlier start."""
    report = ProcessWorker._propose_crashed_state

    async def once(self: Any, flow_run: FlowRun, message: str, client: PrefectClient | None = None) -> None:
        try:
            earlier = await of_an_earlier_start(flow_run, client or self.client)
        except Exception:  # a run that was deleted, a server that is away: Prefect's own report copes with either
            earlier = False
        if not earlier:
            await report(self, flow_run, message, client)

    ProcessWorker._propose_crashed_state = once  # type: ignore[method-assign]


def main() -> None:
    if len(sys.argv) not in (2, 3):
        raise SystemExit("usage: python -m infra.worker POOL [NAME]")
    pool, *name = sys.argv[1:]
    report_crashes_once()
    sys.argv = ["prefect", "worker", "start", "--pool", pool, "--type", "process", "--name",
                *(name or [f"{pool}@{socket.gethostname()}"])]
    app()


if __name__ == "__main__":
    main()
