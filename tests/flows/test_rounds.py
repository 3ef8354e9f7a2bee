"""Flow rounds against a checkout of shell stages: waiting for people, going on, resuming; labels under DVC."""

import asyncio
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import yaml
from prefect.client.schemas.objects import FlowRun
from prefect.states import Suspended

from flows.resume_rounds import missing_labels
from flows.rounds import Waiting, rounds, run_rounds, workdir_of
from flows.stages import StageFailed
from mlops.labeling.batch import Assignment, Item, item_id, write_batch
from mlops.labeling.store import LABELS, Label, LabelStore
from rlhf.errors import UserError
from tests.flows.checkout import REPOSITORY, Checkout

ROW = {"prompt_id": "p1", "user_id": "u", "source": "customer", "split": "train", "use_case": "chat", "prompt": "Why?"}
TEXTS = ("because", "no idea")
STAGES = """vars: [params.yaml]
stages:
  sft:
    cmd: echo sft >> order.log && sh sft.sh
    deps: [sft.sh]
    outs: [models/sft]
"""
PARTS = {  # stage: deps, outs, metrics
    "round_collect": (["${item.policy}"], ["feedback/${key}/items.jsonl", "feedback/${key}/assignments.jsonl"], ""),
    "round_labels": (["feedback/${key}/items.jsonl", "feedback/${key}/labels.jsonl"], ["feedback/${key}/rm.jsonl"],
                     '{"labels/rows_so_far": 1}'),
    "round_rm": (["feedback/${key}/rm.jsonl"], ["models/rounds/${key}/rm"], ""),
    "round_ppo": (["models/rounds/${key}/rm", "${item.policy}"], ["models/rounds/${key}/ppo"], ""),
    "round_scores": (["models/rounds/${key}/ppo"], [], '{"round/gold": 5.5, "round/kl": 0.25}'),
}


class Rounds(Checkout):
    """`batch` is what every round's collecting makes: one item, two labelers."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(root)
        declared = yaml.safe_load(STAGES)
        item = Item(item_id(ROW, TEXTS), ROW, TEXTS, ("models/sft", "models/sft"))
        self.item = item.item_id
        write_batch(root / "batch", [item], [Assignment(item.item_id, name, (1, 0)) for name in ("ada", "bob")])
        for name, (deps, outs, metrics) in PARTS.items():
            words = [f"echo {name}@${{key}} >> order.log", "mkdir -p metrics feedback/${key} models/rounds/${key}"]
            if name == "round_collect":
                words.append("cp batch/*.jsonl feedback/${key}/")
            words += [f"echo {name} > {out}" for out in outs if name != "round_collect"]
            stage: dict[str, Any] = {"deps": deps, "outs": outs}
            if metrics:
                words.append(f"echo {shlex.quote(metrics)} > metrics/{name}@${{key}}.json")
                stage["metrics"] = [{f"metrics/{name}@${{key}}.json": {"cache": False}}]
            declared["stages"][name] = {"foreach": "${rounds}", "do": {"cmd": " && ".join(words), **stage}}
        self.write("dvc.yaml", yaml.safe_dump(declared, sort_keys=False))
        self.write("params.yaml", "seed: 1\nprofile: small\nrounds: {}\n")
        monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
        monkeypatch.delenv("LABEL_STUDIO_URL", raising=False)

    def label(self, key: str, name: str, ranks: tuple[int, ...] = (1, 2)) -> None:
        store = LabelStore(self.root / "feedback" / key / LABELS)
        store.add(Label(f"{name}/{len(store.all())}", self.item, name, ranks))

    def go(self, **parameters: Any) -> Any:
        return asyncio.run(run_rounds({"labelers": "people", "count": 2, "root": self.root, **parameters}))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rounds:
    return Rounds(tmp_path, monkeypatch)


def after(key: str) -> list[str]:
    return [f"{stage}@{key}" for stage in PARTS if stage != "round_collect"]


def test_rounds_wait_for_people_and_go_on(site: Rounds) -> None:
    waiting = site.go()
    assert isinstance(waiting, Waiting)
    assert str(waiting) == "r1: 0 of 2 labels are there"
    assert site.order() == ["sft", "round_collect@r1"]
    site.label("r1", "ada")
    assert str(site.go()) == "r1: 1 of 2 labels are there"
    site.label("r1", "bob")
    assert str(site.go()) == "r2: 0 of 2 labels are there"
    assert site.order() == ["sft", "round_collect@r1", *after("r1"), "round_collect@r2"]  # nothing ran twice
    for name in ("ada", "bob"):
        site.label("r2", name)
    table = site.go()
    assert table == [{"round": key, "rows so far": 1, "gold": "5.500", "KL": "0.250"} for key in ("r1", "r2")]
    assert [path.name for path in sorted(site.root.glob("feedback/*/labels.jsonl.dvc"))] == ["labels.jsonl.dvc"] * 2
    before = site.order()
    assert site.go() == table
    assert site.order() == before


def test_a_correction_reruns_its_round_and_the_ones_after(site: Rounds) -> None:
    site.go()
    for key in ("r1", "r2"):
        for name in ("ada", "bob"):
            site.label(key, name)
        site.go()
    before = len(site.order())
    site.label("r2", "ada", (2, 1))
    site.go()
    assert site.order()[before:] == ["round_labels@r2"]  # the stand-in makes the same rows of any labels


def test_the_command_says_what_is_missing(site: Rounds) -> None:
    done = subprocess.run([sys.executable, "-m", "flows.rounds", "--count", "1", "--labelers", "people"], cwd=site.root,
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 6
    assert "r1: 0 of 2 labels are there; run the same command when they are complete" in done.stderr
    assert "Traceback" not in done.stderr


def test_simulated_labelers_need_the_embedded_world(site: Rounds) -> None:
    site.write("data/source.json", json.dumps({"source": "described"}))
    failed = site.go(labelers="simulated")
    assert isinstance(failed, StageFailed)
    assert "the data is not from the embedded world" in str(failed)


def test_label_studio_without_its_environment_is_one_line(site: Rounds, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LABEL_STUDIO_URL", "http://127.0.0.1:9")
    failed = site.go()
    assert isinstance(failed, UserError)
    assert "`make labels`" in str(failed)


def test_another_seed_works_in_a_workspace(tmp_path: Path) -> None:
    (tmp_path / "profiles").mkdir()
    (tmp_path / "params.yaml").write_text("seed: 1\nprofile: mine\n")
    (tmp_path / "profiles" / "mine.yaml").write_text("{}\n")
    assert workdir_of({"count": 3}, tmp_path) == tmp_path
    assert workdir_of({"count": 3, "seed": 2}, tmp_path).name == "mine,seed=2,rounds=3"
    assert workdir_of({"count": 3, "prompts": 9}, tmp_path).name == "mine,rounds=3,prompts=9"


def test_what_resumes_a_run(site: Rounds) -> None:
    site.go()
    run = FlowRun(flow_id=UUID(int=0), name="some run", state=Suspended(),
                  parameters={"count": 2, "root": str(site.root), "labelers": "people"})
    assert asyncio.run(missing_labels(run, Path("/nowhere"))) == 2
    site.label("r1", "ada")
    assert asyncio.run(missing_labels(run, Path("/nowhere"))) == 1
    site.label("r1", "bob")
    assert asyncio.run(missing_labels(run, Path("/nowhere"))) == 0


def test_the_flow_is_what_the_deployment_names() -> None:
    deployments = yaml.safe_load((REPOSITORY / "prefect.yaml").read_text())["deployments"]
    mine = next(item for item in deployments if item["name"] == "rounds")
    assert mine["entrypoint"] == "flows/rounds.py:rounds"
    assert rounds.name == "rounds"
    rounds.validate_parameters(mine["parameters"])
