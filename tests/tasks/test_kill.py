"""Training stages killed with SIGKILL at random moments, checkpoints after every step, so also while one is written:
the finished files have the bytes of a run that nothing disturbed."""

import json
import os
import random
import shutil
import signal
import time

import pytest

from tests.tasks.small_pipeline import PROFILE, STAGES, Line, Undisturbed


def kill_until_done(line: Line, stage: str, seconds: float, rng: random.Random, kills: int) -> int:
    """Starts a stage afresh and kills it `kills` times at random moments of its training; returns the kills that hit a
    run that had saved something."""
    shutil.rmtree(line.root / "scratch" / stage)
    hits = 0
    for _ in range(kills):
        process = line.start(stage)
        deadline = time.monotonic() + 60
        before = line.steps_saved(stage)
        while line.steps_saved(stage) == 0 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)  # the imports are over when the first checkpoint is there
        if before:
            time.sleep(rng.uniform(0.5, 0.9) * seconds)
        time.sleep(rng.uniform(0, 0.25) * seconds)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            hits += line.steps_saved(stage) > 0
        process.communicate()
    line.finish(stage)
    return hits


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_a_killed_stage_ends_with_the_same_bytes(line: Line, undisturbed: Undisturbed,
                                                 stage: str) -> None:
    files, seconds = undisturbed[stage]
    assert len(files) > 4
    hits = kill_until_done(line, stage, seconds, random.Random(stage), 1)
    assert hits == 1
    assert line.files(stage) == files


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("trial", range(6))
def test_any_number_of_kills_at_any_moment_changes_no_byte(
        line: Line, undisturbed: Undisturbed, stage: str, trial: int) -> None:
    files, seconds = undisturbed[stage]
    kill_until_done(line, stage, seconds, random.Random(f"{stage} {trial}"), 1 + trial % 3)
    assert line.files(stage) == files


def test_sigterm_saves_and_status_says_where_a_run_goes_on(
        line: Line, undisturbed: Undisturbed) -> None:
    shutil.rmtree(line.root / "scratch" / "sft")
    assert "starts from the beginning: nothing is saved" in line.start("sft", "--status").communicate()[0]
    process = line.start("sft")
    while line.steps_saved("sft") == 0 and process.poll() is None:
        time.sleep(0.02)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    step = int(err.rsplit("after step ", 1)[1].split(";")[0])
    said = line.start("sft", "--status").communicate()[0]
    assert f"goes on after step {step:,} (saved 0 min ago; before it: {step - 1})" in said
    line.finish("sft")
    assert line.files("sft") == undisturbed["sft"][0]
    assert "a run with these inputs has finished" in line.start("sft", "--status").communicate()[0]


def test_a_model_taken_as_it_is_gives_every_output_of_the_stage(
        line: Line, undisturbed: Undisturbed) -> None:
    files, _ = undisturbed["pretrain"]
    taken = line.root / "taken"
    shutil.copytree(line.root / "models" / "pretrain", taken)
    profile = line.root / "profiles" / "mini.yaml"
    profile.write_text(PROFILE.replace("pretrain: {", f"pretrain: {{base_model: {taken}, "))
    try:
        line.finish("pretrain")
    finally:
        profile.write_text(PROFILE)
    assert set(line.files("pretrain")) == set(files)
    model = "models/pretrain/model.safetensors"
    assert line.files("pretrain")[model] == files[model]
    shutil.rmtree(line.root / "models" / "pretrain")
    line.finish("pretrain")
    assert line.files("pretrain") == files


def test_people_s_data_has_no_gold_score_and_no_made_up_tax(
        line: Line, undisturbed: Undisturbed) -> None:
    assert undisturbed
    source, tax = line.root / "data" / "source.json", line.root / "data" / "tax"
    before = source.read_text()
    tax.rename(line.root / "tax")
    tax.mkdir()
    source.write_text('{"source": "described"}\n')
    try:
        line.finish("ppo")
        line.finish("evaluate")
        ppo, found = (json.loads((line.root / "metrics" / f"{stage}.json").read_text())
                      for stage in ("ppo", "evaluate"))
        page = (line.root / "reports" / "report.html").read_text()
    finally:
        source.write_text(before)
        tax.rmdir()
        (line.root / "tax").rename(tax)
    assert not [name for name in (*ppo, *found) if "gold" in name or "tax" in name or "win_rate" in name]
    assert 0 <= found["eval/rm_prefers_vs_sft_low"] <= found["eval/rm_prefers_vs_sft_high"] <= 1
    assert "Not measured: there is no win rate against SFT." in page


def test_other_parameters_start_afresh_and_a_folder_that_cannot_be_written_says_so(
        line: Line, undisturbed: Undisturbed) -> None:
    profile = line.root / "profiles" / "mini.yaml"
    profile.write_text(PROFILE.replace("sft: {epochs: 8", "sft: {epochs: 7"))
    try:
        said = line.start("sft", "--status").communicate()[0]
        assert "starts from the beginning" in said
        assert "checkpoints of 1 other inputs are not used" in said
    finally:
        profile.write_text(PROFILE)
    line.environment["INSTRUCTFLOW_CHECKPOINT_SECONDS"] = "often"
    try:
        process = line.start("sft", "--fresh")
        _, err = process.communicate()
        assert process.returncode == 2
        assert "INSTRUCTFLOW_CHECKPOINT_SECONDS = 'often' in the environment: must be a number >= 0" in err
    finally:
        line.environment["INSTRUCTFLOW_CHECKPOINT_SECONDS"] = "0"
    assert line.files("sft") == undisturbed["sft"][0]
