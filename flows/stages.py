"""One stage of dvc.yaml as a Prefect task: `await stage_task("sft")("sft", root, run_name)` runs it by DVC."""

import asyncio
import json
import logging
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from flows.environment import private_notes

# isort: split
import psutil
from prefect import State, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import TaskRun
from prefect.concurrency.asyncio import concurrency
from prefect.states import Failed
from prefect.tasks import Task

from flows import dvc_files
from flows.artifacts import progress_of
from flows.process import run_lines
from flows.server import server_lasts
from flows.summary import StageResult
from flows.workspaces import tracking_of
from mlops.config import record
from mlops.config.loader import load_params
from mlops.config.stage_graph import PIN, declared_stages, paths
from mlops.tracking.own_store import champion_lost
from rlhf.errors import FULL, UserError, without_secrets
from rlhf.files import write_json

ON_GPU = frozenset({"pretrain", "sft", "rm", "judge", "ppo", "evaluate", "promote", "round_collect", "round_rm",
                    "round_ppo",
                    "round_scores"})
TRAINING_LIMIT = "training"  # Prefect's global concurrency limit: trainings at once on this server's machines
RETRY_DELAYS = [10.0, 60.0, 300.0]
NO_RETRY = (2, 3, 4, 255)  # a user's mistake, a full disk, a training gone wrong, DVC: it would fail again
FULL_BYTES = 4 * 2**20  # a disk with less left counts as full
CHATTER = re.compile(r"(To track the changes|To enable auto staging|\t|Use `dvc push`|(Updat|Generat)ing lock file"
                     r"|Data and pipelines are up to date|WARNING: (Process .* in RWLock-file|'[^']*' is empty))")


class StageFailed(Exception):
    """A stage ended with an error. The message is the stage's own line, `code` its exit code (255: DVC's own)."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(without_secrets(message))
        self.code = code


def stage_task(stage: str, hours: float | None = None) -> Task[..., Any]:
    """The Prefect task of one stage, named after it; ended where it takes longer than `hours`.

    The tag is there for a server's limits. Without a server it would cost: Prefect asks for the limit just when its own
    database is being written, is refused, and asks again two seconds later.
    """
    tags = {"gpu"} if stage.partition("@")[0] in ON_GPU and server_lasts() else set()
    return run_stage.with_options(name=stage, task_run_name=stage, tags=tags,
                                  retries=len(RETRY_DELAYS), retry_delay_seconds=RETRY_DELAYS,
                                  timeout_seconds=None if hours is None else hours * 3600)


async def worth_a_retry(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    """Yes for a crash or a kill, since the stage resumes from its checkpoint; no where it would fail again."""
    error = await state.aresult(raise_on_failure=False)
    return isinstance(error, StageFailed) and error.code not in NO_RETRY


@task(retry_condition_fn=worth_a_retry, retry_jitter_factor=0.5, cache_policy=NO_CACHE, persist_result=False)
async def run_stage(stage: str, root: Path, run_name: str) -> StageResult | State[Any]:
    """`repro` as a task: a failure has the stage's own line as its message."""
    return await repro(stage, root, run_name)


async def repro(stage: str, root: Path, run_name: str) -> StageResult | State[Any]:
    """Runs one stage by DVC, each line to the log."""
    logger = get_run_logger()
    output: list[str] = []

    def on_line(text: str) -> None:
        output.append(text)
        show(text)
        logger.log(logging.DEBUG if CHATTER.match(text) else logging.INFO, "%s", text)

    start = time.monotonic()
    dvc = str(Path(sys.executable).with_name("dvc"))
    again = []
    if stage == "promote" and champion_lost(root, load_params(root).stages.promote.registry):
        logger.warning("MLflow's registry lacks the champion that metrics/promote.json names: promote runs again")
        again = ["--force"]
    await asyncio.to_thread(dvc_files.keep, root)
    async with progress_of(stage) as show:
        code = await run_lines([dvc, "--wait-for-lock", "repro", "--single-item", *again, stage],
                               cwd=root, env=child_env(run_name, root) | tracking_of(root), on_line=on_line)
    if code:
        failure = disk_full(stage, root, output) or read_failure(stage, code, output)
        return Failed(message=str(failure), data=failure)  # returned, not raised: Prefect would print a traceback
    how = how_it_went(output)
    if how == "from cache":
        try:
            await asyncio.to_thread(check_restored, stage, root)
        except UserError as error:
            return Failed(message=str(error), data=error)
    return StageResult(stage, time.monotonic() - start, how)


def check_restored(stage: str, root: Path) -> None:
    """Raises UserError where DVC has restored other bytes than dvc.lock or data.dvc record: it does not read what it
    restores, and no later stage may read this output."""
    outs = ["data"] if stage == PIN else paths(declared_stages(root)[stage].get("outs", []))
    record.check(root, outs)


@asynccontextmanager
async def training_slot() -> AsyncIterator[None]:
    """Waits for one of the server's slots for training, where the server has that limit (infra/setup.py makes it).

    A slot whose process was killed is free again a minute later.
    """
    if not server_lasts():
        yield
        return
    async with concurrency(TRAINING_LIMIT, lease_duration=60):
        yield


def child_env(run_name: str, root: Path) -> dict[str, str]:
    """The environment of dvc and of the stage: this Python first in PATH, where dvc.yaml's `python` is looked up."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {**os.environ, **private_notes(root), "PATH": path, "PYTHONUNBUFFERED": "1",
            "INSTRUCTFLOW_RUN_NAME": run_name}


def disk_full(stage: str, root: Path, output: Sequence[str] = ()) -> StageFailed | None:
    """The failure of a stage where the disk is full, or was by what DVC said: it may say anything but that."""
    said = any(text.startswith("ERROR: ") and FULL.search(text) for text in output)
    if not said and shutil.disk_usage(root).free > FULL_BYTES:
        return None
    return StageFailed(f"{stage}: no space left on the disk of {root}; free some and run the same command again", 3)


def mend_dvc_lock(root: Path) -> None:
    """Makes DVC's files such as it can work with: dvc.lock and data.dvc (flows/dvc_files.py), and its list of locks.

    DVC refuses a list that a full disk cut off, and waits for whatever process has the number of one that was killed.
    """
    dvc_files.mend(root)
    path = root / ".dvc" / "tmp" / "rwlock"
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        if set(held) - {"read", "write"}:
            raise ValueError("not DVC's")
        left = {"write": {name: holder for name, holder in held.get("write", {}).items() if _is_dvc(holder["pid"])},
                "read": {name: [holder for holder in holders if _is_dvc(holder["pid"])]
                         for name, holders in held.get("read", {}).items()}}
        left["read"] = {name: holders for name, holders in left["read"].items() if holders}
    except FileNotFoundError:
        return
    except (ValueError, TypeError, KeyError, AttributeError):
        path.unlink()
        return
    if left != {"write": held.get("write", {}), "read": held.get("read", {})}:
        write_json(path, left)


def _is_dvc(pid: int) -> bool:
    """Whether a process of this number lives and is DVC's."""
    try:
        return any("dvc" in Path(part).name for part in psutil.Process(pid).cmdline())
    except psutil.Error:
        return False


def how_it_went(output: list[str]) -> str:
    """From DVC's words: ran, from cache (outputs checked out again), up to date."""
    if any(text.endswith("didn't change, skipping") for text in output):
        return "up to date"
    if any(text.endswith("skipping run, checking out outputs") for text in output):
        return "from cache"
    return "ran"


def read_failure(stage: str, code: int, output: list[str]) -> StageFailed:
    """Finds the stage's own last line and exit code in what DVC printed ("ERROR: failed to reproduce ...")."""
    errors = [index for index, text in enumerate(output) if text.startswith("ERROR: ")]
    complaint = output[errors[-1]] if errors else ""
    if (exited := re.search(r"exited with (-?\d+)$", complaint)) is None:
        if code < 0:
            return StageFailed(f"{stage}: dvc was ended by {signal.Signals(-code).name}", code)
        reason = complaint or (output[0] if output else "no message")
        reason = re.sub(r"^ERROR: (failed to reproduce '.*?':\s+)?", "", reason)
        return StageFailed(f"{stage}: {reason}", code)
    own_code = int(exited[1])
    if own_code < 0:
        return StageFailed(f"{stage}: ended by {signal.Signals(-own_code).name}", own_code)
    own_lines = [text for text in output[: errors[-1]] if not text.startswith(("Running stage", "> "))]
    last = next((text for text in reversed(own_lines) if text.startswith(f"{stage}: ")),
                own_lines[-1] if own_lines else "no message")
    return StageFailed(f"{stage}: {last.removeprefix(f'{stage}: ')}", own_code)
