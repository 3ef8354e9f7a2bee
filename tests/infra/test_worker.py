"""When a worker keeps a report of a crash to itself. That Prefect makes two is seen by tests/infra/test_drills.py."""

import asyncio
from typing import Any
from uuid import UUID

import pytest
from prefect.client.schemas.objects import FlowRun, State, StateType

from infra.worker import of_an_earlier_start, report_crashes_once


def run(count: int, kind: StateType, name: str = "") -> FlowRun:
    return FlowRun(flow_id=UUID(int=1), run_count=count,
                   state=State(type=kind, name=name or kind.value.title()))


class Client:
    def __init__(self, now: FlowRun) -> None:
        self.now = now

    async def read_flow_run(self, _id: Any) -> FlowRun:
        return self.now


@pytest.mark.parametrize(("now", "earlier"), [
    (run(1, StateType.PENDING), False),                        # its process died before the flow began
    (run(2, StateType.RUNNING), False),                        # it died, and nobody has said so yet
    (run(2, StateType.SCHEDULED, "Taken up again"), True),     # somebody has, and it waits for its next start
    (run(2, StateType.PENDING), True),                         # its next start is under way
    (run(3, StateType.RUNNING), True),                         # and has begun
    (run(2, StateType.CRASHED), False),                        # Prefect refuses a second one itself
    (run(2, StateType.CANCELLING), False),
])
def test_a_report_of_an_earlier_start(now: FlowRun, earlier: bool) -> None:
    taken = run(1, StateType.SCHEDULED)
    assert asyncio.run(of_an_earlier_start(taken, Client(now))) is earlier  # type: ignore[arg-type]


def test_a_worker_keeps_such_a_report_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.workers.process import ProcessWorker

    reported: list[str] = []

    async def report(worker: Any, flow_run: FlowRun, message: str, client: Any = None) -> None:
        reported.append(message)

    monkeypatch.setattr(ProcessWorker, "_propose_crashed_state", report)
    report_crashes_once()

    async def both() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Client, "read_flow_run", None)  # it was deleted
            await ProcessWorker._propose_crashed_state(
                None, run(1, StateType.SCHEDULED), "deleted", Client(run(1, StateType.PENDING)))  # type: ignore[arg-type]
        for now in (run(2, StateType.RUNNING), run(2, StateType.PENDING)):
            await ProcessWorker._propose_crashed_state(
                None, run(1, StateType.SCHEDULED), str(now.state and now.state.type), Client(now))  # type: ignore[arg-type]

    asyncio.run(both())
    assert reported == ["deleted", str(StateType.RUNNING)]
