"""The smoke pipeline killed with SIGKILL at 40 random moments: every run that gets to its end has the same bytes."""

import hashlib
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.flows.checkout import copy_to

KILLS = int(os.environ.get("KILLS", "40"))
OUTPUTS = ("data", "build", "models", "metrics")


def start(root: Path) -> "subprocess.Popen[str]":
    environment = {name: value for name, value in os.environ.items()
                   if name not in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI")}
    environment |= {"PYTHONPATH": str(root), "PREFECT_HOME": str(root / ".prefect"), "PREFECT_PROFILE": "ephemeral",
                    "INSTRUCTFLOW_CHECKPOINT_SECONDS": "1"}
    return subprocess.Popen([sys.executable, "-m", "flows.pipeline", "--profile", "smoke"], cwd=root, env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def digests(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): hashlib.md5(path.read_bytes()).hexdigest()
            for name in OUTPUTS for path in sorted((root / name).rglob("*")) if path.is_file()}


@pytest.mark.drill
def test_any_moment_of_a_whole_run(tmp_path: Path) -> None:
    undisturbed = start(copy_to(tmp_path / "undisturbed"))
    said = undisturbed.communicate(timeout=1800)[0]
    assert undisturbed.returncode == 0, said
    expected = digests(tmp_path / "undisturbed")
    rng, kills, finished = random.Random(40), 0, 0
    root = copy_to(tmp_path / "killed-0")
    while kills < KILLS or not finished:
        process = start(root)
        try:
            said = process.communicate(timeout=rng.uniform(1, 40) if kills < KILLS else 1800)[0]
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)  # the command alone: its flow and its stages must end by themselves
            process.communicate()
            kills += 1
            continue
        assert process.returncode == 0, said
        assert digests(root) == expected
        finished += 1
        if kills < KILLS:
            root = copy_to(tmp_path / f"killed-{finished}")
    print(f"{kills} kills, {finished} runs to their end")
