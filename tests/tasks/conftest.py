"""The small line that several test modules share; whoever changes a file of it puts it back."""

import shutil
import time

import pytest

from tests.tasks.small_line import STAGES, Line, Undisturbed


@pytest.fixture(scope="session")
def line(tmp_path_factory: pytest.TempPathFactory) -> Line:
    made = Line(tmp_path_factory.mktemp("line"))
    made.finish("ingest")
    shutil.copytree(made.root / "build" / "data", made.root / "data")
    (made.root / "metrics" / "validate.json").write_text("{}\n")
    return made


@pytest.fixture(scope="session")
def undisturbed(line: Line) -> Undisturbed:
    """Outputs and seconds of each training stage, run once from start to end."""
    found = {}
    for stage in STAGES:
        before = time.monotonic()
        line.finish(stage)
        found[stage] = (line.files(stage), time.monotonic() - before)
    return found
