"""dvc.yaml declares all that a stage's outputs depend on: the stage's import closure, the parameters that it reads."""

import ast
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml

from mlops.config.inputs import link_all
from mlops.config.loader import load_params, write_resolved
from mlops.config.stage_graph import declared_stages, paths
from tests.closure import REPO, closure, parsed

# What a stage imports and no output depends on.
EXCEPTIONS = {
    "mlops/tracking": "sends the journal to MLflow, beside the stage and after it",
    "mlops/processes.py": "ends a stage with its parent",
}
TEMPLATES: dict[str, dict[str, Any]] = {
    name: stage.get("do", stage) for name, stage in yaml.safe_load((REPO / "dvc.yaml").read_text())["stages"].items()}
# Files outside the checkout that the profile of these tests names.
OUTSIDE = ("rows/a.jsonl", "base/model.safetensors", "base/tokenizer.json", "rm/config.json",
           "judge/model.safetensors", "earlier/config.json", "squad.jsonl")
SECTIONS = ("ingest", "validate", "pretrain", "sft", "rm", "ppo", "evaluate", "promote", "rounds", "arms")


def module_of(stage: str) -> str:
    found = re.search(r"tasks\.[\w.]+", TEMPLATES[stage]["cmd"])
    assert found, stage
    return found[0]


def only_imports(name: str) -> bool:
    """A package's own file with a docstring and imports, which are followed, and nothing else."""
    return name.endswith("__init__.py") and all(isinstance(node, ast.Expr | ast.Import | ast.ImportFrom)
                                                for node in parsed(REPO / name).body)


def needed(stage: str) -> list[str]:
    """The files that a stage must declare."""
    return [name for name in sorted(closure(module_of(stage), leave_out=tuple(EXCEPTIONS)))
            if not only_imports(name)]


@pytest.mark.parametrize("stage", TEMPLATES)
def test_a_stage_declares_its_import_closure(stage: str) -> None:
    declared = paths(TEMPLATES[stage]["deps"])
    missing = [name for name in needed(stage)
               if not any(PurePosixPath(name).is_relative_to(dep) for dep in declared)]
    assert not missing, f"{stage} does not declare {len(missing)}: {', '.join(missing)}"


def test_the_closure_sees_what_functions_import_and_templates() -> None:
    found = closure("tasks.evaluate")
    assert "mlops/reporting/report.py" in found  # imported inside a function
    assert "mlops/reporting/report.html.j2" in found
    assert "rlhf/training/seeding.py" in found
    assert "rlhf/ppo/trainer.py" not in found  # who evaluates does not import PPO


def sections_read(name: str) -> set[str]:
    """The profile's sections that a file reads: `params.stages.ppo`, `stages.ppo`, `profile.ppo`; and `promoted`."""
    return {node.attr for node in ast.walk(parsed(REPO / name)) if isinstance(node, ast.Attribute)
            and node.attr in (*SECTIONS, "promoted")
            and ast.unparse(node.value).split(".")[-1] in ("stages", "profile")}


@pytest.mark.parametrize("stage", TEMPLATES)
def test_a_stage_declares_the_parameters_that_it_reads(stage: str) -> None:
    declared = {section.partition(".")[0] for item in TEMPLATES[stage]["params"] if isinstance(item, dict)
                for keys in item.values() for section in keys}
    declared |= {item for item in TEMPLATES[stage]["params"] if item == "promoted"}
    own = module_of(stage).replace(".", "/") + ".py"
    shared = [name for name in needed(stage)
              if name.startswith(("mlops/release", "mlops/reporting")) and name.endswith(".py")]
    read = {section for name in (own, *shared) for section in sections_read(name)}
    assert not read - declared, f"{stage} reads {read - declared}"


# --- what DVC makes of it -------------------------------------------------------------------------------------------

def dvc(root: Path, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=root, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with the project's code and dvc.yaml, and outputs of every stage as DVC knows finished ones."""
    root = tmp_path_factory.mktemp("finished")
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=REPO, text=True, capture_output=True,
                           check=True).stdout.splitlines()
    for name in files:
        if name.startswith(("rlhf/", "mlops/", "tasks/", "profiles/", "inputs/", "raw/")) or name in (
                "dvc.yaml", "params.yaml"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPO / name, root / name)
    profile: dict[str, Any] = {"rounds": {"k": 5}}  # other sections are missing: their defaults
    profile["arms"] = {"ppo": {}, "ppo_ptx": {"ptx_coef": 0.5}}
    profile["promote"] = {"arm": "ppo_ptx"}
    outside = root.parent / "outside"
    for name in OUTSIDE:
        (outside / name).parent.mkdir(parents=True, exist_ok=True)
        (outside / name).write_text(name)
    profile["ingest"] = {"source": "files", "spec": "mine"}
    profile["validate"] = {"counts": "none"}
    profile["pretrain"] = {"base_model": str(outside / "base")}
    profile["sft"] = {"reward_model": str(outside / "rm")}
    profile["evaluate"] = {"judge": "reward_model", "judge_model": str(outside / "judge"),
                           "others": {"earlier": str(outside / "earlier")},
                           "task_data": {"squad": str(outside / "squad.jsonl")}}
    (root / "profiles" / "cpu.yaml").write_text(yaml.safe_dump(profile))
    (root / "profiles" / "sources" / "mine.yaml").write_text(
        yaml.safe_dump({"sft": [{"files": f"{outside}/rows/*.jsonl"}], "corpus": [{"files": "../../raw/text.jsonl"}]}))
    assert len(link_all(load_params(root), root)) == len(OUTSIDE) + 2  # validate reads the base model's tokenizer too
    for name in ("sft.jsonl", "rm.jsonl", "ppo.jsonl", "corpus.jsonl", "source.json", "tax/cloze.jsonl"):
        for folder in ("data", "build/data"):
            (root / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (root / folder / name).write_text(name)
    for stage in declared_stages(root).values():
        for out in [*paths(stage.get("outs", [])), *paths(stage.get("metrics", []))]:
            path = root / out if PurePosixPath(out).suffix else root / out / "config.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(out)
    write_resolved(load_params(root).stages, root)
    dvc(root, "init", "--no-scm", "-q")
    dvc(root, "commit", "-q", "-f")
    assert "up to date" in dvc(root, "status")
    return root


def named(root: Path) -> set[str]:
    """The stages that `dvc status` names."""
    return {line.rstrip(":") for line in dvc(root, "status").splitlines() if line and not line.startswith(("\t", " "))
            and line.endswith(":")}


def test_any_line_of_any_module_that_a_stage_imports_makes_dvc_name_the_stage(finished: Path) -> None:
    pipeline = [stage for stage in TEMPLATES if not stage.startswith("round_")]
    pairs = sorted({(stage, name) for stage in pipeline for name in needed(stage)})
    for stage, name in random.Random(23).sample(pairs, 20):
        path = finished / name
        before = path.read_bytes()
        path.write_bytes(before + b"# one line more\n")
        assert {stage, f"{stage}@ppo", f"{stage}@ppo_ptx"} & named(finished), f"{name} changed, {stage} is not named"
        path.write_bytes(before)
    assert not named(finished)


@pytest.mark.parametrize(("name", "stages"), [
    ("rows/a.jsonl", {"ingest"}), ("base/model.safetensors", {"validate", "pretrain"}),
    ("base/tokenizer.json", {"validate", "pretrain"}), ("rm/config.json", {"sft"}),
    ("judge/model.safetensors", {"evaluate", "promote"}), ("earlier/config.json", {"evaluate", "promote"}),
    ("squad.jsonl", {"evaluate", "promote"})])
def test_a_changed_file_outside_the_checkout_makes_dvc_name_who_reads_it(finished: Path, name: str, stages: set[str]
                                                                         ) -> None:
    path = finished.parent / "outside" / name
    before = path.read_text()
    path.write_text("other")
    assert named(finished) == stages
    path.write_text(before)
    assert not named(finished)


def test_another_description_of_data_reruns_parameters_alone(finished: Path) -> None:
    other = finished / "profiles" / "sources" / "other.yaml"
    other.write_text("sft: [{files: b.jsonl}]\n")
    assert named(finished) == {"parameters"}
    other.unlink()
    assert not named(finished)
    used = finished / "profiles" / "sources" / "mine.yaml"
    before = used.read_text()
    used.write_text(before + "rules: {valid_share: 0.2}\n")
    write_resolved(load_params(finished).stages, finished)  # as stage parameters does
    assert named(finished) == {"parameters", "ingest"}
    used.write_text(before)
    write_resolved(load_params(finished).stages, finished)
    assert not named(finished)


def test_a_changed_benchmark_file_makes_dvc_name_the_evaluation(finished: Path) -> None:
    path = finished / "profiles" / "benchmarks" / "squad.py"
    before = path.read_bytes()
    path.write_bytes(before + b"# more\n")
    assert named(finished) == {"evaluate"}
    path.write_bytes(before)


def test_a_changed_model_of_one_arm_makes_dvc_name_who_reads_it(finished: Path) -> None:
    for arm, stages in (("ppo", {"ppo@ppo", "evaluate"}), ("ppo_ptx", {"ppo@ppo_ptx", "evaluate", "promote"})):
        path = finished / "models" / "policies" / arm / "config.json"
        before = path.read_text()
        path.write_text("other")
        assert named(finished) == stages
        path.write_text(before)
