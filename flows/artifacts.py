"""What a run leaves in the Prefect UI beside its log: progress of the running stage, findings, metrics, curves."""

import asyncio
import base64
import json
import logging
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import flows.environment  # noqa: F401

# isort: split
from prefect.artifacts import (
    acreate_image_artifact,
    acreate_progress_artifact,
    acreate_table_artifact,
    aupdate_progress_artifact,
)

from flows.terminal import PROGRESS
from mlops.config.paths import POLICY_METRICS
from mlops.reporting.picture import picture
from mlops.tracking.upload_record import numbers

SHOWN_FINDINGS = 200
PROGRESS_SECONDS = 5.0

logger = logging.getLogger("prefect.flow_runs")


async def best_effort(request: Coroutine[Any, Any, Any]) -> Any:
    """Awaits a request to Prefect's server, most often a new artifact; where it fails, the run goes on."""
    try:
        return await request
    except Exception as error:
        logger.warning("Prefect does not take this, the run goes on: %s", " ".join(str(error).split())[:200])
        return None


def artifact_key(name: str) -> str:
    """A stage's name as Prefect wants keys: small letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower())


@asynccontextmanager
async def progress_of(stage: str) -> AsyncIterator[Callable[[str], None]]:
    """Gives a function for the stage's lines; its progress lines move an artifact in the UI."""
    latest, shown, artifact = -1.0, -1.0, None

    def on_line(text: str) -> None:
        nonlocal latest
        if progress := PROGRESS.fullmatch(text):
            latest = 100 * int(progress["done"]) / max(1, int(progress["total"]))

    async def show() -> None:
        nonlocal shown, artifact
        if latest == shown:
            return
        shown = latest
        if artifact is None:
            key = f"{artifact_key(stage)}-progress"
            artifact = await best_effort(acreate_progress_artifact(shown, key=key, description=stage))
        else:
            await best_effort(aupdate_progress_artifact(artifact, shown))

    async def keep_showing() -> None:
        while True:
            await asyncio.sleep(PROGRESS_SECONDS)
            await show()

    showing = asyncio.create_task(keep_showing())
    try:
        yield on_line
        await show()
    finally:
        showing.cancel()


def findings_of(root: Path) -> tuple[int, int]:
    """Which version of the findings is there: time and size of the file."""
    path = root / "reports" / "validate.json"
    return (path.stat().st_mtime_ns, path.stat().st_size) if path.exists() else (0, 0)


async def show_findings(root: Path, before: tuple[int, int]) -> None:
    """The data checks' findings, also where they stop the run; nothing where they are those of `before`."""
    if findings_of(root) not in ((0, 0), before):
        await findings_table(root / "reports" / "validate.json")


async def findings_table(path: Path) -> None:
    findings = json.loads(path.read_text(encoding="utf-8"))
    by_rule = Counter(item["rule"] for item in findings)
    counts = ", ".join(f"{rule} {count:,}" for rule, count in sorted(by_rule.items())) or "none"
    description = f"{len(findings):,} findings of the data checks: {counts}. All of them: {path}"
    await best_effort(acreate_table_artifact(findings[:SHOWN_FINDINGS], key="data-findings", description=description))


async def show_metrics(root: Path, run_name: str) -> None:
    """Every number of metrics/*.json as a table."""
    rows = []
    for path in sorted((root / "metrics").rglob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        metrics = numbers(content) if isinstance(content, dict) else {}  # the study's claims are a list
        arm = f"{path.stem}: " if path.parent.name == POLICY_METRICS.name else ""
        rows += [{"metric": f"{arm}{name}", "value": f"{value:.6g}"} for name, value in sorted(metrics.items())]
    await best_effort(acreate_table_artifact(rows, key="metrics", description=f"Run {run_name}: metrics/*.json"))


async def show_curves(root: Path, run_name: str) -> None:
    """The training's curves as one picture; nothing without journals."""
    drawn = await asyncio.to_thread(picture, root)
    if drawn:
        url = "data:image/png;base64," + base64.b64encode(drawn).decode()
        await best_effort(acreate_image_artifact(url, key="curves", description=f"Run {run_name}: training curves"))
