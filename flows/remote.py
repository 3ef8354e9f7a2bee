"""A stage on another machine: the worker of another pool runs it at the exact revision and sends back what it made.

The controller commits the files that git tracks as they are now, on no branch, pushes the commit to
`refs/instructflow/...` of the git remote and the stage's inputs to DVC's remote, and starts the deployment
`remote-stage/gpu`. The worker, which takes revisions of its own repositories only, checks that one out with git
credentials of its own, pulls the inputs, runs `dvc repro --single-item`, pushes the outputs and a commit with dvc.lock
and metrics. The controller takes these over, and nothing else; `dvc repro` there then finds the stage done.
"""

import asyncio
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flows.environment import private_notes

# isort: split
from prefect import State, flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.deployments.flow_runs import arun_deployment
from prefect.runtime import flow_run
from prefect.states import Completed, Failed
from prefect.tasks import Task

from flows.stages import StageFailed, repro, training_slot
from flows.summary import StageResult
from mlops.config.loader import PARAMS_FILE, PROFILES_DIR, read_yaml
from mlops.config.stage_graph import declared_stages, paths
from mlops.tracking.credentials import without_login
from rlhf.errors import UserError

DEPLOYMENT = "remote-stage/gpu"
LOCK = "dvc.lock"
REFS = "refs/instructflow"
FOLDER = Path("scratch/remote")
WAITS = (5.0, 15.0, 60.0, 300.0)  # seconds between attempts to reach git's or DVC's remote
AWAY = re.compile(r"connect|timed? ?out|unreachable|refused|reset by peer|temporar|unavailable|\b50[234]\b", re.I)
STAGE = re.compile(r"\w+(@\w[\w.-]*)?")
REVISION = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")
REF = re.compile(rf"{REFS}/[0-9a-f]{{12}}/({STAGE.pattern})")
ALLOWED = "INSTRUCTFLOW_REPOSITORIES"  # a worker's variable: addresses that it runs, besides its own checkout's origin
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
    if unknown := unknown_to_git(stage, root):
        raise UserError(f"{unknown[0]}: {stage} reads it and git does not track it, so a worker would not get it "
                        f"({len(unknown)} such files); `git add` what may be sent")
    inputs = inputs_of(stage, root)
    if inputs:
        _run(["dvc", "push", "--", *inputs], root)
    revision = snapshot(root, f"{run_name}: before {stage}")
    ref = f"{REFS}/{hashlib.sha256(run_name.encode()).hexdigest()[:12]}/{stage}"
    _run(["git", "push", "--quiet", "--force", "--", "origin", f"{revision}:{ref}"], root)
    return {"stage": stage, "repository": without_login(origin(root)), "ref": ref, "revision": revision,
            "run_name": run_name}


def origin(root: Path) -> str:
    """The address of the git remote `origin`."""
    return _run(["git", "remote", "get-url", "origin"], root).stdout.strip()


def unknown_to_git(stage: str, root: Path) -> list[str]:
    """Files that the stage's declaration names, code or parameters, and that git neither tracks nor ignores."""
    declared = declared_stages(root)[stage]
    profile = f"{PROFILES_DIR}/{read_yaml(root / PARAMS_FILE).get('profile')}.yaml"
    names = ["dvc.yaml", "data.dvc", ".dvc/config", PARAMS_FILE, profile, *paths(declared.get("deps", []))]
    found = _run(["git", "ls-files", "-z", "--others", "--exclude-standard", "--",
                  *(f":(literal){name}" for name in names)], root).stdout
    return sorted(name for name in found.split("\0") if name)


def inputs_of(stage: str, root: Path) -> list[str]:
    """The stage's dependencies that DVC keeps: outputs of other stages, and the datasets that data.dvc pins."""
    stages = declared_stages(root)
    produced = {out for other in stages.values() for out in paths(other.get("outs", []))} | {"data"}
    found = []
    files = [name for item in stages[stage].get("params", []) if isinstance(item, dict) for name in item]
    for dep in [*files, *paths(stages[stage].get("deps", []))]:
        if any(dep == out or dep.startswith(f"{out}/") for out in produced):
            found.append(dep)
        found += sorted(out for out in produced if out.startswith(f"{dep}/"))  # a folder of several stages' outputs
    return found


def snapshot(root: Path, message: str, only: Sequence[str] = ()) -> str:
    """A commit on no branch of dvc.lock and the tracked files as they are now, or of dvc.lock and the files `only`;
    index and HEAD stay as they are."""
    folder = Path(_run(["git", "rev-parse", "--absolute-git-dir"], root).stdout.removesuffix("\n"))
    index = folder / "instructflow-index"
    try:
        if (folder / "index").exists():
            shutil.copyfile(folder / "index", index)
        environment = {**AUTHOR, "GIT_INDEX_FILE": str(index)}
        if not only:
            _run(["git", "add", "--update"], root, environment)
        lock = [LOCK] if (root / LOCK).exists() else []  # what is done already, also where it is not committed yet
        if names := [*lock, *only]:
            _run(["git", "add", "--force", "--", *(f":(literal){name}" for name in names)], root, environment)
        tree = _run(["git", "write-tree"], root, environment).stdout.strip()
        return _run(["git", "commit-tree", tree, "-p", "HEAD", "-m", message], root, environment).stdout.strip()
    finally:
        index.unlink(missing_ok=True)


def kept_by_git(stage: str, root: Path) -> list[str]:
    """What the stage makes and DVC does not keep: dvc.lock and the metrics."""
    declared = declared_stages(root)[stage]
    entries = [item for kind in ("outs", "metrics", "plots") for item in declared.get(kind, [])]
    return [LOCK, *(name for item in entries if isinstance(item, dict) for name, options in item.items()
                    if (options or {}).get("cache") is False)]


def take_over(stage: str, root: Path, ref: str) -> None:
    """Takes dvc.lock and metrics from the worker's commit, and the outputs from DVC's remote.

    Raises UserError where the commit changes anything else: nothing is taken then.
    """
    _run(["git", "fetch", "--quiet", "--", "origin", f"{ref}-done"], root)
    commit = _run(["git", "rev-parse", "FETCH_HEAD"], root).stdout.strip()
    changed = _run(["git", "diff", "--name-only", "-z", f"{commit}^", commit], root).stdout.split("\0")
    names = [name for name in changed if name]
    if others := sorted(set(names) - set(kept_by_git(stage, root))):
        raise UserError(f"{stage}: the worker's commit {commit[:12]} changes {others[0]}, which the stage does not "
                        "make; nothing is taken over")
    if names:
        _run(["git", "restore", f"--source={commit}", "--worktree", "--", *(f":(literal){name}" for name in names)],
             root)
    _run(["dvc", "pull", "--force", "--", stage], root)


# --- the worker -------------------------------------------------------------------------------------------------


@flow(persist_result=False)
async def remote_stage(stage: str, repository: str, ref: str, revision: str, run_name: str) -> State[Any]:
    """Runs one stage of another machine's run in a clone of its own; taken up again, it goes on from its checkpoint.

    Args:
        stage: The stage of dvc.yaml.
        repository: The git repository that has the revision; one that this worker is told to run.
        ref: The reference that the revision was pushed to.
        revision: The commit to run.
        run_name: The run's name in Prefect and MLflow.
    """
    try:
        check_request(stage, repository, ref, revision, allowed_repositories(Path()))
    except UserError as error:
        return Failed(message=str(error), data=error)
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


def allowed_repositories(checkout: Path) -> list[str]:
    """The addresses of which this worker runs revisions: of its own checkout's origin, and those that it is told."""
    own = _run(["git", "remote", "get-url", "origin"], checkout, check=False).stdout.strip()
    return [without_login(address).rstrip("/") for address in [own, *os.environ.get(ALLOWED, "").split()] if address]


def check_request(stage: str, repository: str, ref: str, revision: str, allowed: Sequence[str]) -> None:
    """Raises UserError for what no controller sends, and for a repository that the worker is not told to run.

    Whoever may start a deployment sends these; none of them may be read as an option by git or DVC.
    """
    if not STAGE.fullmatch(stage):
        raise UserError(f"{stage!r}: not the name of a stage")
    if not REVISION.fullmatch(revision):
        raise UserError(f"{stage}: {revision!r} is not the whole name of a commit")
    if (found := REF.fullmatch(ref)) is None or found[1] != stage:
        raise UserError(f"{stage}: {ref!r} is not a reference of the form {REFS}/RUN/{stage}")
    if repository.rstrip("/") not in allowed:
        raise UserError(f"{stage}: this worker does not run {without_login(repository)!r}; it runs "
                        f"{', '.join(allowed) or 'none'}. {ALLOWED}, set where the worker starts, adds others")


def prepare(root: Path, repository: str, ref: str, revision: str, stage: str) -> None:
    """The clone at exactly this revision, with the stage's inputs."""
    if not (root / ".git").exists():
        root.parent.mkdir(parents=True, exist_ok=True)
        _run(["git", "clone", "--quiet", "--no-checkout", "--", repository, str(root)], root.parent)
    _run(["git", "fetch", "--quiet", "--force", "--", repository, f"{ref}:{ref}"], root)
    _run(["git", "checkout", "--quiet", "--force", "--detach", revision, "--"], root)
    local = Path(".dvc/config.local")  # the worker's own credentials for DVC's remote
    if local.exists():
        shutil.copyfile(local, root / local)
    if inputs := inputs_of(stage, root):
        _run(["dvc", "pull", "--force", "--", *inputs], root)


def send_back(root: Path, ref: str, stage: str) -> None:
    """Outputs and run cache to DVC's remote, dvc.lock and metrics as a commit beside the one that was run."""
    _run(["dvc", "push", "--run-cache", "--", stage], root)
    made = [name for name in kept_by_git(stage, root) if name != LOCK and (root / name).exists()]
    commit = snapshot(root, f"{stage}: done", made)
    _run(["git", "push", "--quiet", "--force", "--", "origin", f"{commit}:{ref}-done"], root)


def _run(command: list[str], where: Path, environment: Mapping[str, str] | None = None,
         check: bool = True) -> subprocess.CompletedProcess[str]:
    """Raises UserError with the command's own reason; a store that cannot be reached is tried again for a while."""
    program = command[0] if command[0] != "dvc" else str(Path(sys.executable).with_name("dvc"))
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0", **(environment or {})}
    if command[0] == "dvc":
        environment |= private_notes(where)
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
