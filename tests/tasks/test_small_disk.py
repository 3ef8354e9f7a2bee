"""A disk that fills up in the middle of a stage: one line, code 3, earlier outputs whole; with room, the same bytes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tasks.small_pipeline import SmallPipeline, Undisturbed

PROGRAM = Path(__file__).with_name("on_a_small_disk.py")
NAMESPACE = ["unshare", "--mount"] if os.getuid() == 0 else ["unshare", "--map-root-user", "--mount"]


def possible() -> bool:
    """Whether this user may mount a small file system."""
    return bool(shutil.which("unshare")) and subprocess.run(
        [*NAMESPACE, "mount", "-t", "tmpfs", "none", "/media"], capture_output=True).returncode == 0


def filled_up(pipeline: SmallPipeline, mount: Path, stage: str, share: float) -> dict[str, Any]:
    if not possible():
        pytest.skip("this user may not mount a file system")
    environment = {**pipeline.environment, "INSTRUCTFLOW_CHECKPOINT_SECONDS": "0"}
    done = subprocess.run([*NAMESPACE, sys.executable, str(PROGRAM), str(pipeline.root), str(mount), str(share), stage],
                          env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


LINE = "no space left on the disk of ROOT; free some and run the same command again"


# The reward model trains in two processes, and either may be the one that finds the disk full.
@pytest.mark.parametrize(("stage", "share"), [("ingest", 0.5), ("sft", 0.05), ("rm", 0.1), ("ppo", 0.6)])
def test_a_disk_that_fills_up(small_pipeline: SmallPipeline, undisturbed: Undisturbed, tmp_path: Path, stage: str,
                              share: float) -> None:
    found = filled_up(small_pipeline, tmp_path, stage, share)
    name = "ppo@ppo" if stage == "ppo" else stage
    assert found["code"] == 3, found["said"]
    assert [line for line in found["said"].splitlines() if not line.startswith("WARNING")] == [f"{name}: {LINE}"]
    assert (found["damaged"], found["partial"]) == ([], [])
    assert found["again"] == 0, found["again_said"]
    assert found["different"] == []
