"""The data checks on data that no run uses yet: a folder of datasets, or a source that is read first.

Nothing of the checkout changes. The findings are an artifact, by row and rule.
"""

import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import flows.environment  # noqa: F401

# isort: split
from prefect import State, flow, get_run_logger
from prefect.runtime import flow_run
from prefect.states import Completed, Failed
from pydantic import Field

from flows.artifacts import findings_table
from flows.execution import run_program
from flows.stages import StageFailed
from mlops.config.loader import PROFILES_DIR, SOURCES_DIR
from rlhf.errors import UserError

FOLDER = Path("scratch/new-data")


@flow(name="check-data", persist_result=False)
async def check_data(data: str = "", source: str = "", counts: Literal["none", "paper"] = "none",
                     min_k: Annotated[int, Field(ge=2, le=9)] = 2, root: Path | None = None) -> State[Any]:
    """Checks new data by the rules of stage validate.

    Args:
        data: A folder with sft.jsonl, rm.jsonl, ppo.jsonl.
        source: Or a description of a source, which is read into datasets first: a name in profiles/sources/, or a path.
        counts: paper: exactly InstructGPT's row counts and use cases; none: any.
        min_k: The least completions of a ranking; InstructGPT's rankings have 4 or more, pairs 2.
        root: The checkout; empty: the folder that the deployment was made in.
    """
    checkout = (root or Path()).resolve()
    if bool(data) == bool(source):
        mistake = UserError("check-data: name either a folder (data) or a description of a source (source)")
        return Failed(message=str(mistake), data=mistake)
    folder = checkout / FOLDER / str(flow_run.id)[:8]
    folder.mkdir(parents=True, exist_ok=True)
    report = folder / "findings.json"
    try:
        if source:
            named = checkout / PROFILES_DIR / SOURCES_DIR / f"{source}.yaml"
            source = str(named) if "/" not in source and named.is_file() else source
            data = str(folder / "data")
            await _run(checkout, "ingest", "--source", source, "--out", data)
        await _run(checkout, "validate", "--data", data, "--report", str(report), "--counts", counts,
                   "--min-k", str(min_k), "--docs", str(folder / "data_docs"))
    except StageFailed as failure:
        return Failed(message=str(failure), data=failure)
    finally:
        if report.exists():
            await findings_table(report)
    return Completed(message=f"{data} keeps the rules; {folder / 'data_docs' / 'index.html'}")


async def _run(root: Path, task: str, *arguments: str) -> None:
    """`python -m tasks.<task>`. Raises StageFailed with the task's own last line."""
    started = time.monotonic()
    await run_program(task, [sys.executable, "-m", f"tasks.{task}", *arguments], root,
                      {**os.environ, "PYTHONUNBUFFERED": "1"})
    get_run_logger().info("%s took %.1f s", task, time.monotonic() - started)
