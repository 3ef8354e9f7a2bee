"""What Prefect and DVC cost a line: the smoke line through the flow, and its stages run by hand, in turn, in copies.

    python bench/overhead.py [PAIRS] [SECONDS]     SECONDS: what the line in question takes; 750 is the reference run's

The difference is the same for every profile (a process start, a status, a lock for each stage), so it is set against
the seconds of the line in question. About three minutes a pair.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tasks.graph import PIN, line_stages

ENVIRONMENT = {**os.environ, "INSTRUCTFLOW_MIRROR": "off", "DO_NOT_TRACK": "true",
               "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
               "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def copy_to(folder: Path) -> None:
    names = subprocess.run(["git", "ls-files", "-z"], capture_output=True, check=True).stdout.decode().split("\0")
    for name in filter(None, names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(name, folder / name)
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    text = (folder / "params.yaml").read_text()
    (folder / "params.yaml").write_text(text.replace("profile: cpu", "profile: smoke"))


def timed(command: list[str], folder: Path) -> float:
    before = time.monotonic()
    subprocess.run(command, cwd=folder, env={**ENVIRONMENT, "PREFECT_HOME": str(folder / "prefect")}, check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.monotonic() - before


def by_flow(folder: Path) -> float:
    return timed([sys.executable, "-m", "flows.pipeline"], folder)


def by_hand(folder: Path) -> float:
    """Only the stages' own processes are timed; the outputs move as DVC would move them."""
    seconds = 0.0
    for stage in [name for name in line_stages(folder) if name != PIN]:
        (folder / "models").mkdir(exist_ok=True)
        seconds += timed([sys.executable, "-m", f"tasks.{stage}"], folder)
        if stage == "ingest":
            shutil.copytree(folder / "build" / "data", folder / "data", dirs_exist_ok=True)
    return seconds


def main() -> None:
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    line = float(sys.argv[2]) if len(sys.argv) > 2 else 750.0
    seconds: dict[str, list[float]] = {"flow": [], "hand": []}
    for pair in range(pairs):
        for name in (("flow", "hand") if pair % 2 else ("hand", "flow")):
            with tempfile.TemporaryDirectory() as folder:
                copy_to(Path(folder))
                seconds[name].append((by_flow if name == "flow" else by_hand)(Path(folder)))
            print(f"{name}: {seconds[name][-1]:.1f} s", flush=True)
    cost = statistics.median(seconds["flow"]) - statistics.median(seconds["hand"])
    print(f"Prefect and DVC: {cost:.1f} s a line, {cost / line:.1%} of {line:.0f} s")


if __name__ == "__main__":
    main()
