"""dvc.yaml declares every file that a stage's outputs depend on: the stage's whole import closure."""

import re
from pathlib import PurePosixPath

import pytest

from mlops.config.stage_graph import declared_stages, paths, write_rounds  # noqa: F401
from tests.closure import REPO, closure

# What a stage imports and no output depends on.
EXCEPTIONS = {
    "tasks/mirror": "sends the journal to MLflow, beside the stage and after it",
}


def module_of(command: str) -> str:
    found = re.search(r"(tasks\.[\w.]+)", command)
    assert found, command
    return found[1]


STAGES = declared_stages(REPO)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_declares_its_import_closure(stage: str) -> None:
    declared = paths(STAGES[stage]["deps"])
    missing = [name for name in sorted(closure(module_of(STAGES[stage]["cmd"]), leave_out=tuple(EXCEPTIONS)))
               if not any(PurePosixPath(name).is_relative_to(dep) for dep in declared)]
    assert not missing, f"{stage} does not declare {len(missing)}: {', '.join(missing)}"
