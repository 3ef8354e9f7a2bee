"""Two rounds of the small pipeline, stage by stage, with simulated labelers and an ensemble that selects."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from mlops.config.loader import load_params
from mlops.config.stage_graph import write_rounds
from mlops.labeling.batch import read_batch
from mlops.labeling.store import LABELS, Batch, Label, LabelStore
from rlhf.data.schema import read_rows
from rlhf.errors import UserError
from rlhf.params import PpoParams, RoundsParams
from rlhf.ppo.kl_controller import beta_rule
from rlhf.training.journal import read_journal
from tasks.rounds.collect import round_prompts
from tasks.rounds.ppo import round_params
from tests.tasks.small_pipeline import PROFILE, SmallPipeline, Undisturbed

ROUNDS = """rounds: {prompts: 12, k: 4, labelers: [labeler-01, labeler-02, labeler-03], overlap: 0.5, per_item: 2,
         episodes: 48, rm_epochs: 2, select: disagreement, ensemble: 2, candidates: 3}
"""
STAGES = ("labels", "rm", "ppo", "scores")


def step(pipeline: SmallPipeline, *words: str, fails: bool = False) -> str:
    done = subprocess.run([sys.executable, "-m", *words], cwd=pipeline.root, env=pipeline.environment, text=True,
                          capture_output=True)
    assert bool(done.returncode) == fails, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr if fails else done.stdout


def metrics(pipeline: SmallPipeline, name: str) -> dict[str, Any]:
    return dict(json.loads((pipeline.root / "metrics" / f"{name}.json").read_text()))


@pytest.fixture(scope="module")
def rounds(small_pipeline: SmallPipeline, undisturbed: Undisturbed) -> Iterator[SmallPipeline]:
    """The small pipeline after two rounds."""
    params, profile = small_pipeline.root / "params.yaml", small_pipeline.root / "profiles" / "mini.yaml"
    before = params.read_text()
    profile.write_text(PROFILE + ROUNDS)
    write_rounds(small_pipeline.root, 2)
    for key in ("r1", "r2"):
        step(small_pipeline, "tasks.rounds.collect", "--round", key)
        step(small_pipeline, "mlops.labeling.terminal", f"feedback/{key}", "--simulate")
        for stage in STAGES:
            step(small_pipeline, f"tasks.rounds.{stage}", "--round", key)
    yield small_pipeline
    params.write_text(before)
    profile.write_text(PROFILE)
    for name in ("feedback", "models/rounds"):
        shutil.rmtree(small_pipeline.root / name)


def test_each_round_samples_the_policy_of_the_one_before(rounds: SmallPipeline) -> None:
    first, second = (read_batch(rounds.root / "feedback" / key) for key in ("r1", "r2"))
    assert {name for item in first[0].values() for name in item.made_by} == {"models/sft"}
    assert {name for item in second[0].values() for name in item.made_by} == {"models/rounds/r1/ppo"}
    assert len(first[0]) == len(second[0]) == 12
    prompts = [{str(item.row["prompt_id"]) for item in batch.values()} for batch, _ in (first, second)]
    assert not prompts[0] & prompts[1]
    assert not Batch(rounds.root / "feedback" / "r2").missing()


def test_the_second_round_s_reward_model_learns_from_all_labels(rounds: SmallPipeline) -> None:
    first, second = (list(read_rows(rounds.root / "feedback" / key / "rm.jsonl")) for key in ("r1", "r2"))
    assert second[: len(first)] == first
    train = [row for row in second if row["split"] == "train"]
    assert {row["labeler_id"] for row in train} <= {"labeler-01", "labeler-02", "labeler-03"}  # no row of data/ trains
    assert metrics(rounds, "round_rm@r2")["rm/train_prompts"] == len(train)
    assert 0 <= metrics(rounds, "round_rm@r2")["rm/accuracy_of_last_on_new"] <= 1
    assert "rm/accuracy_of_last_on_new" not in metrics(rounds, "round_rm@r1")


def test_ppo_goes_on_where_it_was(rounds: SmallPipeline) -> None:
    """The rule for beta goes on with all it remembered, and the warm-up is no longer in sum than one long round's."""
    first, second = (json.loads((rounds.root / f"models/rounds/{key}/ppo/beta_rule.json").read_text())
                     for key in ("r1", "r2"))
    iterations = [len((rounds.root / f"metrics/round_ppo@{key}.csv").read_text().splitlines()) - 1
                  for key in ("r1", "r2")]
    assert first["count"] == iterations[0] > 0
    assert second["count"] == sum(iterations)
    kls = [float(row["ppo/kl"]) for key in ("r1", "r2")
           for row in read_journal(rounds.root / f"metrics/round_ppo@{key}.csv")]
    rule = beta_rule(load_params(rounds.root).stages.arms["ppo"])
    for kl in kls:
        rule.update(kl)
    assert second == {"rule": "step_ahead", **rule.state()}  # as one run of both rounds' iterations
    ppo = PpoParams(episodes=14_000, value_warmup_iterations=5)
    several, one = (round_params(ppo, RoundsParams(episodes=episodes)) for episodes in (4_000, 12_000))
    assert 3 * several.warmup_iterations <= one.warmup_iterations + 1
    assert 3 * several.value_warmup_iterations <= one.value_warmup_iterations + 1
    assert several.value_warmup_iterations > 0


def test_a_round_is_measured(rounds: SmallPipeline) -> None:
    for number, key in enumerate(("r1", "r2"), start=1):
        found = metrics(rounds, f"round_scores@{key}")
        assert found["round/number"] == number
        assert found["round/gold_low"] <= found["round/gold"] <= found["round/gold_high"]
        assert 0 <= found["round/rm_accuracy_on_policy"] <= 1
    assert metrics(rounds, "round_scores@r1")["round/gold_sft"] == metrics(rounds, "round_scores@r2")["round/gold_sft"]


def test_a_stage_of_a_round_run_again_gives_the_same_bytes(rounds: SmallPipeline) -> None:
    folder = rounds.root / "models" / "rounds" / "r2"
    before = {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    for stage in ("collect", "rm", "ppo"):
        step(rounds, f"tasks.rounds.{stage}", "--round", "r2", "--fresh")
    assert {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()} == before


def test_labels_of_people_are_not_orphaned(rounds: SmallPipeline) -> None:
    """Another batch for a round that people have labeled is refused; simulated labels are made again."""
    store = LabelStore(rounds.root / "feedback" / "r2" / LABELS)
    known = store.path.read_bytes()
    try:
        store.add(Label("ada/item-gone/1", "item-gone", "ada", (1, 2, 3, 4)))
        said = step(rounds, "tasks.rounds.collect", "--round", "r2", "--fresh", fails=True)
        assert "1 labels are of another batch" in said
        store.path.write_bytes(known)
        LabelStore(store.path).add(Label("simulated/ada/item-gone", "item-gone", "ada", (1, 2, 3, 4)))
        step(rounds, "tasks.rounds.collect", "--round", "r2", "--fresh")
        step(rounds, "mlops.labeling.terminal", "feedback/r2", "--simulate")
        assert store.path.read_bytes() == known
    finally:
        store.path.write_bytes(known)


def test_missing_labels_and_unknown_rounds_are_one_line(rounds: SmallPipeline) -> None:
    path = rounds.root / "feedback" / "r1" / LABELS
    known = path.read_bytes()
    try:
        path.write_bytes(b"".join(known.splitlines(keepends=True)[:-2]))
        said = step(rounds, "tasks.rounds.labels", "--round", "r1", fails=True)
        assert "2 of 18 labels are missing" in said
        assert "python -m mlops.labeling.terminal feedback/r1 --labeler" in said
    finally:
        path.write_bytes(known)
    assert "no round r9; rounds: r1, r2" in step(rounds, "tasks.rounds.rm", "--round", "r9", fails=True)


def test_where_the_prompts_end(rounds: SmallPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(rounds.root)
    with pytest.raises(UserError, match="3 rounds of 400 need more"):
        round_prompts(RoundsParams(prompts=100, select="disagreement", candidates=4), 3, 1)
