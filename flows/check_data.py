"""The data checks on data that is not in the line yet: a folder of datasets, or a source that is read first.

Nothing of the checkout changes. The findings are an artifact, by row and rule.
"""

import os
import re
import sys
import time
from pathlib import Path
from typing import Any, Literal

import flows.environment  # noqa: F401

# isort: split
from prefect import State, flow, get_run_logger
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from flows.artifacts import findings_table
from flows.process import run_lines
from flows.stages import StageFailed
from rlhf.errors import UserError

FOLDER = Path("scratch/new-data")


@flow(name="check-data", persist_result=False)
async def check_data(data: str = "", source: str = "", counts: Literal["none", "paper"] = "none",
                     root: Path | None = None) -> State[Any]:
    """Checks new data by the rules of stage validate.

    Args:
        data: A folder with sft.jsonl, rm.jsonl, ppo.jsonl.
        source: Or a description of a source (profiles/sources/NAME.yaml), which is read into datasets first.
        counts: paper: exactly InstructGPT's row counts and use cases; none: any.
        root: The checkout; empty: the folder that the deployment was made in.
    """
    checkout = (root or Path()).resolve()
    if bool(data) == bool(source):
        mistake = UserError("check-data: name either a folder (data) or a description of a source (source)")
        return Failed(message=str(mistake), data=mistake)
    place = checkout / FOLDER / str(flow_run.id)[:8]
    place.mkdir(parents=True, exist_ok=True)
    report = place / "findings.json"
    try:
        if source:
            data = str(place / "data")
            await _run(checkout, "ingest", "--source", source, "--out", data)
        await _run(checkout, "validate", "--data", data, "--report", str(report), "--counts", counts,
                   "--docs", str(place / "data_docs"))
    except StageFailed as failure:
        return Failed(message=str(failure), data=failure)
    finally:
        if report.exists():
            await findings_table(report)
    return Completed(message=f"{data} keeps the rules; {place / 'data_docs' / 'index.html'}")


async def _run(root: Path, task: str, *arguments: str) -> None:
    """`python -m tasks.<task>`, each line to the log. Raises StageFailed with the task's own last line."""
    logger = get_run_logger()
    said = [f"{task}: no message"]

    def on_line(text: str) -> None:
        said.append(text)
        logger.info("%s", text)

    started = time.monotonic()
    code = await run_lines([sys.executable, "-m", f"tasks.{task}", *arguments], root,
                           {**os.environ, "PYTHONUNBUFFERED": "1"}, on_line)
    if code:
        raise StageFailed(re.sub(r"^(\S+: )?", rf"{task}: ", said[-1], count=1) if code > 0 else
                          f"{task}: ended by signal {-code}", code)
    logger.info("%s took %.1f s", task, time.monotonic() - started)
