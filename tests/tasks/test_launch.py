"""A stage on two machines: it gives the bytes of two processes on one machine and passes exit codes on."""

import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.tasks.small_pipeline import PROFILE, SmallPipeline, Undisturbed


@pytest.fixture
def two_machines(small_pipeline: SmallPipeline, undisturbed: Undisturbed) -> Iterator[None]:
    """Starts a second node that follows the first; both run on this machine and see the same folder."""
    assert undisturbed
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = f"--nnodes=2 --master-addr=127.0.0.1 --master-port={port} --node-rank="
    small_pipeline.environment["INSTRUCTFLOW_TORCHRUN"] = f"{where}0"
    (small_pipeline.root / "scratch" / "launch.json").unlink(missing_ok=True)
    shutil.rmtree(small_pipeline.root / "scratch" / "sft")  # or the run resumes at the end of the undisturbed one
    other = subprocess.Popen([sys.executable, "-m", "tasks.launch"], cwd=small_pipeline.root,
                             env={**small_pipeline.environment, "INSTRUCTFLOW_TORCHRUN": f"{where}1"},
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    yield
    other.kill()
    other.communicate()
    small_pipeline.environment.pop("INSTRUCTFLOW_TORCHRUN", None)
    (small_pipeline.root / "profiles" / "mini.yaml").write_text(PROFILE)


def test_two_machines_give_the_bytes_of_two_processes(small_pipeline: SmallPipeline, two_machines: None) -> None:
    small_pipeline.finish("sft")
    on_two_machines = small_pipeline.files("sft")
    where = small_pipeline.environment.pop("INSTRUCTFLOW_TORCHRUN")
    (small_pipeline.root / "profiles" / "mini.yaml").write_text(PROFILE.replace("sft: {", "sft: {processes: 2, "))
    small_pipeline.finish("sft")
    assert small_pipeline.files("sft") == on_two_machines
    small_pipeline.environment["INSTRUCTFLOW_TORCHRUN"] = where
    (small_pipeline.root / "profiles" / "mini.yaml").write_text(PROFILE.replace("sft: {epochs: 8, batch_size: 8",
                                                                      "sft: {epochs: 8, batch_size: 7"))
    process = small_pipeline.start("sft")
    _, said = process.communicate(timeout=600)
    assert process.returncode == 2
    assert said.count("sft: sft.batch_size = 7: must be a multiple of 2, the number of processes\n") == 1


def test_arguments_that_torchrun_refuses_are_a_clear_error(small_pipeline: SmallPipeline, undisturbed: Undisturbed
                                                           ) -> None:
    assert undisturbed
    small_pipeline.environment["INSTRUCTFLOW_TORCHRUN"] = "--machines 2"
    try:
        process = small_pipeline.start("sft", "--fresh")
        _, said = process.communicate(timeout=600)
    finally:
        del small_pipeline.environment["INSTRUCTFLOW_TORCHRUN"]
    assert process.returncode == 2
    assert "sft: INSTRUCTFLOW_TORCHRUN = '--machines 2': not what torchrun takes" in said
