"""`instructflow check`: what would stop a run later is found before anything runs, each with what to change."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows import check
from flows.check import Finding, findings, stop_early
from mlops.config.loader import Params, load_profile
from rlhf.errors import UserError
from tests.flows.checkout import REPOSITORY
from tests.tiny_model import comparisons, write_model

Make = Callable[..., Params]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "gpt2", "gpt2")


@pytest.fixture
def make(tmp_path: Path, model: Path) -> Make:
    """make(sections, description) writes a checkout with 400 comparisons and returns its parameters."""
    def made(sections: dict[str, Any] | None = None, description: dict[str, Any] | None = None, rows: int = 400
             ) -> Params:
        (tmp_path / "profiles" / "sources").mkdir(parents=True)
        (tmp_path / "raw").mkdir()
        (tmp_path / "params.yaml").write_text("seed: 1\nprofile: mine\n")
        (tmp_path / "raw" / "pairs.jsonl").write_text("".join(json.dumps(
            {"prompt": f"{question} {number}", "chosen": good, "rejected": bad}) + "\n"
            for number, (question, good, bad) in enumerate(comparisons(rows))))
        (tmp_path / "raw" / "long.jsonl").write_text("".join(json.dumps(
            {"prompt": f"{question} {number}", "chosen": f"{good} " * (30 if number % 50 == 0 else 1)}) + "\n"
            for number, (question, good, _) in enumerate(comparisons(rows))))
        (tmp_path / "raw" / "all-long.jsonl").write_text("".join(json.dumps(  # more than a first look reads
            {"prompt": f"{question} {number}", "chosen": f"{good} " * (5 if number % 2 else 1),
             "rejected": f"no {number}"}) + "\n" for number, (question, good, _) in enumerate(comparisons(2300))))
        files = "../../raw/pairs.jsonl"
        spec = {"sft": [{"files": files, "columns": {"prompt": "prompt", "completion": "chosen"}}],
                "rm": [{"files": files}], "ppo": [{"files": files, "columns": {"prompt": "prompt"}}],
                "rules": {"valid_share": 0.5, "near_duplicates": "keep"}}
        (tmp_path / "profiles" / "sources" / "mine.yaml").write_text(yaml.safe_dump({**spec, **(description or {})}))
        profile = {"ingest": {"source": "files", "spec": "mine"}, "pretrain": {"base_model": str(model)}}
        for section, values in (sections or {}).items():
            profile[section] = {**profile.get(section, {}), **values}
        path = tmp_path / "profiles" / "mine.yaml"
        path.write_text(yaml.safe_dump(profile))
        return Params(1, "mine", load_profile(path))
    return made


def stops(params: Params, root: Path) -> list[Finding]:
    return [item for item in findings(params, root) if item.state == "stop"]


def test_a_good_profile_is_looked_at_from_end_to_end(make: Make, tmp_path: Path) -> None:
    found = list(findings(make(), tmp_path))
    assert {item.what for item in found} >= {"parameters", "files", "machine", "base model", "data", "lengths",
                                             "memory", "disk", "servers"}
    assert not [item for item in found if item.state == "stop"]
    assert not list(tmp_path.glob("inputs/*"))  # it writes nothing


def test_a_base_in_4_bits_needs_its_library(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf.model.nf4.find_spec", lambda name: None)
    found = stops(make({"rm": {"lora_rank": 4, "lora_base": "nf4"}}), tmp_path)
    assert [item.detail for item in found] == ["rm.lora_base = nf4: needs bitsandbytes"]
    assert found[0].change == "pip install 'instructflow[nf4]'"


@pytest.mark.parametrize(("sections", "description", "said", "change"), [
    ({"validate": {"min_k": 4}}, {}, "have 2 completions, and validate.min_k = 4", "validate.min_k: 2"),
    ({"pretrain": {"base_model": "/nothing/here"}}, {}, "no such file or folder", ""),
    ({"ppo": {"processes": 2, "shard": True, "tensor_parallel": 2}}, {},
     "arms.ppo.tensor_parallel = 2: must be 1 for a model of type gpt2", ""),
    ({"sft": {"max_tokens": 200}}, {}, "has 128 positions, and sft.max_tokens makes 200", "sft.max_tokens smaller"),
    ({"rm": {"max_tokens": 8}}, {}, "of the rows are longer and would be dropped", "rm.max_tokens = "),
    ({}, {"ppo": []}, "nothing for ppo", "the pipeline needs"),
    ({}, {"rm": [{"files": "../../raw/none.jsonl"}]}, "no such file", ""),
    ({}, {"rm": [{"files": "../../raw/pairs.jsonl", "columns": {"prompt": "prompt", "chosen": "good",
                                                               "rejected": "rejected"}}]}, "good", ""),
    ({}, {"rules": {"valid_share": 0.0}}, "no prompt is held out", "rules.valid_share"),
    ({"sft": {"max_tokens": 100}, "rm": {"max_tokens": 100}}, {"sft": [
        {"files": "../../raw/long.jsonl", "columns": {"prompt": "prompt", "completion": "chosen"}}]},
     "rows have more than the model's 128 positions, and stage validate stops at them", "rules.tokenizer"),
    ({}, {"rm": [{"files": "../../raw/all-long.jsonl"}], "rules": {"max_completion_chars": 100}},
     "rows are lost (long_completion", "--preview 3"),
    ({"validate": {"max_prompt_chars": 10}}, {}, "prompts are longer than validate.max_prompt_chars = 10", "validate"),
])
def test_what_would_stop_a_run(make: Make, tmp_path: Path, sections: dict[str, Any], description: dict[str, Any],
                               said: str, change: str) -> None:
    params = make(sections, description)
    found = stops(params, tmp_path)
    assert any(said in item.detail and change in item.change for item in found), found
    with pytest.raises(UserError) as caught:
        stop_early(params, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_sample_is_no_verdict_on_later_rows(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the first rows are all filtered away, a run may still find the others: it was refused."""
    params = make(description={"rm": [{"files": "../../raw/pairs.jsonl", "where": {"prompt": {"not": "?"}}},
                                      {"files": "../../raw/sorted.jsonl", "where": {"lang": "en"}}]})
    rows = [{"prompt": f"What is {number}?", "chosen": "a b.", "rejected": "c d.",
             "lang": "de" if number < 20 else "en"} for number in range(40)]
    (tmp_path / "raw" / "sorted.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("SAMPLE", "FURTHER"):
        monkeypatch.setattr(f"rlhf.curation.preview.{name}", 15)
    assert not [item for item in stops(params, tmp_path) if item.what.startswith("data")]
    assert any(item.state == "warn" and "sorted.jsonl: no row in the first 15" in item.detail
               for item in findings(params, tmp_path))


def test_where_others_train_this_machine_s_size_stops_nothing(make: Make, tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    params = make()
    monkeypatch.setattr(check.os, "sysconf", lambda _: 10)
    with pytest.raises(UserError, match="memory"):
        stop_early(params, tmp_path)
    stop_early(params, tmp_path, elsewhere=True)


def test_a_model_whose_weights_are_cut(make: Make, tmp_path: Path, model: Path) -> None:
    params = make()
    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    try:
        assert any("model.safetensors: is damaged" in item.detail for item in stops(params, tmp_path))
    finally:
        weights.write_bytes(whole)


def test_a_value_warm_up_of_most_iterations_is_told(make: Make, tmp_path: Path) -> None:
    params = make({"ppo": {"episodes": 1536, "value_warmup_iterations": 4}})
    assert any(item.state == "warn" and "up to 4 of its 6 iterations" in item.detail
               for item in findings(params, tmp_path))


def test_a_model_without_safetensors(make: Make, tmp_path: Path, model: Path) -> None:
    params = make()
    weights = model / "model.safetensors"
    weights.rename(model.parent / "away")
    try:
        assert any("has no *.safetensors" in item.detail for item in stops(params, tmp_path))
    finally:
        (model.parent / "away").rename(weights)


def test_too_little_disk_and_memory(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = make()
    monkeypatch.setattr(check.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    monkeypatch.setattr(check.os, "sysconf", lambda _: 10)
    assert {item.what for item in stops(params, tmp_path)} == {"disk", "memory"}


def test_few_prompts_and_pairs_are_said(make: Make, tmp_path: Path) -> None:
    found = list(findings(make(rows=60), tmp_path))
    warned = " ".join(item.detail for item in found if item.state == "warn")
    assert "held-out prompts: win rates will have wide intervals" in warned
    assert "comparisons to train on: the reward model will be weak" in warned


@pytest.mark.parametrize(("arguments", "code", "said"), [
    ((), 0, "Nothing would stop the run. Next: instructflow run"),
    (("--profile", "smoke", "--set", "ppo.kl_goal=2"), 0, "Nothing would stop the run"),
    (("--set", "ppo.kl_gaol=2"), 2, "unknown key ppo.kl_gaol; did you mean kl_goal?"),
    (("--set", "ppo.batch_size=100"), 2, "must be a multiple of ppo.minibatch_size"),
    (("--profile", "none"), 2, "unknown profile 'none'"),
])
def test_the_command(arguments: tuple[str, ...], code: int, said: str) -> None:
    command = [sys.executable, "-m", "flows.check", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    assert said in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_paths_are_whole_in_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
                                              ) -> None:
    path, file = (f"/home/someone/{'a-long-folder/' * 6}{name}" for name in ("[a] model", "pairs.csv"))
    found = [Finding("base model", "ok", f"{path}: 1.0M parameters"), Finding("data, rm", "stop", f"{file}: no rows",
             f"python -m tasks.ingest --source {file} --preview 3")]
    monkeypatch.setattr(check, "findings", lambda *_: found)
    monkeypatch.setattr(sys, "argv", ["check"])
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(SystemExit):
        check.main()
    printed = capsys.readouterr().out
    for text in (found[0].detail, found[1].detail, found[1].change):
        assert text in printed
