"""A stage on two machines: the processes meet, give the bytes of two on one machine, and pass exit codes on."""

import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.tasks.small_pipeline import PROFILE, Line, Undisturbed


@pytest.fixture
def two_machines(line: Line, undisturbed: Undisturbed) -> Iterator[None]:
    """Another machine that follows this one; both are this one, of course, and see the same folder."""
    assert undisturbed
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = f"--nnodes=2 --master-addr=127.0.0.1 --master-port={port} --node-rank="
    line.environment["INSTRUCTFLOW_TORCHRUN"] = f"{where}0"
    (line.root / "scratch" / "launch.json").unlink(missing_ok=True)
    shutil.rmtree(line.root / "scratch" / "sft")  # or the run goes on from the end of the undisturbed one
    other = subprocess.Popen([sys.executable, "-m", "tasks.launch"], cwd=line.root,
                             env={**line.environment, "INSTRUCTFLOW_TORCHRUN": f"{where}1"}, stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL)
    yield
    other.kill()
    other.communicate()
    line.environment.pop("INSTRUCTFLOW_TORCHRUN", None)
    (line.root / "profiles" / "mini.yaml").write_text(PROFILE)


def test_two_machines_give_the_bytes_of_two_processes(line: Line, two_machines: None) -> None:
    line.finish("sft")
    together = line.files("sft")
    where = line.environment.pop("INSTRUCTFLOW_TORCHRUN")
    (line.root / "profiles" / "mini.yaml").write_text(PROFILE.replace("sft: {", "sft: {processes: 2, "))
    line.finish("sft")
    assert line.files("sft") == together
    line.environment["INSTRUCTFLOW_TORCHRUN"] = where
    (line.root / "profiles" / "mini.yaml").write_text(PROFILE.replace("sft: {epochs: 8, batch_size: 8",
                                                                      "sft: {epochs: 8, batch_size: 7"))
    process = line.start("sft")
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2
    assert said.count("sft: sft.batch_size = 7: must be a multiple of 2, the number of processes\n") == 1


def test_what_torchrun_does_not_take_is_a_clear_mistake(line: Line, undisturbed: Undisturbed) -> None:
    assert undisturbed
    line.environment["INSTRUCTFLOW_TORCHRUN"] = "--machines 2"
    try:
        process = line.start("sft", "--fresh")
        _, said = process.communicate(timeout=120)
    finally:
        del line.environment["INSTRUCTFLOW_TORCHRUN"]
    assert process.returncode == 2
    assert "sft: INSTRUCTFLOW_TORCHRUN = '--machines 2': not what torchrun takes" in said
