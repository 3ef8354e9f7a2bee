"""dvc.yaml as the stages read it, rounds unrolled, against what DVC itself makes of it."""

import shutil
from pathlib import Path

import pytest
import yaml
from dvc.repo import Repo

from mlops.config.arms import write_arms
from mlops.config.loader import load_params, write_resolved
from mlops.config.stage_graph import declared_stages, paths, pipeline_stages, unrolled, write_rounds
from rlhf.errors import UserError
from tests.flows.checkout import REPOSITORY


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(REPOSITORY / name, tmp_path / name)
    shutil.copytree(REPOSITORY / "profiles", tmp_path / "profiles")
    return tmp_path


def test_no_rounds_by_default(root: Path) -> None:
    assert load_params(root).rounds == {}
    assert [name for name in declared_stages(root) if "@" in name] == ["ppo@ppo", "ppo@ppo_ptx"]
    assert pipeline_stages(root)[:4] == ["parameters", "ingest", "data.dvc", "validate"]


def test_the_arms_stand_where_their_stage_stands(root: Path) -> None:
    assert pipeline_stages(root)[6:] == ["rm", "judge", "ppo@ppo", "ppo@ppo_ptx", "evaluate", "promote"]
    write_arms(root, "gpu")
    assert pipeline_stages(root)[6:] == ["rm", "judge", "ppo@ppo", "evaluate", "promote"]
    assert "models/policies/ppo" in declared_stages(root)["promote"]["deps"]


def test_rounds_are_unrolled_as_dvc_does(root: Path) -> None:
    write_rounds(root, 3)
    mine = declared_stages(root)
    (root / "build").mkdir()
    write_resolved(load_params(root).stages, root)
    Repo.init(str(root), no_scm=True)
    with Repo(str(root)) as repo:
        theirs = {stage.name: stage for stage in repo.index.stages}
        assert set(mine) == set(theirs)
        assert sum("@" in name for name in mine) == 2 + 15
        for name, stage in theirs.items():
            files = {str(Path(dep.fs_path).relative_to(root)) for dep in stage.deps if not hasattr(dep, "params")}
            assert set(paths(mine[name].get("deps", []))) == files, name
            outs = {str(Path(out.fs_path).relative_to(root)) for out in stage.outs}
            declared = [*mine[name].get("outs", []), *mine[name].get("metrics", [])]
            assert set(paths(declared)) == outs, name
        before = {dep for dep in paths(mine["round_ppo@r2"]["deps"]) if "rounds/" in dep and dep.startswith("models")}
        assert before == {"models/rounds/r1/ppo", "models/rounds/r2/rm"}


def test_rounds_are_written_beside_what_is_there(root: Path) -> None:
    path = root / "params.yaml"
    path.write_text("# mine\nseed: 7 # why\nrounds: {}\nprofile: gpu\n")
    write_rounds(root, 2)
    text = path.read_text()
    assert text.startswith("# mine\nseed: 7 # why\nprofile: gpu\n")
    assert yaml.safe_load(text)["rounds"] == unrolled(2)
    assert list(load_params(root).rounds) == ["r1", "r2"]
    write_rounds(root, 3)
    write_rounds(root, 3)
    assert path.read_text().count("rounds:") == 1
    assert load_params(root).rounds["r3"].policy == "models/rounds/r2/ppo"


def test_a_round_that_cannot_be_is_one_line(root: Path) -> None:
    (root / "params.yaml").write_text("seed: 1\nprofile: cpu\nrounds: {r1: {number: 0}}\n")
    with pytest.raises(UserError, match="rounds"):
        load_params(root)
    (root / "dvc.yaml").write_text("stages: [1]\n")
    with pytest.raises(UserError, match="no stages found"):
        declared_stages(root)
