"""Processes that end with their parent, also where that was faster."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import flows.process
from mlops.processes import die_with_parent

# A child that asks for its death signal only once its parent is gone, and says so.
LATE = """
import os, sys, time
from mlops.processes import die_with_parent
parent = os.getpid()
if os.fork() == 0:
    while os.getppid() == parent:
        time.sleep(0.01)
    if sys.argv[1] == "known":
        die_with_parent(parent)
    else:
        die_with_parent()
    print("goes on", flush=True)
"""


@pytest.mark.parametrize(("knows", "said"), [("known", ""), ("unknown", "goes on\n")])
def test_a_parent_that_has_ended_before_is_noticed_where_it_is_known(knows: str, said: str) -> None:
    done = subprocess.run([sys.executable, "-c", LATE, knows], capture_output=True, text=True, check=True,
                          cwd=Path(__file__).parents[2])
    assert done.stdout == said  # the pipe closes when the child has ended


def test_a_living_parent_is_no_reason_to_end() -> None:
    pid = os.fork()
    if pid == 0:
        die_with_parent(os.getppid())
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


def test_a_signal_that_was_lost_is_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefect's exception is lost where asyncio was in a callback: the flow of a killed command went on for ever."""
    monkeypatch.setattr(flows.process, "AGAIN_SECONDS", 0.01)
    signals: list[int] = []

    class Ended(BaseException):
        pass

    def swallowed(number: int, frame: object) -> None:
        signals.append(number)
        if len(signals) == 3:
            raise Ended

    before = signal.signal(signal.SIGTERM, swallowed)
    try:
        with pytest.raises(Ended):
            flows.process.insist_without(parent=-1)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert signals == [signal.SIGTERM] * 3
