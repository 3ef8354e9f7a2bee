"""Training stages killed with SIGKILL at random moments, checkpoints after every step, so also while one is written:
the finished files have the bytes of a run that nothing disturbed."""

import json
import os
import random
import re
import shutil
import signal
import time

import pytest

from mlops.config.paths import metrics_of
from tests.tasks.small_pipeline import PROFILE, STAGES, SmallPipeline, Undisturbed, named


def kill_until_done(pipeline: SmallPipeline, stage: str, steps: int, rng: random.Random, kills: int) -> int:
    """Starts a stage of `steps` steps afresh and kills it `kills` times, each after a random step that it still has
    to do; returns the number of kills that hit a run with a checkpoint."""
    shutil.rmtree(pipeline.root / "scratch" / named(stage))
    hits = 0
    for _ in range(kills):
        process = pipeline.start(stage)
        pipeline.wait_for_step(stage, pipeline.saved_step(stage) + rng.randint(1, max(1, steps // 4)), process)
        time.sleep(rng.uniform(0, 0.1))  # a moment within a step, so also while a checkpoint is written
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            hits += pipeline.saved_step(stage) > 0
        process.communicate()
    pipeline.finish(stage)
    return hits


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_a_killed_stage_ends_with_the_same_bytes(small_pipeline: SmallPipeline, undisturbed: Undisturbed,
                                                 stage: str) -> None:
    assert len(undisturbed[stage]) > 4
    steps = small_pipeline.steps(stage)
    assert kill_until_done(small_pipeline, stage, steps, random.Random(stage), 1) == 1
    assert small_pipeline.files(stage) == undisturbed[stage]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "judge"])  # it trains as rm does
@pytest.mark.parametrize("trial", range(6))
def test_any_number_of_kills_at_any_moment_changes_no_byte(
        small_pipeline: SmallPipeline, undisturbed: Undisturbed, stage: str, trial: int) -> None:
    steps = small_pipeline.steps(stage)
    kill_until_done(small_pipeline, stage, steps, random.Random(f"{stage} {trial}"), 1 + trial % 3)
    assert small_pipeline.files(stage) == undisturbed[stage]


def test_sigterm_saves_and_status_says_where_a_run_goes_on(
        small_pipeline: SmallPipeline, undisturbed: Undisturbed) -> None:
    shutil.rmtree(small_pipeline.root / "scratch" / "sft")
    assert "starts from the beginning: nothing is saved" in small_pipeline.start("sft", "--status").communicate()[0]
    process = small_pipeline.start("sft")
    small_pipeline.wait_for_step("sft", 1, process)
    process.terminate()
    _, err = process.communicate(timeout=600)
    assert process.returncode == 128 + signal.SIGTERM
    step = int(err.rsplit("after step ", 1)[1].split(";")[0])
    said = small_pipeline.start("sft", "--status").communicate()[0]
    assert re.search(rf"after step {step:,} \(saved \d+ min ago; before it: {step - 1}\)", said)
    small_pipeline.finish("sft")
    assert small_pipeline.files("sft") == undisturbed["sft"]
    assert "a run with these inputs has finished" in small_pipeline.start("sft", "--status").communicate()[0]


def test_a_model_taken_as_it_is_gives_every_output_of_the_stage(
        small_pipeline: SmallPipeline, undisturbed: Undisturbed) -> None:
    files = undisturbed["pretrain"]
    taken = small_pipeline.root / "taken"
    shutil.copytree(small_pipeline.root / "models" / "pretrain", taken)
    profile = small_pipeline.root / "profiles" / "mini.yaml"
    profile.write_text(PROFILE.replace("pretrain: {", f"pretrain: {{base_model: {taken}, "))
    try:
        small_pipeline.finish("pretrain")
    finally:
        profile.write_text(PROFILE)
    assert set(small_pipeline.files("pretrain")) == set(files)
    model = "models/pretrain/model.safetensors"
    assert small_pipeline.files("pretrain")[model] == files[model]
    shutil.rmtree(small_pipeline.root / "models" / "pretrain")
    small_pipeline.finish("pretrain")
    assert small_pipeline.files("pretrain") == files


def test_people_s_data_has_no_gold_score_and_no_made_up_tax(
        small_pipeline: SmallPipeline, undisturbed: Undisturbed) -> None:
    assert undisturbed
    source, tax = small_pipeline.root / "data" / "source.json", small_pipeline.root / "data" / "tax"
    before = source.read_text()
    tax.rename(small_pipeline.root / "tax")
    tax.mkdir()
    source.write_text('{"source": "described"}\n')
    try:
        small_pipeline.finish("ppo")
        small_pipeline.finish("evaluate")
        ppo, found = (json.loads((small_pipeline.root / f"{metrics_of(stage)}.json").read_text())
                      for stage in ("ppo@ppo", "evaluate"))
        page = (small_pipeline.root / "reports" / "report.html").read_text()
    finally:
        source.write_text(before)
        tax.rmdir()
        (small_pipeline.root / "tax").rename(tax)
        small_pipeline.finish("ppo")  # as it was, for the tests after this one
    assert small_pipeline.files("ppo") == undisturbed["ppo"]
    assert not [name for name in (*ppo, *found) if "gold" in name or "win_rate" in name
                or name.startswith(("tax", "answer_bits"))]
    assert found["corpus_bits_tax/ppo_low"] <= found["corpus_bits_tax/ppo_high"]  # their own text can be measured
    assert 0 <= found["eval/rm_prefers_vs_sft_low"] <= found["eval/rm_prefers_vs_sft_high"] <= 1
    assert "Not measured: no win rate against SFT." in page


def test_other_parameters_start_afresh_and_a_folder_that_cannot_be_written_says_so(
        small_pipeline: SmallPipeline, undisturbed: Undisturbed) -> None:
    profile = small_pipeline.root / "profiles" / "mini.yaml"
    profile.write_text(PROFILE.replace("sft: {epochs: 8", "sft: {epochs: 7"))
    try:
        said = small_pipeline.start("sft", "--status").communicate()[0]
        assert "starts from the beginning" in said
        assert "checkpoints of 1 other inputs are not used" in said
    finally:
        profile.write_text(PROFILE)
    small_pipeline.environment["INSTRUCTFLOW_CHECKPOINT_SECONDS"] = "often"
    try:
        process = small_pipeline.start("sft", "--fresh")
        _, err = process.communicate()
        assert process.returncode == 2
        assert "INSTRUCTFLOW_CHECKPOINT_SECONDS = 'often' in the environment: must be a number >= 0" in err
    finally:
        small_pipeline.environment["INSTRUCTFLOW_CHECKPOINT_SECONDS"] = "0"
    assert small_pipeline.files("sft") == undisturbed["sft"]
