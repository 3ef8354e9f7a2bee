"""dvc.yaml as it stands, with stages that only copy: a change reruns exactly the stages that depend on it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlops.config.arms import write_arms
from mlops.config.stage_graph import write_rounds

REPO = Path(__file__).resolve().parents[1]
# What each stage does here: notes that it ran, and writes outputs that say what went in.
STAND_IN = '''
import hashlib, json, pathlib, sys
sys.path.insert(0, "REPO")
from mlops.config.stage_graph import declared_stages
name = sys.argv[1]
stage = declared_stages(pathlib.Path("."))[name]
open("order.log", "a").write(name + "\\n")
if name == "ingest":
    for file, text in json.load(open("wanted.json")).items():
        path = pathlib.Path("build/data") / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
digest = hashlib.sha256()
for dep in stage["deps"]:
    path = pathlib.Path(dep)
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        digest.update(file.read_bytes() if file.is_file() else b"")
outs = [*stage.get("outs", []), *(list(item)[0] for item in stage.get("metrics", []))]
if name == "parameters":
    from mlops.config.loader import load_params, write_resolved
    outs.pop()  # the file that this writes
    write_resolved(load_params(pathlib.Path(".")).stages, pathlib.Path("."))
for out in outs:
    path = pathlib.Path(out)
    if name == "ingest" and out == "build/data":
        continue
    text = "passed" if name == "validate" else digest.hexdigest()
    if path.suffix:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    else:
        path.mkdir(parents=True, exist_ok=True)
        (path / "file").write_text(text)
'''
DATA = {"sft.jsonl": "s1", "rm.jsonl": "r1", "ppo.jsonl": "p1", "corpus.jsonl": "c1", "tax/cloze.jsonl": "t1",
        "source.json": "{}"}
ARMS = ("ppo@ppo", "ppo@ppo_ptx")


def dvc(root: Path, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=root, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


class Copy:
    """A checkout with the project's dvc.yaml, its commands replaced by the stand-in."""

    def __init__(self, root: Path) -> None:
        self.root = root
        graph: dict[str, Any] = yaml.safe_load((REPO / "dvc.yaml").read_text())
        templates = {name: stage.get("do", stage) for name, stage in graph["stages"].items()}
        made = {out for stage in templates.values()
                for out in [*stage.get("outs", []), *(next(iter(item)) for item in stage.get("metrics", []))]}
        for name, stage in templates.items():
            over = graph["stages"][name].get("foreach", "")
            key = {"${arms}": "@${item}", "${rounds}": "@${key}"}.get(over, "")
            stage["cmd"] = f"{sys.executable} stand_in.py {name}{key}"
            for dep in stage["deps"]:
                path = root / dep
                kept = dep.startswith(("data", "profiles")) or "$" in dep
                if not kept and not any(name.startswith(dep) for name in made):
                    file = path if path.suffix else path / "file"
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_text(f"code of {dep}")
        graph["stages"]["ingest"]["deps"].append("wanted.json")
        (root / "dvc.yaml").write_text(yaml.safe_dump(graph, sort_keys=False))
        (root / "stand_in.py").write_text(STAND_IN.replace("REPO", str(REPO)))
        shutil.copytree(REPO / "profiles", root / "profiles", dirs_exist_ok=True)
        (root / "params.yaml").write_text("seed: 1\nprofile: cpu\nrounds: {}\n")
        write_arms(root)
        (root / "data.dvc").write_text("deps:\n- path: build/data\nouts:\n- path: data\n")
        self.want({})
        dvc(root, "init", "--no-scm", "-q")

    def want(self, changes: dict[str, str]) -> None:
        (self.root / "wanted.json").write_text(json.dumps(DATA | changes))

    def repro(self) -> list[str]:
        """The stages that ran, but `parameters`, which any change of a profile runs."""
        log = self.root / "order.log"
        log.unlink(missing_ok=True)
        dvc(self.root, "repro")
        return [name for name in log.read_text().split() if name != "parameters"] if log.exists() else []

    def pinned(self) -> str:
        return str(yaml.safe_load((self.root / "data.dvc").read_text())["outs"][0]["md5"])


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    made = Copy(tmp_path_factory.mktemp("graph"))
    assert made.repro() == ["ingest", "validate", "pretrain", "sft", "rm", "judge", *ARMS, "evaluate", "promote"]
    assert made.repro() == []
    return made


@pytest.mark.parametrize(("changed", "reruns"), [
    ("sft.jsonl", ["validate", "sft", "rm", "judge", *ARMS, "evaluate", "promote"]),
    ("rm.jsonl", ["validate", "rm", "judge", *ARMS, "evaluate", "promote"]),
    ("ppo.jsonl", ["validate", *ARMS, "evaluate", "promote"]),
    ("tax/cloze.jsonl", ["evaluate", "promote"]),
    ("corpus.jsonl", ["pretrain", "sft", "rm", "judge", *ARMS, "evaluate", "promote"]),
])
def test_a_changed_dataset_is_pinned_anew_and_reruns_what_depends_on_it(copy: Copy, changed: str, reruns: list[str]
                                                                        ) -> None:
    before = copy.pinned()
    copy.want({changed: "changed"})
    assert copy.repro() == ["ingest", *reruns]
    assert copy.pinned() != before
    assert copy.repro() == []
    copy.want({})
    assert copy.repro() == []  # every stage's earlier result is in DVC's cache
    assert copy.pinned() == before


@pytest.mark.parametrize(("section", "change", "reruns"), [
    ("promote", {"max_toxic": 0.1}, ["promote"]), ("evaluate", {"bootstrap": 300}, ["evaluate", "promote"]),
    ("ppo", {"lam": 0.9}, [*ARMS, "evaluate", "promote"]),
    ("rm", {"lr": 1e-5}, ["validate", "rm", "judge", "evaluate", "promote"]),
    ("validate", {"min_k": 3}, ["validate", "evaluate"]), ("rounds", {"k": 5}, []),
])
def test_a_changed_parameter_reruns_its_stage(copy: Copy, section: str, change: dict[str, Any], reruns: list[str]
                                              ) -> None:
    profile = copy.root / "profiles" / "cpu.yaml"
    before = profile.read_text()
    values = yaml.safe_load(before)
    values[section] = {**(values.get(section) or {}), **change}
    profile.write_text(yaml.safe_dump(values))
    assert copy.repro() == reruns  # the stand-in's outputs do not depend on parameters, so nothing below changes
    profile.write_text(before)
    copy.repro()


def test_a_changed_arm_trains_that_arm_and_what_compares_them(copy: Copy) -> None:
    profile = copy.root / "profiles" / "cpu.yaml"
    before = profile.read_text()
    for arm in ("ppo", "ppo_ptx"):
        values = yaml.safe_load(before)
        values["arms"][arm]["kl_goal"] = 0.7
        profile.write_text(yaml.safe_dump(values, sort_keys=False))
        assert copy.repro() == [f"ppo@{arm}", "evaluate", "promote"]
        assert copy.repro() == []
    profile.write_text(before)
    assert copy.repro() == []  # in DVC's cache


def test_another_arm_trains_only_it_and_its_end_leaves_nothing_behind(copy: Copy) -> None:
    profile, params = copy.root / "profiles" / "cpu.yaml", copy.root / "params.yaml"
    before, lines = profile.read_text(), params.read_text()
    values = yaml.safe_load(before)
    values["arms"]["high_goal"] = {"kl_goal": 1.2}
    profile.write_text(yaml.safe_dump(values, sort_keys=False))
    write_arms(copy.root)
    assert copy.repro() == ["ppo@high_goal", "evaluate", "promote"]
    values = yaml.safe_load(before)
    values["promote"]["arm"] = "ppo"
    profile.write_text(yaml.safe_dump(values, sort_keys=False))
    write_arms(copy.root)
    assert copy.repro() == ["evaluate", "promote"]  # of another arm now
    profile.write_text(before)
    write_arms(copy.root)
    assert params.read_text() == lines
    assert not list(copy.root.glob("m*/policies/high_goal*"))
    assert copy.repro() == []


def test_a_profile_of_one_arm_has_one_stage_of_ppo(copy: Copy) -> None:
    write_arms(copy.root, "gpu")
    assert copy.repro() == ["ingest", "validate", "pretrain", "sft", "rm", "judge", "ppo@ppo", "evaluate", "promote"]
    assert [path.name for path in (copy.root / "models" / "policies").iterdir()] == ["ppo"]
    write_arms(copy.root, "cpu")
    assert copy.repro() == []


def test_the_graph_leads_from_every_arm_to_the_evaluation_and_from_one_to_the_gates(copy: Copy) -> None:
    lines = dvc(copy.root, "dag", "--dot").splitlines()
    for arm in ARMS:
        assert f'"{arm}" -> "evaluate";' in lines
    assert '"ppo@ppo_ptx" -> "promote";' in lines
    assert '"ppo@ppo" -> "promote";' not in lines


def test_new_labels_rerun_their_round_and_those_after_it(copy: Copy) -> None:
    for key in ("r1", "r2"):
        path = copy.root / "feedback" / key / "labels.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text(key)
    write_rounds(copy.root, 2)
    stages = ["collect", "labels", "rm", "ppo", "scores"]
    ran = copy.repro()
    assert sorted(ran) == sorted(f"round_{stage}@{key}" for stage in stages for key in ("r1", "r2"))
    assert ran.index("round_ppo@r1") < ran.index("round_collect@r2")
    (copy.root / "feedback" / "r2" / "labels.jsonl").write_text("corrected")
    assert sorted(copy.repro()) == sorted(f"round_{stage}@r2" for stage in stages[1:])
    (copy.root / "feedback" / "r1" / "labels.jsonl").write_text("corrected")
    assert set(copy.repro()) == {*(f"round_{stage}@r1" for stage in stages[1:]),
                                 *(f"round_{stage}@r2" for stage in stages)}
    write_rounds(copy.root, 1)
    assert copy.repro() == []
