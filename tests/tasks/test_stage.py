"""The key of a stage's checkpoints covers code, outside inputs, library versions; other versions are said."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flows.stages import NO_RETRY
from mlops.config import versions
from mlops.config.inputs import link_inputs
from mlops.config.loader import load_params
from rlhf.errors import TrainingFailed, Unavailable, UserError
from tasks.stage import AWAY, Stage, code_hash, config_hash, fail_with_peer, run_stage, warn_of_other_versions
from tests.tasks.small_pipeline import SmallPipeline, Undisturbed


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    base = tmp_path / "base"
    files = {
        root / "params.yaml": "seed: 1\nprofile: mine\n",
        root / "profiles" / "mine.yaml": f"sft: {{reward_model: {base}}}\n",
        root / "dvc.yaml": "stages:\n  sft:\n    cmd: python -m tasks.sft\n"
                           "    deps: [rlhf/code.py, models/pretrain, inputs/sft]\n"
                           '    params: [seed, {"profiles/mine.yaml": [sft]}]\n',
        root / "rlhf" / "code.py": "1\n", root / "models" / "pretrain" / "config.json": "{}",
        base / "weights": "1"}
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def key(root: Path) -> str:
    params = load_params(root)
    link_inputs("sft", params, root)
    return config_hash("sft", params, root)


def test_a_change_of_code_outside_input_versions_or_fast_paths_is_another_key(
        root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [key(root), key(root)]
    assert len(set(keys)) == 1
    (root / "rlhf" / "code.py").write_text("2\n")
    keys.append(key(root))
    (root.parent / "base" / "weights").write_text("2")
    keys.append(key(root))
    (root.parent / "base" / "added").write_text("2")
    keys.append(key(root))
    monkeypatch.setenv("INSTRUCTFLOW_FAST", "off")
    keys.append(key(root))
    monkeypatch.setattr(versions, "installed", lambda: {"torch": "9", "transformers": "9", "tokenizers": "9"})
    keys.append(key(root))
    assert len(set(keys)) == len(keys) - 1


def test_kept_results_belong_to_the_code_and_not_to_the_data(root: Path) -> None:
    before = code_hash("sft", root)
    (root / "models" / "pretrain" / "config.json").write_text("[]")
    assert code_hash("sft", root) == before
    (root / "rlhf" / "code.py").write_text("2\n")
    assert code_hash("sft", root) != before


def test_a_model_of_other_versions_is_said_and_each_model_records_its_own(
        root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = Stage("sft", load_params(root), root, root / "scratch")
    (root / "scratch" / "model").mkdir(parents=True)
    (root / "scratch" / "model" / "config.json").write_text("{}")
    stage.publish("model", "models/pretrain")
    assert json.loads((root / "models" / "pretrain" / versions.RECORD).read_text()) == versions.installed()
    warn_of_other_versions(stage)
    assert capsys.readouterr().err == ""
    (root / "models" / "pretrain" / versions.RECORD).write_text('{"torch": "1.0"}')
    warn_of_other_versions(stage)
    said = capsys.readouterr().err
    assert said.startswith("sft: warning: models/pretrain was made with torch 1.0 (installed: ")
    assert said.count("\n") == 1


def test_a_missing_input_names_what_makes_it(root: Path) -> None:
    (root / "models" / "pretrain" / "config.json").unlink()
    (root / "models" / "pretrain").rmdir()
    with pytest.raises(UserError, match="models/pretrain: missing, and stage sft needs it"):
        key(root)


def test_show_prints_what_training_makes_of_the_first_rows(small_pipeline: SmallPipeline, undisturbed: Undisturbed
                                                           ) -> None:
    """Text, ids, tokens, mask and stop tokens, a line for each answer; nothing is trained; `| head` is no error."""
    assert undisturbed

    def shown(stage: str, end: str = "") -> "subprocess.CompletedProcess[str]":
        return subprocess.run(["sh", "-c", f"{sys.executable} -m tasks.{stage} --show 3 {end}"], text=True,
                              cwd=small_pipeline.root, env=small_pipeline.environment, capture_output=True)

    before = sorted((small_pipeline.root / "scratch").rglob("*"))
    for stage in ("sft", "rm", "ppo"):
        done = shown(stage)
        assert done.returncode == 0, done.stderr
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        assert {row["row"] for row in rows} == {1, 2, 3}
        assert all(len(row["ids"]) == len(row["tokens"]) == len(row["mask"]) for row in rows)
        assert all(row["ids"][-1] in row["stop_ids"] for row in rows) == (stage != "ppo")
    assert shown("rm", end="| head -1").stderr == ""
    assert sorted((small_pipeline.root / "scratch").rglob("*")) == before


@pytest.mark.parametrize(("code", "said", "line"), [
    (137, "", "rm: another process of this training was killed (SIGKILL; by the system where memory runs out); run the "
              "same command to resume"),
    (3, "rm: no space left", "rm: no space left"),
    (1, "", "rm: another process of this training ended (exit code 1); what it said is above")])
def test_what_a_stage_says_when_one_of_its_processes_ends(code: int, said: str, line: str,
                                                          monkeypatch: pytest.MonkeyPatch,
                                                          capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("rlhf.training.distributed.end_of_fork", lambda: (code, said))
    with pytest.raises(SystemExit) as ended:
        fail_with_peer("rm")
    assert (ended.value.code, capsys.readouterr().err) == (code, f"{line}\n")


@pytest.mark.parametrize(("error", "code"), [(UserError("a"), 2), (TrainingFailed("b"), 4), (Unavailable("c"), AWAY),
                                             (KeyboardInterrupt("stopped; run the same command to resume"), 130)])
def test_how_a_stage_ends(root: Path, error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch,
                          capsys: pytest.CaptureFixture[str]) -> None:
    """Only what a later try may mend is tried again by a flow."""
    monkeypatch.chdir(root)
    monkeypatch.setattr("sys.argv", ["tasks.sft"])
    monkeypatch.setattr("tasks.stage.die_with_parent", lambda: None)
    monkeypatch.setattr("tasks.stage._start_uploader", lambda stage: None)

    def body(stage: Stage) -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        run_stage("sft", body)
    assert (ended.value.code, capsys.readouterr().err) == (code, f"sft: {error}\n")
    assert (code in NO_RETRY) == (code not in (AWAY, 130))
