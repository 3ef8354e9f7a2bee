"""What Prefect and DVC cost a run: the smoke run as a flow, and its stages by hand, in turn, in copied checkouts.

    python bench/overhead.py [PAIRS] [SECONDS]     SECONDS: what the run in question takes; 600 is the bar

The difference is the same for every profile (a process start, a status, a lock for each stage), so it is set against
the seconds of the run in question. The flow runs twice: with a new PREFECT_HOME, whose database Prefect makes first,
and with the same one again, as every run of a user's but the first. Seconds of the clock, and of CPU in brackets,
which other programs on the machine disturb less. About four minutes a pair.
"""

import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from mlops.config.stage_graph import PIN, pipeline_stages

ENVIRONMENT = {**os.environ, "INSTRUCTFLOW_UPLOADER": "off", "DO_NOT_TRACK": "true",
               "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
               "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
for name in ("PREFECT_API_URL", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE"):  # a copy runs its own code, without a server
    ENVIRONMENT.pop(name, None)


class Cost(NamedTuple):
    clock: float
    cpu: float

    def __str__(self) -> str:
        return f"{self.clock:.1f} s ({self.cpu:.1f})"


def copy_to(folder: Path) -> None:
    names = subprocess.run(["git", "ls-files", "-z"], capture_output=True, check=True).stdout.decode().split("\0")
    for name in filter(None, names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(name, folder / name)
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    text = (folder / "params.yaml").read_text()
    (folder / "params.yaml").write_text(text.replace("profile: cpu", "profile: smoke"))


def timed(command: list[str], folder: Path, home: Path) -> Cost:
    """CPU: of the command and all that it has waited for."""
    before, used = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, cwd=folder, env={**ENVIRONMENT, "PREFECT_HOME": str(home)}, check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Cost(time.monotonic() - before, after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime)


def by_flow(folder: Path, home: Path) -> Cost:
    return timed([sys.executable, "-m", "flows.pipeline"], folder, home)


def by_hand(folder: Path, home: Path) -> Cost:
    """Only the stages' own processes are timed; the outputs move as DVC would move them."""
    costs = []
    for stage in [name for name in pipeline_stages(folder) if name != PIN]:
        (folder / "models").mkdir(exist_ok=True)
        costs.append(timed([sys.executable, "-m", f"tasks.{stage}"], folder, home))
        if stage == "ingest":
            shutil.copytree(folder / "build" / "data", folder / "data", dirs_exist_ok=True)
    return Cost(sum(cost.clock for cost in costs), sum(cost.cpu for cost in costs))


def main() -> None:
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    run_seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 600.0
    measured: dict[str, list[Cost]] = {"by hand": [], "new database": [], "kept database": []}
    for pair in range(pairs):
        with tempfile.TemporaryDirectory() as home:
            for name in measured if pair % 2 == 0 else ("new database", "kept database", "by hand"):
                with tempfile.TemporaryDirectory() as folder:
                    copy_to(Path(folder))
                    measured[name].append((by_hand if name == "by hand" else by_flow)(Path(folder), Path(home)))
                print(f"{name}: {measured[name][-1]}", flush=True)
    middle = {name: Cost(*(statistics.median(column) for column in zip(*costs, strict=True)))
              for name, costs in measured.items()}
    for name in ("new database", "kept database"):
        cost = Cost(*(flow - hand for flow, hand in zip(middle[name], middle["by hand"], strict=True)))
        print(f"Prefect and DVC, {name}: {cost} a run, {cost.clock / run_seconds:.1%} of {run_seconds:.0f} s")


if __name__ == "__main__":
    main()
