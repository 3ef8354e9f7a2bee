"""The flow against a checkout of shell stages and a real Prefect server: order, retries, cancelling, parameters."""

import asyncio
import fcntl
import hashlib
import io
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.sorting import FlowRunSort

import flows.stages
from flows.execution import use_profile
from flows.process import run_lines
from flows.stages import StageFailed, mend_dvc_lock, read_failure
from flows.summary import Summary, clock
from flows.terminal import BarHandler
from mlops.config.stage_graph import pipeline_stages
from rlhf.errors import UserError
from tests.flows.checkout import FILES, INGEST, REPOSITORY, SFT_AND_PPO, Checkout, alive

# --- order and cache ------------------------------------------------------------------------------------------------


async def _recorded() -> tuple[FlowRun, dict[str, set[str]], str]:
    """The newest flow run in the server, its tasks with their tags, its summary."""
    async with get_client() as client:
        newest = (await client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=1))[0]
        tasks = {task.name: set(task.tags) for task in await client.read_task_runs() if task.flow_run_id == newest.id}
        artifacts = [item for item in await client.read_artifacts()
                     if item.flow_run_id == newest.id and item.key == "pipeline-summary"]
    return newest, tasks, str(artifacts[0].data) if artifacts else ""


def test_a_list_of_locks_that_a_full_disk_cut_off_stops_no_later_run(checkout: Checkout) -> None:
    assert isinstance(checkout.run(), Summary)
    checkout.write(".dvc/tmp/rwlock", '{"/some/where/models/sft": {"write": {"pid": 12')
    assert isinstance(checkout.run(), Summary)


@pytest.mark.parametrize("held", [
    '{"write": {"models/sft": {"pid": 999999999, "cmd": "dvc repro"}}, "read": {}}',
    '{"write": {"models/sft": {"pid": 1, "cmd": "dvc repro"}}, "read": {"sft.sh": [{"pid": 1, "cmd": "dvc repro"}]}}',
    '{"local": {}}', '{"write": {"models/sft": 3}}', "[]", "",
])
def test_a_lock_of_a_process_that_is_gone_stops_no_later_run(checkout: Checkout, held: str) -> None:
    """The number of a killed process may be another one's by now: here the machine's first."""
    checkout.write(".dvc/tmp/rwlock", held)
    assert isinstance(checkout.run(), Summary)


def test_the_lock_of_a_dvc_that_lives_stays(checkout: Checkout) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()", "dvc"], stdin=subprocess.PIPE) as other:
        held = {"write": {"models/sft": {"pid": other.pid, "cmd": "dvc repro"}}, "read": {}}
        checkout.write(".dvc/tmp/rwlock", json.dumps(held))
        mend_dvc_lock(checkout.root)
        assert json.loads((checkout.root / ".dvc/tmp/rwlock").read_text()) == held
        other.kill()


def test_a_full_disk_is_named_whatever_dvc_says(checkout: Checkout, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout.write("sft.sh", "exit 1\n")
    usage = shutil.disk_usage(checkout.root)
    monkeypatch.setattr("flows.stages.shutil.disk_usage", lambda path: usage._replace(free=4096))
    failed = checkout.run()
    assert str(failed) == (f"sft: no space left on the disk of {checkout.root}; free some and run the same command "
                           "again")
    assert failed.code == 3
    assert checkout.order() == ["sft"]  # no retry


VALIDATE = """
  validate:
    cmd: mkdir -p reports && cp findings.json reports/validate.json && sh verdict.sh
    deps: [verdict.sh, findings.json]
"""


async def _findings() -> list[tuple[str, Any]]:
    async with get_client() as client:
        newest = (await client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=1))[0]
        return [(str(item.description), item.data) for item in await client.read_artifacts()
                if item.flow_run_id == newest.id and item.key == "data-findings"]


def test_the_data_checks_findings_are_an_artifact_also_where_they_stop_the_run(checkout: Checkout) -> None:
    findings = [{"dataset": "sft", "row": 3, "rule": "filled_prompt", "message": "no prompt is blank"}]
    checkout.write("dvc.yaml", "stages:" + VALIDATE)
    checkout.write("findings.json", json.dumps(findings))
    checkout.write("verdict.sh", "echo 'validate: data/sft.jsonl: row 3' >&2; exit 2\n")
    assert isinstance(checkout.run(), StageFailed)
    (description, data), = asyncio.run(_findings())
    assert description.startswith("1 findings of the data checks: filled_prompt 1.")
    assert (json.loads(data) if isinstance(data, str) else data) == findings
    checkout.write("findings.json", "[]")
    checkout.write("verdict.sh", "exit 0\n")
    assert isinstance(checkout.run(), Summary)
    assert asyncio.run(_findings())[0][0].startswith("0 findings of the data checks: none.")
    assert isinstance(checkout.run(), Summary)
    assert asyncio.run(_findings()) == []  # up to date: nothing was checked


def test_runs_the_stages_in_order_and_only_once(checkout: Checkout) -> None:
    checkout.write("dvc.yaml", "stages:" + INGEST + SFT_AND_PPO)
    first = checkout.run()
    assert isinstance(first, Summary)
    assert checkout.order() == ["ingest", "sft", "ppo"]
    assert [(result.stage, result.how) for result in first.results] == [
        ("ingest", "ran"), ("data.dvc", "ran"), ("sft", "ran"), ("ppo", "ran")]
    assert first.numbers["sft"] == "valid_loss=0.5"

    flow_run, tasks, summary = asyncio.run(_recorded())
    while len(tasks) < 4:  # the server takes in task runs a moment later
        time.sleep(0.5)
        flow_run, tasks, summary = asyncio.run(_recorded())
    assert tasks == {"ingest": set(), "data.dvc": set(), "sft": {"gpu"}, "ppo": {"gpu"}}
    assert (checkout.root / "data" / "run_name").read_text().strip() == flow_run.name
    assert "valid_loss=0.5" in summary

    (checkout.root / "models" / "ppo").unlink()
    second = checkout.run()
    assert checkout.order() == ["ingest", "sft", "ppo"]
    assert [result.how for result in second.results] == ["up to date", "up to date", "up to date", "from cache"]


def test_a_missed_gate_ends_in_a_state_of_its_own(checkout: Checkout) -> None:
    checkout.write("promote.sh", """mkdir -p metrics; echo '{"promote/passed": 0.0, "promote/missed": 1, "reasons":
        ["win rate 0.48, at least 0.5: missed by 0.02"]}' > metrics/promote.json\n""")
    checkout.write("dvc.yaml", "stages:" + SFT_AND_PPO + """
  promote:
    cmd: echo promote >> order.log && sh promote.sh
    deps: [promote.sh, models/ppo]
    metrics: [{metrics/promote.json: {cache: false}}]
""")
    done = checkout.command_line()
    assert done.returncode == 5
    assert "promote" in done.stdout  # the table of the complete run
    assert done.stderr.splitlines()[-1] == "not promoted: win rate 0.48, at least 0.5: missed by 0.02"
    run, _, summary = asyncio.run(_recorded())
    assert (run.state_name, run.state_type) == ("Not promoted", "COMPLETED")
    assert run.state
    assert "missed by 0.02" in str(run.state.message)
    assert "| promote |" in summary
    assert checkout.order() == ["sft", "ppo", "promote"]
    assert checkout.command_line().returncode == 5  # up to date, and still not promoted
    checkout.write("promote.sh", "echo '{\"reasons\": []}' > metrics/promote.json\n")
    assert checkout.command_line().returncode == 0


PROMOTE = """
  promote:
    cmd:
    - echo promote >> order.log
    - mkdir -p metrics models/promoted
    - cp passed.json metrics/promote.json
    - cp passed.json models/promoted/config.json
    metrics: [{metrics/promote.json: {cache: false}}]
"""


def test_a_registry_that_lost_the_champion_gets_it_again(checkout: Checkout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    checkout.write("dvc.yaml", "stages:" + PROMOTE)
    checkout.write("passed.json", '{"promote/passed": 1.0, "reasons": []}')
    for _ in range(2):  # the shell stage registers nothing
        assert isinstance(checkout.run(), Summary)
    assert checkout.order() == ["promote", "promote"]
    checkout.write("profiles/small.yaml", "promote: {registry: ''}\n")
    assert isinstance(checkout.run(), Summary)
    assert checkout.order() == ["promote", "promote"]


def test_order_is_that_of_dvc_yaml() -> None:
    assert pipeline_stages(REPOSITORY) == ["parameters", "ingest", "data.dvc", "validate", "pretrain", "sft", "rm",
                                           "judge", "ppo@ppo", "ppo@ppo_ptx", "evaluate", "promote"]


# --- failures ---------------------------------------------------------------------------------------------------------


def test_a_users_mistake_is_one_line_and_no_retry(checkout: Checkout) -> None:
    checkout.write("sft.sh", "echo 'sft: data/sft.jsonl: row 3: no prompt' >&2; exit 2\n")
    done = checkout.command_line()
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "sft: data/sft.jsonl: row 3: no prompt"
    assert "Traceback" not in done.stderr + done.stdout
    assert checkout.order() == ["sft"]


def test_a_crash_is_tried_again(checkout: Checkout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flows.stages, "RETRY_DELAYS", [0])
    checkout.write("sft.sh", "[ -e tried ] || { touch tried; exit 1; }\nmkdir -p models && echo 1 > models/sft\n")
    assert isinstance(checkout.run(), Summary)
    assert checkout.order() == ["sft", "sft", "ppo"]


def test_a_second_crash_fails_the_flow(checkout: Checkout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flows.stages, "RETRY_DELAYS", [0])
    checkout.write("sft.sh", "echo 'ValueError: loss is nan'; exit 1\n")
    error = checkout.run()
    assert isinstance(error, StageFailed)
    assert str(error) == "sft: ValueError: loss is nan"
    state = asyncio.run(_recorded())[0].state
    assert state is not None
    assert (state.name, state.message) == ("Failed", str(error))
    assert checkout.order() == ["sft", "sft"]


@pytest.mark.parametrize(("code", "output", "message", "own_code"), [
    (255, ["> python", "rm: row 3: K = 2", "bye", "ERROR: failed to reproduce 'rm': failed to run: x, exited with 2"],
     "rm: row 3: K = 2", 2),
    (255, ["Running stage 'rm':", "> x", "ERROR: failed to reproduce 'rm': failed to run: x, exited with 1"],
     "rm: no message", 1),
    (255, ["ERROR: failed to reproduce 'rm': failed to run: x, exited with -9"], "rm: ended by SIGKILL", -9),
    (255, ["ERROR: failed to reproduce 'data.dvc': dependency 'build/data' does not exist"],
     "rm: dependency 'build/data' does not exist", 255),
    (255, ["'./dvc.yaml' is invalid.", "in line 10"], "rm: './dvc.yaml' is invalid.", 255),
    (255, [], "rm: no message", 255),
    (-15, ["Running stage 'rm':"], "rm: dvc was ended by SIGTERM", -15),
])
def test_reads_the_stages_own_line(code: int, output: list[str], message: str, own_code: int) -> None:
    failure = read_failure("rm", code, output)
    assert isinstance(failure, StageFailed)
    assert (str(failure), failure.code) == (message, own_code)


# --- cancelling -------------------------------------------------------------------------------------------------------


def test_cancelling_ends_the_whole_tree(checkout: Checkout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.process.GRACE_SECONDS", 1.0)
    checkout.write("sft.sh", "sleep 3600 & echo $! > child.pid\n"
                   "sh -c 'trap \"\" TERM; echo $$ > deaf.pid; sleep 3600'\n")
    pids = [checkout.root / "child.pid", checkout.root / "deaf.pid"]

    async def cancel() -> None:
        run = asyncio.create_task(checkout.start())
        while not all(pid.exists() and pid.read_text() for pid in pids):
            await asyncio.sleep(0.1)
            assert not run.done()
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run

    asyncio.run(cancel())
    assert not any(alive(int(pid.read_text())) for pid in pids)
    assert checkout.order() == ["sft"]

    checkout.write("sft.sh", "mkdir -p models && echo 1 > models/sft\n")  # nothing of it locks the next run out
    assert isinstance(checkout.run(), Summary)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_ctrl_c_and_kill_end_the_whole_tree(checkout: Checkout, number: signal.Signals) -> None:
    """Ctrl-C reaches the whole group of the command, `kill -9` only the command itself."""
    pid = checkout.root / "sft.pid"
    checkout.write("sft.sh", f"echo $$ > {pid.name}; sleep 3600\n")
    process = checkout.start_command_line()
    while not (pid.exists() and pid.read_text()):
        time.sleep(0.1)
        assert process.poll() is None
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    _, errors = process.communicate(timeout=600)  # the pipes close with the last process of the flow
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert errors.splitlines()[-1] == "stopped; the same command goes on from the last checkpoint"
    assert "Traceback" not in errors
    assert not alive(int(pid.read_text()))
    if number == signal.SIGINT:  # somebody stopped it: that is no crash
        run, _, _ = asyncio.run(_recorded())
        assert (run.state_name, "Crash" in errors) == ("Cancelled", False)


def test_an_impatient_second_ctrl_c_breaks_nothing_off(checkout: Checkout) -> None:
    """It ended the telling of the first in tracebacks, and the run stayed a crash."""
    pid = checkout.root / "sft.pid"
    checkout.write("sft.sh", f"trap 'sleep 1; exit 1' TERM; echo $$ > {pid.name}; sleep 3600 & wait\n")
    process = checkout.start_command_line()
    while not (pid.exists() and pid.read_text()):
        time.sleep(0.1)
        assert process.poll() is None
    for _ in range(3):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.2)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "stopped; the same command goes on from the last checkpoint"
    assert "Traceback" not in errors
    run, _, _ = asyncio.run(_recorded())
    assert run.state_name == "Cancelled"


def test_ctrl_c_during_the_imports_is_one_line(checkout: Checkout) -> None:
    process = checkout.start_command_line()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not children.read_text():  # the command forks, and both import on
        assert process.poll() is None
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=600)
    assert (process.returncode, "Traceback" in errors) == (130, False)
    assert errors.splitlines()[-1].startswith("stopped")


@pytest.mark.parametrize("file", ["models/sft", "models/ppo"])
def test_what_dvc_restores_is_checked_also_where_no_stage_reads_it(checkout: Checkout, file: str) -> None:
    """A rotten byte in the cache became the last model of a run that said Completed."""
    checkout.write("dvc.yaml", FILES["dvc.yaml"].replace("cp models/sft models/ppo", "echo 2 > models/ppo"))
    assert isinstance(checkout.run(), Summary)
    restored = checkout.root / file
    digest = hashlib.md5(restored.read_bytes()).hexdigest()
    cached = checkout.root / ".dvc" / "cache" / "files" / "md5" / digest[:2] / digest[2:]
    cached.chmod(0o644)
    cached.write_bytes(b"rot\n")
    cached.chmod(0o444)  # as DVC keeps what it trusts
    for path in (checkout.root / "models").iterdir():
        path.unlink()
    error = checkout.run()
    assert isinstance(error, UserError)
    assert re.search(rf"^{file}: its bytes are not those that dvc.lock records: DVC's cache is damaged", str(error))


@pytest.mark.parametrize(("uri", "said"), [
    ("ftp://x", "MLflow has no store of that kind"), ("sqlite:////no such folder/x.db", "no such folder"),
    ("ftp://ada:secret@x", "ftp://…@x: MLflow has no store"),
])
def test_a_store_that_cannot_be_is_said_at_once(checkout: Checkout, monkeypatch: pytest.MonkeyPatch, uri: str,
                                                said: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    error = checkout.run()
    assert isinstance(error, UserError)
    assert said in str(error)
    assert checkout.order() == []


def test_does_not_wait_for_a_detached_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.process.DRAIN_SECONDS", 0.2)
    lines: list[str] = []
    script = """setsid sh -c 'echo $$ > detached.pid; exec sleep 3600' &
        while [ ! -s detached.pid ]; do sleep 0.1; done; printf 'a\\rb\\n\\nc'; exit 4"""
    code = asyncio.run(run_lines(["sh", "-c", script], tmp_path, os.environ, lines.append))
    assert (code, lines) == (4, ["a", "b"])
    pid = int((tmp_path / "detached.pid").read_text())
    assert alive(pid)
    os.kill(pid, signal.SIGKILL)


# --- parameters and the lock ------------------------------------------------------------------------------------------


def test_profile_changes_its_line_and_those_of_its_arms(checkout: Checkout) -> None:
    use_profile(checkout.root, "large")
    assert (checkout.root / "params.yaml").read_text() == (
        "# the seed\nseed: 1\nprofile: large  # which\narms: [ppo]\npromoted: ppo\n")
    before = (checkout.root / "params.yaml").stat()
    use_profile(checkout.root, "large")
    assert (checkout.root / "params.yaml").stat() == before


@pytest.mark.parametrize(("profile", "message"), [
    ("huge", "unknown profile 'huge': must be one of broken, large, small"),
    ("broken", "profiles/broken.yaml: unknown key ppo.bta; did you mean beta?"),
])
def test_a_wrong_profile_changes_nothing(checkout: Checkout, profile: str, message: str) -> None:
    checkout.write("profiles/broken.yaml", "ppo: {bta: 1}\n")
    done = checkout.command_line("--profile", profile)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message + "\n")
    error = checkout.run(profile)  # and the same from a deployment
    assert isinstance(error, UserError)
    assert str(error).endswith(message)
    assert (checkout.root / "params.yaml").read_text() == "# the seed\nseed: 1\nprofile: small  # which\n"
    assert checkout.order() == []


def test_a_second_run_waits(checkout: Checkout, caplog: pytest.LogCaptureFixture,
                            monkeypatch: pytest.MonkeyPatch) -> None:
    (checkout.root / "scratch").mkdir()
    tries = 0

    def counted(handle: Any, operation: int, flock: Callable[[Any, int], None] = fcntl.flock) -> None:
        nonlocal tries
        tries += 1
        flock(handle, operation)

    async def both() -> object:
        with (checkout.root / "scratch" / "run.lock").open("w") as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            monkeypatch.setattr(fcntl, "flock", counted)
            run = asyncio.create_task(checkout.start())
            while tries < 3:
                await asyncio.sleep(0.1)
            assert caplog.text.count("another run works in") == 1
            assert checkout.order() == []
        return await run

    assert isinstance(asyncio.run(both()), Summary)


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_progress_lines_become_a_bar() -> None:
    stream = io.StringIO()
    handler = BarHandler(stream=stream)
    for text in ["sft  30/120 steps  12.1/s  8 s left  loss 2.1", "a word", "Finished in state Completed()"]:
        handler.handle(logging.makeLogRecord({"msg": text, "levelno": 20}))
    assert "30/120 steps, 12.1/s  8 s left  loss 2.1" in stream.getvalue()
    assert "\na word\n" in stream.getvalue().replace("\r", "\n")


@pytest.mark.parametrize(("seconds", "text"), [(0.52, "0.5 s"), (75.4, "1:15"), (3700, "1:01:40")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text
