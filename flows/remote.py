"""A stage on another machine: the worker of another pool runs it at the exact revision and sends back what it made.

The controller commits its working tree, on no branch, pushes the commit to `refs/instructflow/...` of the git remote
and the stage's inputs to DVC's remote, and starts the deployment `remote-stage/gpu`. The worker checks that revision
out, with git credentials of its own, pulls the inputs, runs `dvc repro --single-item`, pushes the outputs and a commit
with dvc.lock and metrics. The controller takes these over; `dvc repro` there then finds the stage done.
"""

import asyncio
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flows.environment  # noqa: F401

# isort: split
from prefect import State, flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.deployments.flow_runs import arun_deployment
from prefect.runtime import flow_run
from prefect.states import Completed, Failed
from prefect.tasks import Task

from flows.stages import StageFailed, repro, training_slot
from flows.summary import StageResult
from mlops.config.stage_graph import declared_stages, paths
from mlops.tracking.credentials import without_login
from rlhf.errors import UserError

DEPLOYMENT = "remote-stage/gpu"
REFS = "refs/instructflow"
FOLDER = Path("scratch/remote")
WAITS = (5.0, 15.0, 60.0, 300.0)  # seconds between attempts to reach git's or DVC's remote
AWAY = re.compile(r"connect|timed? ?out|unreachable|refused|reset by peer|temporar|unavailable|\b50[234]\b", re.I)
AUTHOR = {"GIT_AUTHOR_NAME": "instructflow", "GIT_AUTHOR_EMAIL": "instructflow@localhost",
          "GIT_COMMITTER_NAME": "instructflow", "GIT_COMMITTER_EMAIL": "instructflow@localhost"}


# --- the controller ---------------------------------------------------------------------------------------------


@task(cache_policy=NO_CACHE, persist_result=False)
async def delegate_stage(stage: str, root: Path, run_name: str) -> StageResult | State[Any]:
    """Has the stage run by a worker of the pool of `DEPLOYMENT`, unless its outputs are here or in the caches."""
    logger = get_run_logger()
    start = time.monotonic()
    try:
        if await asyncio.to_thread(is_done, stage, root):
            return await repro(stage, root, run_name)
        logger.info("%s: sending inputs and revision", stage)
        if (url := origin(root)) != without_login(url):
            logger.warning("the git remote's address holds a login, which stays here: the worker needs git credentials "
                           "of its own (docs/security.md)")
        parameters = await asyncio.to_thread(send, stage, root, run_name)
        run = await arun_deployment(DEPLOYMENT, parameters=parameters, flow_run_name=f"{stage} of {run_name}")
        if run.state is None or not run.state.is_completed():
            raise StageFailed(f"{stage}: on the worker: {run.state.message if run.state else 'no state'}", 1)
        await asyncio.to_thread(take_over, stage, root, parameters["ref"])
        result = await repro(stage, root, run_name)
    except (UserError, StageFailed) as error:
        return Failed(message=str(error), data=error)
    if isinstance(result, StageResult) and result.how == "up to date":
        return StageResult(stage, time.monotonic() - start, "on a worker")
    return result


def delegated_task(stage: str, hours: float | None = None) -> Task[..., Any]:
    """The Prefect task of a stage on another machine; ended where it takes longer than `hours`."""
    return delegate_stage.with_options(name=stage, task_run_name=stage, tags={"gpu"},
                                       timeout_seconds=None if hours is None else hours * 3600)


def is_done(stage: str, root: Path) -> bool:
    """Whether DVC sees nothing to run."""
    return _run(["dvc", "status", "--quiet", stage], root, check=False).returncode == 0


def send(stage: str, root: Path, run_name: str) -> dict[str, str]:
    """Pushes the inputs and the revision; returns the deployment's parameters. Raises UserError: no remote, no git."""
    inputs = inputs_of(stage, root)
    if inputs:
        _run(["dvc", "push", *inputs], root)
    revision = snapshot(root, f"{run_name}: before {stage}")
    ref = f"{REFS}/{hashlib.sha256(run_name.encode()).hexdigest()[:12]}/{stage}"
    _run(["git", "push", "--quiet", "--force", "origin", f"{revision}:{ref}"], root)
    return {"stage": stage, "repository": without_login(origin(root)), "ref": ref, "revision": revision,
            "run_name": run_name}


def origin(root: Path) -> str:
    """The address of the git remote `origin`."""
    return _run(["git", "remote", "get-url", "origin"], root).stdout.strip()


def inputs_of(stage: str, root: Path) -> list[str]:
    """The stage's dependencies that DVC keeps: outputs of other stages, and the datasets that data.dvc pins."""
    stages = declared_stages(root)
    produced = {out for other in stages.values() for out in paths(other.get("outs", []))} | {"data"}
    found = []
    for dep in paths(stages[stage].get("deps", [])):
        if any(dep == out or dep.startswith(f"{out}/") for out in produced):
            found.append(dep)
        found += sorted(out for out in produced if out.startswith(f"{dep}/"))  # a folder of several stages' outputs
    return found


def snapshot(root: Path, message: str) -> str:
    """A commit of the working tree, on no branch; index and HEAD stay as they are."""
    index = root / ".git" / "instructflow-index"
    try:
        environment = {**AUTHOR, "GIT_INDEX_FILE": str(index)}
        _run(["git", "read-tree", "HEAD"], root, environment)
        _run(["git", "add", "--all"], root, environment)
        tree = _run(["git", "write-tree"], root, environment).stdout.strip()
        return _run(["git", "commit-tree", tree, "-p", "HEAD", "-m", message], root, environment).stdout.strip()
    finally:
        index.unlink(missing_ok=True)


def take_over(stage: str, root: Path, ref: str) -> None:
    """Takes dvc.lock and metrics from the worker's commit, and the outputs from DVC's remote."""
    _run(["git", "fetch", "--quiet", "origin", f"{ref}-done"], root)
    commit = _run(["git", "rev-parse", "FETCH_HEAD"], root).stdout.strip()
    changed = _run(["git", "diff", "--name-only", "-z", f"{commit}^", commit], root).stdout.split("\0")
    names = [name for name in changed if name]
    if names:
        _run(["git", "restore", f"--source={commit}", "--worktree", "--", *names], root)
    _run(["dvc", "pull", "--force", stage], root)


# --- the worker -------------------------------------------------------------------------------------------------


@flow(persist_result=False)
async def remote_stage(stage: str, repository: str, ref: str, revision: str, run_name: str) -> State[Any]:
    """Runs one stage of another machine's run in a clone of its own; taken up again, it goes on from its checkpoint.

    Args:
        stage: The stage of dvc.yaml.
        repository: The git repository that has the revision.
        ref: The reference that the revision was pushed to.
        revision: The commit to run.
        run_name: The run's name in Prefect and MLflow.
    """
    root = (FOLDER / hashlib.sha256(repository.encode()).hexdigest()[:12]).resolve()
    try:
        await asyncio.to_thread(prepare, root, repository, ref, revision, stage)
        async with training_slot():
            result = await repro(stage, root, run_name)
        if not isinstance(result, StageResult):
            return result
        await asyncio.to_thread(send_back, root, ref, stage)
    except (UserError, StageFailed) as error:
        return Failed(message=str(error), data=error)
    return Completed(message=f"{stage}: {result.how} at {revision[:12]}, run {flow_run.id}")


def prepare(root: Path, repository: str, ref: str, revision: str, stage: str) -> None:
    """The clone at exactly this revision, with the stage's inputs."""
    if not (root / ".git").exists():
        root.parent.mkdir(parents=True, exist_ok=True)
        _run(["git", "clone", "--quiet", "--no-checkout", repository, str(root)], root.parent)
    _run(["git", "fetch", "--quiet", "--force", repository, f"{ref}:{ref}"], root)
    _run(["git", "checkout", "--quiet", "--force", "--detach", revision], root)
    local = Path(".dvc/config.local")  # the worker's own credentials for DVC's remote
    if local.exists():
        shutil.copyfile(local, root / local)
    if inputs := inputs_of(stage, root):
        _run(["dvc", "pull", "--force", *inputs], root)


def send_back(root: Path, ref: str, stage: str) -> None:
    """Outputs and run cache to DVC's remote, dvc.lock and metrics as a commit beside the one that was run."""
    _run(["dvc", "push", "--run-cache", stage], root)
    commit = snapshot(root, f"{stage}: done")
    _run(["git", "push", "--quiet", "--force", "origin", f"{commit}:{ref}-done"], root)


def _run(command: list[str], where: Path, environment: Mapping[str, str] | None = None,
         check: bool = True) -> subprocess.CompletedProcess[str]:
    """Raises UserError with the command's own reason; a store that cannot be reached is tried again for a while."""
    program = command[0] if command[0] != "dvc" else str(Path(sys.executable).with_name("dvc"))
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0", **(environment or {})}
    for pause in (*WAITS, None):
        done = subprocess.run([program, *command[1:]], cwd=where, env=environment,
                              capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if not done.returncode or not check:
            break
        output = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        reason = next((text for text in output if text.startswith(("fatal: ", "ERROR: "))), output[-1])
        if pause is None or not AWAY.search(done.stderr):
            raise UserError(f"{' '.join(command[:2])}: {reason.removeprefix('ERROR: ').removeprefix('fatal: ')}")
        time.sleep(pause)
    return done
