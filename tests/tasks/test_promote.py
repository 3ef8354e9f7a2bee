"""From a finished evaluation to a served champion: gates, registry, lineage, card, a real server and its answer."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from mlops.release.gates import against_champion, gates
from rlhf.model.load import load_policy
from rlhf.model.sampling import Sampling, sample_responses
from rlhf.model.tokenizer import PromptCodec, load_tokenizer
from rlhf.params import PromoteParams
from rlhf.training.seeding import generator
from tests.tasks.small_pipeline import PROFILE, Line, Undisturbed

OPEN = "promote: {min_win_rate: 0, kl_band: 1000000, max_tax: 1, max_mean_tax: 1, max_toxic: 1}"
METRICS = {"eval/kl_ppo": 0.5, "eval/toxic_ppo": 0.01, "eval/win_rate_vs_sft": 0.6, "eval/win_rate_vs_sft_low": 0.58,
           "tax/cloze": 0.01, "tax/cloze_low": 0, "tax/wmt": 4.0, "tax_unit/wmt": 100.0, "tax/mean": 0.025}


def test_each_gate_looks_at_its_number() -> None:
    found = {gate.name + gate.rule: gate for gate in gates(METRICS, 0.6, PromoteParams(max_mean_tax=0.02))}
    assert [name for name, gate in found.items() if not gate.passed] == ["alignment tax, meanat most"]
    assert found["alignment tax, meanat most"].text() == "alignment tax, mean 0.025, at most 0.02: missed by 0.005"
    assert found["alignment tax, wmtat most"].value == pytest.approx(0.04)  # BLEU: of 100
    for change, missed in (({"eval/win_rate_vs_sft_low": 0.49}, "win rate against SFT"), ({"eval/kl_ppo": 1.0}, "KL"),
                           ({"eval/kl_ppo": 0.1}, "KL"), ({"eval/toxic_ppo": 0.06}, "toxic"),
                           ({"tax/wmt": 6.0}, "alignment tax, wmt")):
        wrong = [gate for gate in gates(METRICS | change, 0.6, PromoteParams(max_mean_tax=1)) if not gate.passed]
        assert len(wrong) == 1
        assert wrong[0].name.startswith(missed)
    assert against_champion(0.5).passed
    assert not against_champion(0.499).passed


class Promotion:
    """The small line's evaluate and promote, with the profile's gates to choose."""

    def __init__(self, line: Line) -> None:
        self.line = line
        self.client = MlflowClient(f"sqlite:///{line.root}/mlflow.db", f"sqlite:///{line.root}/mlflow.db")

    def run(self, section: str) -> str:
        profile = self.line.root / "profiles" / "mini.yaml"
        profile.write_text(PROFILE.replace("promote: {}", section))
        try:
            return self.line.finish("promote")
        finally:
            profile.write_text(PROFILE)

    def metrics(self) -> dict[str, object]:
        return dict(json.loads((self.line.root / "metrics" / "promote.json").read_text()))

    def alias(self, name: str, kind: str = "policy") -> str:
        return str(self.client.get_model_version_by_alias(f"instructflow-{kind}", name).version)

    def folder(self) -> list[str]:
        return sorted(path.name for path in (self.line.root / "models" / "promoted").iterdir())


@pytest.fixture(scope="module")
def promotion(line: Line, undisturbed: Undisturbed) -> Promotion:
    assert undisturbed
    line.finish("evaluate")
    return Promotion(line)


def test_the_first_that_passes_is_the_champion(promotion: Promotion) -> None:
    said = promotion.run(OPEN)
    assert "promote: version 1 of instructflow-policy is the champion" in said
    assert promotion.metrics()["promote/passed"] == 1
    assert promotion.alias("champion") == promotion.alias("challenger") == promotion.alias("champion", "rm") == "1"
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(promotion.folder())
    card = (promotion.line.root / "models" / "promoted" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "transformers"
    assert "rlhf" in front["tags"]
    assert "Not promoted" not in card
    assert "embedded world" in card
    tags = promotion.client.get_model_version("instructflow-policy", "1").tags
    data = (promotion.line.root / "data" / "rm.jsonl").read_bytes()
    assert tags["data_rm_md5"] == hashlib.md5(data).hexdigest()
    assert {"seed", "profile", "data_version", "line"} <= set(tags)
    assert "version 1 of" in promotion.run(OPEN.replace("max_toxic: 1", "max_toxic: 0.99"))  # not registered twice


def test_a_missed_gate_leaves_the_champion_and_says_by_how_much(promotion: Promotion) -> None:
    folder = promotion.line.root / "models" / "ppo"
    config = json.loads((folder / "config.json").read_text())
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(json.dumps(config | {"note": "another policy"}))
    try:
        said = promotion.run(OPEN.replace("kl_band: 1000000", "kl_band: 1"))
    finally:
        (folder / "config.json").write_text(text)
    assert "win rate against the champion" in said  # measured: equal responses are no regression
    assert "promote: passed: win rate against the champion, high end of its interval 0.5, at least 0.5" in said
    assert (promotion.alias("champion"), promotion.alias("challenger")) == ("1", "2")
    metrics = promotion.metrics()
    assert metrics["promote/passed"] == 0
    assert any("KL to the SFT policy / goal" in str(reason) and "missed by" in str(reason)
               for reason in metrics["reasons"])  # type: ignore[attr-defined]
    assert promotion.folder() == ["README.md"]
    assert "**Not promoted.**" in (promotion.line.root / "models" / "promoted" / "README.md").read_text()


def test_without_an_independent_judge_nothing_is_promoted(promotion: Promotion) -> None:
    path = promotion.line.root / "metrics" / "evaluate.json"
    before = path.read_text()
    path.write_text(json.dumps({key: value for key, value in json.loads(before).items() if "win_rate" not in key}))
    try:
        assert "is not promoted: no independent judge" in promotion.run(OPEN)
        assert "is the champion" in promotion.run(OPEN.replace("max_toxic", "judged: false, max_toxic"))
    finally:
        path.write_text(before)


def test_only_a_decision_where_no_registry_is_named(promotion: Promotion) -> None:
    said = promotion.run(OPEN.replace("{", "{registry: '', "))
    assert "promote: the policy passes every gate; there is no registry to promote it in" in said


@pytest.fixture
def served(promotion: Promotion) -> Iterator[str]:
    """`mlflow models serve` with the champion."""
    promotion.run(OPEN)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/instructflow-policy@champion",
         "--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)],
        cwd=promotion.line.root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        env={**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{promotion.line.root}/mlflow.db",
             "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"})  # it looks for uvicorn there
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=1)
                break
            except OSError:
                time.sleep(0.25)
        yield f"http://127.0.0.1:{port}/invocations"
    finally:
        os.killpg(process.pid, 15)
        process.wait(30)


def test_the_champion_answers_a_request(promotion: Promotion, served: str) -> None:
    prompts = ["what color is the ba-do?", "tell me a story."]
    body = {"dataframe_records": [{"prompt": prompt} for prompt in prompts],
            "params": {"max_new_tokens": 12, "temperature": 0.7, "seed": 5}}
    request = urllib.request.Request(served, json.dumps(body).encode(), {"Content-Type": "application/json"})
    answers = json.loads(urllib.request.urlopen(request, timeout=60).read())["predictions"]
    folder = promotion.line.root / "models" / "ppo"
    codec = PromptCodec(load_tokenizer(folder))
    sampling = Sampling(12, (codec.eos_id,), codec.pad_id, 0.7)
    ids = sample_responses(load_policy(folder), codec.prompts(prompts), sampling, generator(5, "served"))
    assert answers == [codec.decode(item) for item in ids]


def test_chat_shows_models_side_by_side(promotion: Promotion) -> None:
    def chat(*arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run([sys.executable, "-m", "mlops.tools.chat", *arguments], cwd=promotion.line.root,
                              input="what color is the ba-do?\n", capture_output=True, text=True,
                              env={**promotion.line.environment, "COLUMNS": "100"})
    both = chat("sft", "ppo", "--max-new-tokens", "8")
    assert both.returncode == 0, both.stderr
    assert "sft" in both.stdout
    assert "ppo" in both.stdout
    assert both.stdout.count(" rm ") == 2
    assert chat("sft", "ppo", "--max-new-tokens", "8").stdout == both.stdout
    missing = chat("nobody")
    assert missing.returncode == 2
    assert missing.stderr.startswith("chat: nobody: no model here")


