"""Alternating rounds as a Prefect flow: collect, label, reward model, PPO, again. `python -m flows.rounds --count 3`

Each step is a stage of dvc.yaml, which unrolls params.yaml's `rounds`; between collecting and reading the labels people
work, on the terminal or in Label Studio. Started by a deployment, the run is suspended then: no process waits, and
`flows.resume_rounds` resumes it when the last label is there, after days and restarts if need be.
"""

import argparse
import asyncio
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal
from uuid import uuid4

import flows.environment  # noqa: F401
from flows.process import continue_in_own_group
from flows.server import start_server

if __name__ == "__main__":  # the server starts while this process goes on with its own imports
    continue_in_own_group()
    start_server()

# isort: split
from prefect import State, flow, get_run_logger
from prefect.artifacts import acreate_markdown_artifact, acreate_table_artifact
from prefect.flow_runs import asuspend_flow_run
from prefect.runtime import deployment, flow_run
from prefect.states import Failed
from pydantic import Field

from flows.artifacts import best_effort
from flows.execution import (
    check_params,
    close_earlier_tasks,
    ended_before,
    name_of_run,
    run_lock,
    run_program,
    run_stage_of,
    run_stages,
    run_to_end,
    use_profile,
    wait_for_upload,
)
from flows.parameters import ProfileName, Seed
from flows.stages import StageFailed, child_env, mend_dvc_lock
from flows.workspaces import FOLDER, Changes, checkout_of, fill_workspace
from mlops.config.loader import PROFILES_DIR, check_rounds, load_params
from mlops.config.stage_graph import write_rounds
from mlops.labeling.store import LABELS, Batch
from rlhf.errors import UserError, without_secrets

Count = Annotated[int, Field(ge=1, le=50)]
Labelers = Literal["simulated", "people"]
BASE = "sft"  # the rounds start from what the pipeline makes up to here
WAITING = 6  # exit code where people's labels are missing and no server can resume the run
WAIT_DAYS = 60
SHOWN = {"gold": "round/gold", "gold of SFT": "round/gold_sft", "win rate vs SFT": "round/win_rate_vs_sft",
         "RM accuracy on the policy": "round/rm_accuracy_on_policy", "KL": "round/kl"}


class Waiting(Exception):
    """Labels are missing."""


@flow(name="rounds", persist_result=False, flow_run_name=lambda: name_of_run(changes_of, "rounds"))
async def rounds(count: Count = 3, labelers: Labelers = "simulated", prompts: Annotated[int, Field(ge=1)] | None = None,
                 episodes: Annotated[int, Field(ge=1)] | None = None,
                 select: Literal["random", "disagreement"] | None = None, restart: bool | None = None,
                 profile: ProfileName | None = None,
                 seed: Seed | None = None, own_copy: bool = False, gpu_workers: bool = False,
                 root: Path | None = None) -> list[dict[str, Any]] | State[Any]:
    """Runs the rounds from what is up to date already. The profile's section `rounds` says what they are made of.

    Works in the checkout, or in a workspace (scratch/workspaces) if you change a parameter or set `own_copy`.

    Args:
        count: Rounds; with more than before, those that are done stay.
        labelers: simulated: the embedded world's, at once. people: the run waits for them.
        prompts: Prompts labeled in a round; empty: what the profile says.
        episodes: PPO's rollouts in a round; empty: what the profile says.
        select: Prompts at random, or those that reward models disagree on; empty: what the profile says.
        restart: Each round's policy starts from SFT instead of the last one; empty: what the profile says.
        profile: Which file of profiles/ to use; empty: what params.yaml says.
        seed: The seed of everything. Empty: params.yaml's.
        own_copy: Work in a workspace even if no parameter differs.
        gpu_workers: Training runs on the workers of pool gpu, at the exact revision.
        root: The checkout; empty: the folder that the deployment was made in.
    """
    checkout = (root or Path()).resolve()
    parameters = {"count": count, "prompts": prompts, "episodes": episodes, "select": select,
                  "restart": restart, "profile": profile, "seed": seed, "own_copy": own_copy}
    run_name = str(flow_run.name)
    if end := await best_effort(ended_before()):
        return end
    try:
        check_params(checkout, profile)
        workdir = workdir_of(parameters, checkout)
        async with run_lock(workdir):
            if workdir != checkout:
                await asyncio.to_thread(fill_workspace, checkout, workdir, changes_of(parameters))
            else:
                use_profile(workdir, profile)
                chosen = load_params(workdir)
                check_rounds(chosen.stages, workdir / PROFILES_DIR / f"{chosen.profile}.yaml")
                write_rounds(workdir, count)
            mend_dvc_lock(workdir)
            await best_effort(close_earlier_tasks())
            await run_stages(workdir, run_name, last=BASE)
            for key in load_params(workdir).rounds:
                await run_round(key, workdir, run_name, labelers, gpu_workers)
    except Waiting as waiting:
        if deployment.id:
            # A key counts once, and a run that was resumed too early has to be able to wait again.
            await asuspend_flow_run(timeout=WAIT_DAYS * 86_400, key=f"{waiting}: {uuid4()}")
        return Failed(name="Waiting", message=str(waiting), data=waiting)
    except (UserError, StageFailed) as error:
        return Failed(message=str(error), data=error)
    _, note = await wait_for_upload(workdir, run_name)
    if note:
        get_run_logger().warning("%s", note)
    rows = table(workdir)
    await best_effort(acreate_table_artifact(rows, key="rounds",
                                             description=f"{run_name}: measured on held-out prompts"))
    return rows


def changes_of(parameters: dict[str, Any]) -> Changes:
    """What the flow's parameters change of the checkout's. A workspace has the rounds in its name."""
    own = {name: parameters[name] for name in ("prompts", "episodes", "select", "restart")
           if parameters.get(name) is not None}
    return Changes(parameters.get("profile"), parameters.get("seed"), {"rounds": own} if own else {},
                   rounds=parameters["count"])


def workdir_of(parameters: dict[str, Any], checkout: Path) -> Path:
    """The folder that a run with these parameters works in."""
    changes = changes_of(parameters)
    if parameters.get("own_copy") or changes.seed is not None or any(changes.stages.values()):
        return checkout / FOLDER / changes.name(checkout)
    return checkout


async def run_round(key: str, workdir: Path, run_name: str, labelers: Labelers, gpu_workers: bool) -> None:
    """One round, stage by stage. Raises Waiting where people have not labeled everything yet."""
    await run_stage_of(f"round_collect@{key}", workdir, run_name, None, gpu_workers)
    folder = Path("feedback") / key
    if labelers == "simulated":
        command = [sys.executable, "-m", "mlops.labeling.terminal", str(folder), "--simulate"]
        await run_program("terminal", command, workdir, child_env(run_name, workdir))
    else:
        if server_is_named():
            choose = ["--choose"] if load_params(workdir).stages.rounds.task == "choose" else []
            await label_studio(workdir, run_name, "publish", str(folder), *choose)
            await pull_labels(workdir, run_name, folder)
        batch = Batch(workdir / folder)
        if missing := batch.missing():
            done = batch.assigned() - len(missing)
            await best_effort(acreate_markdown_artifact(waiting_text(batch, folder), key="labels-wanted"))
            raise Waiting(f"{key}: {done} of {batch.assigned()} labels are there")
    await pin(workdir, run_name, folder / LABELS)
    for stage in ("round_labels", "round_rm", "round_ppo", "round_scores"):
        await run_stage_of(f"{stage}@{key}", workdir, run_name, None, gpu_workers)
    get_run_logger().info("%s", next(row for row in table(workdir) if row["round"] == key))


def server_is_named() -> bool:
    """Whether people label in Label Studio; else on the terminal."""
    return bool(os.environ.get("LABEL_STUDIO_URL"))


async def label_studio(workdir: Path, run_name: str, *arguments: str) -> None:
    """`mlops.labeling.label_studio` in the environment of Label Studio's SDK."""
    python = os.environ.get("LABEL_STUDIO_PYTHON") or str(checkout_of(workdir) / ".venv-labels" / "bin" / "python")
    if not Path(python).exists():
        raise UserError(f"{python}: LABEL_STUDIO_URL is set and its SDK's environment is not there; `make labels` "
                        "makes it, or LABEL_STUDIO_PYTHON names another")
    command = [python, "-W", "ignore", "-m", "mlops.labeling.label_studio", *arguments]
    await run_program("label_studio", command, workdir, child_env(run_name, workdir))


async def pull_labels(workdir: Path, run_name: str, folder: Path) -> None:
    """Takes over what people have labeled since the last look."""
    await label_studio(workdir, run_name, "pull", str(folder))


def waiting_text(batch: Batch, folder: Path) -> str:
    """What is to do, by labeler."""
    left: dict[str, int] = {}
    for _, name in batch.missing():
        left[name] = left.get(name, 0) + 1
    rows = "\n".join(f"| {name} | {count} |" for name, count in sorted(left.items()))
    how = f"in Label Studio, {without_secrets(os.environ['LABEL_STUDIO_URL'])}" if server_is_named() else \
        f"on the terminal: `python -m mlops.labeling.terminal {folder} --labeler NAME`"
    return f"Labels are wanted, {how}. The run goes on when all are there.\n\n| labeler | left |\n|-|-|\n{rows}"


async def pin(workdir: Path, run_name: str, file: Path) -> None:
    """Puts the labels into DVC's cache; `file`.dvc, which git keeps, is their version."""
    dvc = str(Path(sys.executable).with_name("dvc"))
    await run_program("dvc add", [dvc, "add", "--quiet", str(file)], workdir, child_env(run_name, workdir))


def table(workdir: Path) -> list[dict[str, Any]]:
    """A row for each round that has been measured."""
    rows = []
    for key in load_params(workdir).rounds:
        path = workdir / "metrics" / f"round_scores@{key}.json"
        if path.exists():
            scores = json.loads(path.read_text(encoding="utf-8"))
            labels = json.loads((workdir / "metrics" / f"round_labels@{key}.json").read_text(encoding="utf-8"))
            rows.append({"round": key, "rows so far": labels["labels/rows_so_far"],
                         **{name: f"{scores[metric]:.3f}" for name, metric in SHOWN.items() if metric in scores}})
    return rows


async def run_rounds(parameters: dict[str, Any]) -> Any:
    """Runs the flow and returns its table or its error."""
    state = await rounds(**parameters, return_state=True)
    return await state.aresult(raise_on_failure=False)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m flows.rounds", description="Runs alternating rounds.")
    parser.add_argument("--count", type=int, default=3, help="rounds")
    parser.add_argument("--labelers", choices=("simulated", "people"), default="simulated")
    parser.add_argument("--prompts", type=int, help="prompts labeled in a round")
    parser.add_argument("--episodes", type=int, help="PPO's rollouts in a round")
    parser.add_argument("--select", choices=("random", "disagreement"), help="which prompts are labeled")
    parser.add_argument("--restart", action="store_true", default=None, help="each round's policy starts from SFT")
    parser.add_argument("--profile", help="the file of profiles/ to use")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--own-copy", action="store_true", help="work in a workspace, a copy of this checkout")
    result = run_to_end(partial(run_rounds, vars(parser.parse_args())))
    if isinstance(result, Waiting):
        print(f"{result}; run the same command when they are complete", file=sys.stderr)
        raise SystemExit(WAITING)
    if not isinstance(result, list):
        raise result
    for row in result:
        print("  ".join(f"{name} {value}" for name, value in row.items()))


if __name__ == "__main__":
    main()
