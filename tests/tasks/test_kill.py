"""Training stages killed with SIGKILL at random moments, checkpoints after every step, so also while one is written:
the finished files have the bytes of a run that nothing disturbed."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
STAGES = ("pretrain", "sft", "rm", "ppo")
PROFILE = """
ingest: {scale: 0.01, corpus_documents: 1200, tax_items: 10}
validate: {}
pretrain: {vocab_size: 400, n_layer: 1, n_head: 2, n_embd: 32, steps: 120, warmup_steps: 5}
sft: {epochs: 8, batch_size: 8, dropout: 0.1}
rm: {max_prompts: 120, max_valid_prompts: 40, batch_size: 4, epochs: 3}
ppo: {episodes: 320, batch_size: 16, minibatch_size: 8, ptx_coef: 0.5, ptx_batch_size: 4, ema_decay: 0.9,
      samples_per_prompt: 2, max_new_tokens: 12}
evaluate: {prompts: 20, tax_items: 10, bootstrap: 100}
"""


class Line:
    """A checkout of links to the code, with small data and models, where single stages run."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("rlhf", "tasks", "dvc.yaml", "raw"):
            (root / name).symlink_to(REPO / name)
        (root / "profiles").mkdir()
        (root / "profiles" / "sources").mkdir()
        (root / "profiles" / "mini.yaml").write_text(PROFILE)
        (root / "params.yaml").write_text("seed: 1\nprofile: mini\n")
        self.environment = {**os.environ, "INSTRUCTFLOW_MIRROR": "off", "INSTRUCTFLOW_CHECKPOINT_SECONDS": "0",
                            "OMP_NUM_THREADS": "1"}

    def start(self, stage: str, *flags: str) -> "subprocess.Popen[str]":
        return subprocess.Popen([sys.executable, "-m", f"tasks.{stage}", *flags], cwd=self.root, env=self.environment,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)

    def finish(self, stage: str) -> str:
        process = self.start(stage)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        return out

    def files(self, stage: str) -> dict[str, str]:
        """MD5 of each output."""
        paths = [*(self.root / "models" / stage).rglob("*"), *(self.root / "metrics").glob(f"{stage}*")]
        return {str(path.relative_to(self.root)): hashlib.md5(path.read_bytes()).hexdigest()
                for path in sorted(paths) if path.is_file()}

    def steps_saved(self, stage: str) -> int:
        return len(list(self.root.glob(f"scratch/{stage}/*/checkpoints/step-*.json")))


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Line:
    made = Line(tmp_path_factory.mktemp("line"))
    made.finish("ingest")
    shutil.copytree(made.root / "build" / "data", made.root / "data")
    (made.root / "metrics" / "validate.json").write_text("{}\n")
    return made


@pytest.fixture(scope="module")
def undisturbed(line: Line) -> dict[str, tuple[dict[str, str], float]]:
    """Outputs and seconds of each training stage, run once from start to end."""
    found = {}
    for stage in STAGES:
        before = time.monotonic()
        line.finish(stage)
        found[stage] = (line.files(stage), time.monotonic() - before)
    return found


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
def test_a_killed_stage_ends_with_the_same_bytes(line: Line, undisturbed: dict[str, tuple[dict[str, str], float]],
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
        line: Line, undisturbed: dict[str, tuple[dict[str, str], float]], stage: str, trial: int) -> None:
    files, seconds = undisturbed[stage]
    kill_until_done(line, stage, seconds, random.Random(f"{stage} {trial}"), 1 + trial % 3)
    assert line.files(stage) == files


def test_sigterm_saves_and_status_says_where_a_run_goes_on(
        line: Line, undisturbed: dict[str, tuple[dict[str, str], float]]) -> None:
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
        line: Line, undisturbed: dict[str, tuple[dict[str, str], float]]) -> None:
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
        line: Line, undisturbed: dict[str, tuple[dict[str, str], float]]) -> None:
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
    assert 0 <= found["eval/rm_prefers_ppo_to_sft_low"] <= found["eval/rm_prefers_ppo_to_sft_high"] <= 1
    assert "Not measured: there is no win rate against SFT." in page


def test_other_parameters_start_afresh_and_a_folder_that_cannot_be_written_says_so(
        line: Line, undisturbed: dict[str, tuple[dict[str, str], float]]) -> None:
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
