"""What a whole run shows in MLflow, on the parent of its stages' runs: the numbers that matter, their curves, what it
is in words, its report. All other numbers are there too, under `detail/`."""

import html
import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mlops.config.loader import load_params
from mlops.reporting.headline import verdict
from mlops.reporting.journals import RUN_MARK, kl_rule
from mlops.tracking.upload_record import Row
from rlhf.errors import UserError

CURVES = ("kl", "beta", "reward", "rm_score", "gold")  # of an arm's iterations, as ARM/kl
# The final numbers that stand in front; {arm} is the promoted one.
MAIN = ("sft/valid_loss", "rm/accuracy", "eval/kl_{arm}", "eval/win_rate_vs_sft", "eval/gold_gain_vs_sft", "tax/mean",
        "promote/passed")
DETAIL = "detail/"
REPORTS = {"validate": "reports/data_docs", "evaluate": "reports/report.html", "promote": "models/promoted/README.md"}
RANDOM_END = re.compile(r" [0-9a-f]{6}$")  # by which runs with the same changes differ


def what_differs(run_name: str) -> str:
    """The changes that a run's name tells, else the name: "kl_goal=0.3" of "cpu,kl_goal=0.3 1f973d"."""
    name = RANDOM_END.sub("", run_name)
    return name.partition(",")[2] or name


def child_name(run: Mapping[str, Any], run_name: str) -> str:
    """A stage's run in lists and legends: what it is, then what differs. "ppo_ptx · kl_goal=0.3"."""
    return f"{run.get('arm') or run['stage']} · {what_differs(run_name)}"


def curve_rows(run: Mapping[str, Any], rows: Sequence[Row]) -> list[Row]:
    """Of an arm's journal what the parent run shows."""
    if "arm" not in run:
        return []
    found = []
    for row in rows:
        values = {f"{run['arm']}/{name}": row.values[f"ppo/{name}"] for name in CURVES if f"ppo/{name}" in row.values}
        if values:
            found.append(Row(row.step, values))
    return found


def final_names(run: Mapping[str, Any], final: Mapping[str, float], arm: str) -> dict[str, float]:
    """A stage's final numbers as the parent run has them. `arm`: the promoted one. A round's are steps of the run."""
    if "round" in run:
        return dict(final)
    if "arm" in run:
        final = {re.sub("^ppo/", f"{run['arm']}/", name): value for name, value in final.items()}
    main = {name.format(arm=arm) for name in MAIN}
    return {name if name in main else f"{DETAIL}{name}": value for name, value in final.items()}


def with_run(page: str, run_name: str, started_ms: int, commit: str) -> str:
    """A report with the run's name, its start (UTC) and its commit at the top: in the file of a checkout, which has the
    same bytes wherever it is made, they are not."""
    started = datetime.fromtimestamp(started_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")
    facts = [("run", run_name), ("started", started), *([("commit", commit[:12])] if commit else [])]
    return page.replace(RUN_MARK, " ".join(f"<span>{name} <b>{html.escape(value)}</b></span>" for name, value in facts))


def description(root: Path, run_name: str, tags: Mapping[str, str], evaluated: bool) -> str:
    """The run in Markdown: what was run, and, where it is `evaluated`, what came out."""
    lines = [f"Profile `{tags['profile']}`" + (f", `{what_differs(run_name)}`" if "," in run_name else "")
             + f", data `{tags['data_version'][:8] or 'none yet'}`, commit `{tags.get('git_commit', 'none')[:12]}`."]
    if not evaluated:
        return lines[0]
    path = root / "metrics" / "evaluate.json"
    try:
        profile = load_params(root).stages
        evaluation = json.loads(path.read_text(encoding="utf-8"))
        said = verdict(evaluation, kl_rule(profile.arms[profile.promoted]))
    except (OSError, ValueError, KeyError, UserError):
        return lines[0]
    lines += [f"**{said['headline']}** {said['text']}",
              "Artifacts: `reports/report.html` (open it in a browser), `reports/data_docs/index.html` (the data "
              "checks), `models/promoted/README.md` (the model card)."]
    return "\n\n".join(lines).replace("\N{NO-BREAK SPACE}", " ")
