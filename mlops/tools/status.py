"""Where a checkout stands: its stages, its runs with their results, the champion, and what works right now.

    python -m mlops.tools.status
"""

import argparse
import fcntl
import json
import subprocess
import sys
import time
from pathlib import Path

from rich.table import Column, Table

from mlops import program
from mlops.config.loader import Params, load_params
from mlops.config.paths import metrics_of
from mlops.config.stage_graph import pipeline_stages
from mlops.printing import show_table, terminal
from mlops.reporting.headline import estimate, number, percent, points, score
from mlops.tools.runs import Run, newest_policy, runs_of
from rlhf.errors import UserError, one_line
from rlhf.training.journal import read_journal

DASH = "–"
NOTHING = "nothing has run yet: `instructflow run` (or `--profile smoke` for a look in a minute)"
NO_OUTPUT = "has no output here"


def works_now(folder: Path) -> str:
    """What is running in the folder, with the last step of its journal; empty where nothing is."""
    lock = folder / "scratch" / "run.lock"
    if not lock.is_file():
        return ""
    with lock.open() as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass
        else:
            return ""
    journals = sorted(folder.glob("scratch/*/*/journal.csv"), key=lambda path: path.stat().st_mtime)
    if not journals or time.time() - journals[-1].stat().st_mtime > 3600:
        return "a run works here"
    rows = read_journal(journals[-1])
    step = f", step {rows[-1]['step']}" if rows and "step" in rows[-1] else ""
    return f"a run works here: {journals[-1].parents[1].name}{step}"


def stage_states(root: Path) -> dict[str, str]:
    """Stage → up to date, changed (with what), or never run, as DVC says. Raises UserError where DVC cannot say."""
    dvc = str(Path(sys.executable).with_name("dvc"))
    done = subprocess.run([dvc, "status", "--json"], cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"dvc status: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    changed = json.loads(done.stdout or "{}")
    states = {}
    for stage in pipeline_stages(root):
        reasons = changed.get(stage, [])
        kinds = [(what, name, state) for item in reasons if isinstance(item, dict) for what, names in item.items()
                 for name, state in (names.items() if isinstance(names, dict) else [])]
        outs = [state for what, _, state in kinds if what == "changed outs"]
        names = list(dict.fromkeys(name for what, name, _ in kinds if what == "changed deps"))
        if not reasons:
            states[stage] = "up to date"
        elif "deleted" in outs or "not in cache" in outs:
            states[stage] = NO_OUTPUT
        else:
            states[stage] = f"changed: {', '.join(names[:3]) or 'its outputs or its command'}" + (
                f" and {len(names) - 3} more" if names[3:] else "")
    return states


def run_table(runs: list[Run]) -> Table:
    """The runs with the main numbers of the arm that goes to the gates."""
    table = Table(Column("run", no_wrap=True), "arm", "KL to SFT", "win rate vs SFT", "gold gain",
                  "tax, mean", "gates", show_edge=False)
    for run in runs:
        evaluation, promotion = run.metrics("evaluate"), run.metrics("promote")
        arm = str(evaluation.get("eval/arm", ""))
        shown = []
        for key, form in ((f"eval/kl_{arm}", score), ("eval/win_rate_vs_sft", percent),
                          ("eval/gold_gain_vs_sft", score), ("tax/mean", points)):
            found = estimate(evaluation, key)
            shown.append(DASH if found is None else form(found.value))
        reasons = promotion.get("reasons")
        gates = DASH if reasons is None else "passed" if not reasons else f"missed {len(reasons)}"
        table.add_row(run.name, arm or DASH, *shown, gates)
    return table


def champion(root: Path, params: Params) -> str:
    """One line about the promoted policy."""
    promotion = Run("", root).metrics("promote")
    if not promotion:
        return "no policy of the checkout itself has gone to the gates yet"
    if reasons := promotion.get("reasons"):
        return f"not promoted: {'; '.join(str(reason) for reason in reasons)}"
    version = number(promotion, "promote/policy_version")
    where = f", version {version:.0f} in MLflow's registry" if version else ""
    return f"promoted: arm {params.stages.promoted}{where}, models/promoted"


def main() -> None:
    parser = argparse.ArgumentParser(prog=program("mlops.tools.status"), description=(
        "The checkout's stages, its runs and their results, the champion."))
    parser.parse_args()
    root = Path.cwd()
    console = terminal()
    with one_line("status"):
        params = load_params(root)
        print(f"profile {params.profile}, seed {params.seed}, arms {', '.join(params.stages.arms)}")
        table = Table("stage", "state", "measured", show_edge=False)
        states = stage_states(root)
        for stage, state in states.items():
            file = root / f"{metrics_of(stage)}.json"
            measured = file.is_file() and state != NO_OUTPUT  # else git's, of the reference run
            table.add_row(stage, state, f"{file.relative_to(root)}" if measured else "")
        if set(states.values()) == {NO_OUTPUT}:
            print("The checkout itself has run no stage; its metrics/ are git's, of the reference run.")
        else:
            show_table(table, console)
        runs = runs_of(root)
        console.print()
        show_table(run_table(runs), console)
        for run in runs:
            if found := works_now(run.folder):
                print(f"{run.name}: {found}")
        print(champion(root, params))
        newest = newest_policy(root)
        names = [run.name for run in runs if run.arms()]
        if newest is None:
            print(f"Next: {NOTHING}")
        else:
            print("Next: `instructflow chat`" + (f", `instructflow compare {' '.join(names[:2])}`"
                                                          if len(names) > 1 else ""))


if __name__ == "__main__":
    main()
