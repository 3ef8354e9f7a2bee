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
from pathlib import Path
from typing import Annotated, Any, Literal
from uuid import uuid4

import flows.environment  # noqa: F401
from flows.process import continue_in_own_group, run_lines
from flows.server import start_server, wait_for_server

if __name__ == "__main__":  # the server starts while this process goes on with its own imports
    continue_in_own_group()
    start_server()

# isort: split
from prefect import State, flow, get_run_logger
from prefect.artifacts import acreate_markdown_artifact, acreate_table_artifact
from prefect.exceptions import TerminationSignal
from prefect.flow_runs import asuspend_flow_run
from prefect.runtime import deployment, flow_run
from prefect.states import Failed
from pydantic import Field

from flows.artifacts import kept
from flows.execution import (
    UPLOAD_SECONDS,
    check_params,
    close_earlier_tasks,
    run_lock,
    run_stage_of,
    run_stages,
    use_profile,
)
from flows.parameters import ProfileName, Seed
from flows.stages import StageFailed, child_env, mend_lock
from flows.terminal import show_bars
from flows.workspaces import FOLDER, Changes, checkout_of, fill_workspace
from mlops import imports_done
from mlops.config.loader import load_params
from mlops.config.stage_graph import write_rounds
from mlops.labeling.store import LABELS, Batch
from mlops.tracking.uploader import wait_until_uploaded
from rlhf.errors import UserError

Count = Annotated[int, Field(ge=1, le=50)]
Labelers = Literal["simulated", "people"]
BASE = "sft"  # the rounds start from what the line makes up to here
WAITING = 6  # exit code where people's labels are missing and no server can wake the run
WAIT_DAYS = 60
SHOWN = {"gold": "round/gold", "gold of SFT": "round/gold_sft", "win rate vs SFT": "round/win_rate_vs_sft",
         "RM accuracy on the policy": "round/rm_accuracy_on_policy", "KL": "round/kl"}


class Waiting(Exception):
    """Labels are missing."""


def run_name() -> str:
    """The run's name in Prefect and MLflow."""
    given = flow_run.parameters
    try:
        what = changes_of(given).name(Path(given.get("root") or ".").resolve())
    except UserError:
        what = "rounds"
    return f"{what} {str(flow_run.id)[:6]}"


@flow(name="rounds", persist_result=False, flow_run_name=run_name)
async def rounds(count: Count = 3, labelers: Labelers = "simulated", prompts: Annotated[int, Field(ge=1)] | None = None,
                 episodes: Annotated[int, Field(ge=1)] | None = None,
                 select: Literal["random", "disagreement"] | None = None, restart: bool | None = None,
                 profile: ProfileName | None = None,
                 seed: Seed | None = None, own_copy: bool = False, gpu_workers: bool = False,
                 root: Path | None = None) -> list[dict[str, Any]] | State[Any]:
    """Runs the rounds from what is up to date already. What they are made of is in the profile's section `rounds`.

    In the checkout, or in a copy of it (scratch/copies) where a parameter differs or `own_copy` is on.

    Args:
        count: Rounds; with more than before, those that are done stay.
        labelers: simulated: the embedded world's, at once. people: the run waits for them.
        prompts: Prompts labeled in a round; empty: what the profile says.
        episodes: PPO's rollouts in a round; empty: what the profile says.
        select: Prompts at random, or those that reward models disagree on; empty: what the profile says.
        restart: Each round's policy starts from SFT instead of the last one; empty: what the profile says.
        profile: Which file of profiles/ to use; empty: what params.yaml says.
        seed: Another seed than params.yaml's.
        own_copy: Work in a copy even if nothing differs.
        gpu_workers: Training runs on the workers of pool gpu, at the exact revision.
        root: The checkout; empty: the folder that the deployment was made in.
    """
    checkout = (root or Path()).resolve()
    given = {"count": count, "prompts": prompts, "episodes": episodes, "select": select,
             "restart": restart, "profile": profile, "seed": seed, "own_copy": own_copy}
    line = str(flow_run.name)
    try:
        check_params(checkout, profile)
        where = place_of(given, checkout)
        async with run_lock(where):
            if where != checkout:
                await asyncio.to_thread(fill_workspace, checkout, where, changes_of(given))
            else:
                use_profile(where, profile)
                write_rounds(where, count)
            mend_lock(where)
            await kept(close_earlier_tasks())
            await run_stages(where, line, last=BASE)
            for key in load_params(where).rounds:
                await run_round(key, where, line, labelers, gpu_workers)
    except Waiting as waiting:
        if deployment.id:
            # A key counts once, and a run that was woken too early has to be able to wait again.
            await asuspend_flow_run(timeout=WAIT_DAYS * 86_400, key=f"{waiting}: {uuid4()}")
        return Failed(name="Waiting", message=str(waiting), data=waiting)
    except (UserError, StageFailed) as error:
        return Failed(message=str(error), data=error)
    await mirrored(where, line)
    rows = table(where)
    await kept(acreate_table_artifact(rows, key="rounds", description=f"{line}: measured on held-out prompts"))
    return rows


def changes_of(given: dict[str, Any]) -> Changes:
    """From the flow's parameters. In a copy the rounds are part of its name."""
    own = {name: given[name] for name in ("prompts", "episodes", "select", "restart") if given.get(name) is not None}
    return Changes(given.get("profile"), given.get("seed"), {"rounds": own} if own else {}, rounds=given["count"])


def place_of(given: dict[str, Any], checkout: Path) -> Path:
    """The folder that a run with these parameters works in."""
    changes = changes_of(given)
    if given.get("own_copy") or changes.seed is not None or any(changes.stages.values()):
        return checkout / FOLDER / changes.name(checkout)
    return checkout


async def run_round(key: str, where: Path, line: str, labelers: Labelers, gpu_workers: bool) -> None:
    """One round, stage by stage. Raises Waiting where people have not labeled everything yet."""
    await run_stage_of(f"round_collect@{key}", where, line, None, gpu_workers)
    folder = Path("feedback") / key
    if labelers == "simulated":
        await command(where, line, "label", str(folder), "--simulate")
    else:
        if server_is_named():
            choose = ["--choose"] if load_params(where).stages.rounds.task == "choose" else []
            await label_server(where, line, "publish", str(folder), *choose)
            await pull_labels(where, line, folder)
        batch = Batch(where / folder)
        if missing := batch.missing():
            done = batch.assigned() - len(missing)
            await kept(acreate_markdown_artifact(waiting_text(batch, folder), key="labels-wanted"))
            raise Waiting(f"{key}: {done} of {batch.assigned()} labels are there")
    await pin(where, line, folder / LABELS)
    for stage in ("round_labels", "round_rm", "round_ppo", "round_scores"):
        await run_stage_of(f"{stage}@{key}", where, line, None, gpu_workers)
    get_run_logger().info("%s", next(row for row in table(where) if row["round"] == key))


def server_is_named() -> bool:
    """Whether people label in Label Studio; else on the terminal."""
    return bool(os.environ.get("LABEL_STUDIO_URL"))


async def label_server(where: Path, line: str, *arguments: str) -> None:
    """`mlops.labeling.label_studio` in the environment of Label Studio's SDK."""
    python = os.environ.get("LABEL_STUDIO_PYTHON") or str(checkout_of(where) / ".venv-labels" / "bin" / "python")
    if not Path(python).exists():
        raise UserError(f"{python}: LABEL_STUDIO_URL is set and its SDK's environment is not there; `make labels` "
                        "makes it, or LABEL_STUDIO_PYTHON names another")
    await run(where, line, "label_server", [python, "-W", "ignore", "-m", "mlops.labeling.label_studio", *arguments])


async def pull_labels(where: Path, line: str, folder: Path) -> None:
    """Takes over what people have labeled since the last look."""
    await label_server(where, line, "pull", str(folder))


def waiting_text(batch: Batch, folder: Path) -> str:
    """What is to do, by labeler."""
    left: dict[str, int] = {}
    for _, name in batch.missing():
        left[name] = left.get(name, 0) + 1
    rows = "\n".join(f"| {name} | {count} |" for name, count in sorted(left.items()))
    how = f"in Label Studio, {os.environ['LABEL_STUDIO_URL']}" if server_is_named() else \
        f"on the terminal: `python -m mlops.labeling.terminal {folder} --labeler NAME`"
    return f"Labels are wanted, {how}. The run goes on when all are there.\n\n| labeler | left |\n|-|-|\n{rows}"


async def mirrored(where: Path, line: str) -> None:
    """Waits until MLflow has the rounds; says where it has not."""
    try:
        await asyncio.to_thread(wait_until_uploaded, where, line, UPLOAD_SECONDS)
    except Exception as error:  # the rounds are complete and their journals on disk, whatever happened to the mirror
        get_run_logger().warning("MLflow mirror: %s; `python -m mlops.tracking.uploader --once` sends what is missing", error)


async def pin(where: Path, line: str, file: Path) -> None:
    """Puts the labels into DVC's cache; `file`.dvc, which git keeps, is their version."""
    dvc = str(Path(sys.executable).with_name("dvc"))
    await run(where, line, "dvc add", [dvc, "add", "--quiet", str(file)])


async def command(where: Path, line: str, task: str, *arguments: str) -> None:
    """`python -m tasks.<task>` in the line's folder."""
    await run(where, line, task, [sys.executable, "-m", f"tasks.{task}", *arguments])


async def run(where: Path, line: str, name: str, words: list[str]) -> None:
    """Runs a program in the line's folder, its lines to the log. Raises StageFailed with the last one."""
    said = ["no message"]

    def on_line(text: str) -> None:
        said.append(text)
        get_run_logger().info("%s", text)

    code = await run_lines(words, where, child_env(line), on_line)
    if code:
        raise StageFailed(f"{name}: {said[-1].removeprefix(f'{name}: ')}", code)


def table(where: Path) -> list[dict[str, Any]]:
    """A row for each round that has been measured."""
    rows = []
    for key in load_params(where).rounds:
        path = where / "metrics" / f"round_scores@{key}.json"
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            labels = json.loads((where / "metrics" / f"round_labels@{key}.json").read_text(encoding="utf-8"))
            rows.append({"round": key, "rows so far": labels["labels/rows_so_far"],
                         **{name: f"{found[metric]:.3f}" for name, metric in SHOWN.items() if metric in found}})
    return rows


async def run_rounds(given: dict[str, Any]) -> Any:
    """Runs the flow and returns its table or its error."""
    state = await rounds(**given, return_state=True)
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
    parser.add_argument("--own-copy", action="store_true", help="work in a copy of this checkout")
    given = vars(parser.parse_args())
    imports_done()
    show_bars()
    try:
        wait_for_server()
        result = asyncio.run(run_rounds(given))
    except (KeyboardInterrupt, TerminationSignal, asyncio.CancelledError) as error:
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        raise SystemExit(143 if isinstance(error, TerminationSignal) else 130) from None
    if isinstance(result, Waiting):
        print(f"{result}; run the same command when they are complete", file=sys.stderr)
        raise SystemExit(WAITING)
    if isinstance(result, UserError | StageFailed):
        code = result.code if isinstance(result, StageFailed) else 2
        print(result, file=sys.stderr)
        raise SystemExit(code if code > 0 else 128 - code)
    if not isinstance(result, list):
        raise result
    for row in result:
        print("  ".join(f"{name} {value}" for name, value in row.items()))


if __name__ == "__main__":
    main()
