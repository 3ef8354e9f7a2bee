"""From a finished evaluation to a served champion: registry, lineage, card, a real server and its answer."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from mlflow import MlflowClient

from rlhf.errors import UserError
from rlhf.model.chat_format import ChatFormatError, PromptCodec
from rlhf.model.load import load_policy
from rlhf.model.sampling import Sampling, sample_responses
from rlhf.model.tokenizer import load_tokenizer
from rlhf.training.seeding import generator
from tasks.promote import register
from tests.tasks.small_pipeline import PROFILE, SmallPipeline, Undisturbed

OPEN = "promote: {min_win_rate: 0, kl_band: 1000000, max_tax: 1, max_mean_tax: 1, max_toxic: 1}"


class Promotion:
    """The small pipeline's evaluate and promote, with the profile's gates to choose."""

    def __init__(self, pipeline: SmallPipeline) -> None:
        self.pipeline = pipeline
        self.store = f"sqlite:///{pipeline.root}/mlflow.db"
        self.client = MlflowClient(self.store, self.store)

    def run(self, section: str) -> str:
        profile = self.pipeline.root / "profiles" / "mini.yaml"
        profile.write_text(PROFILE.replace("promote: {}", section))
        try:
            return self.pipeline.finish("promote")
        finally:
            profile.write_text(PROFILE)

    def metrics(self) -> dict[str, object]:
        return dict(json.loads((self.pipeline.root / "metrics" / "promote.json").read_text()))

    def alias(self, name: str, kind: str = "policy") -> str:
        return str(self.client.get_model_version_by_alias(f"instructflow-{kind}", name).version)

    def folder(self) -> list[str]:
        return sorted(path.name for path in (self.pipeline.root / "models" / "promoted").iterdir())


@pytest.fixture(scope="module")
def promotion(small_pipeline: SmallPipeline, undisturbed: Undisturbed) -> Promotion:
    assert undisturbed
    small_pipeline.finish("evaluate")
    return Promotion(small_pipeline)


def test_the_first_that_passes_is_the_champion(promotion: Promotion) -> None:
    said = promotion.run(OPEN)
    assert "promote: version 1 of instructflow-policy is the champion" in said
    assert promotion.metrics()["promote/passed"] == 1
    assert promotion.alias("champion") == promotion.alias("challenger") == promotion.alias("champion", "rm") == "1"
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(promotion.folder())
    card = (promotion.pipeline.root / "models" / "promoted" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "transformers"
    assert "rlhf" in front["tags"]
    assert "Not promoted" not in card
    assert "embedded world" in card
    usage = card.split("```python\n")[1].split("```")[0]  # the card's lines run as printed
    used = subprocess.run([sys.executable, "-c", usage], cwd=promotion.pipeline.root, capture_output=True, text=True)
    assert used.returncode == 0, used.stderr
    assert used.stdout.startswith("Why is the sky blue?")
    tags = promotion.client.get_model_version("instructflow-policy", "1").tags
    data = (promotion.pipeline.root / "data" / "rm.jsonl").read_bytes()
    assert tags["data_rm_md5"] == hashlib.md5(data).hexdigest()
    assert {"seed", "profile", "data_version", "run_name"} <= set(tags)
    assert "version 1 of" in promotion.run(OPEN.replace("max_toxic: 1", "max_toxic: 0.99"))  # not registered twice


def test_a_missed_gate_leaves_the_champion_and_says_by_how_much(promotion: Promotion) -> None:
    folder = promotion.pipeline.root / "models" / "policies" / "ppo"
    config = json.loads((folder / "config.json").read_text())
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(json.dumps(config | {"note": "another policy"}))
    try:
        said = promotion.run(OPEN.replace("kl_band: 1000000", "kl_band: 1"))
    finally:
        (folder / "config.json").write_text(text)
    assert "win rate against the champion" in said  # measured: equal responses are no regression
    assert "promote: passed: win rate against the champion, low end of its interval 0.5, at least 0.45" in said
    assert (promotion.alias("champion"), promotion.alias("challenger")) == ("1", "2")
    metrics = promotion.metrics()
    assert metrics["promote/passed"] == 0
    assert any("KL to the SFT policy / goal" in str(reason) and "missed by" in str(reason)
               for reason in metrics["reasons"])  # type: ignore[attr-defined]
    assert promotion.folder() == ["README.md"]
    assert "**Not promoted.**" in (promotion.pipeline.root / "models" / "promoted" / "README.md").read_text()


def test_a_champion_that_cannot_answer_the_prompts_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The champion was of another base model, whose template has no system turns; the error named no model."""
    champion = SimpleNamespace(name="instructflow-policy", version="7", tags={})
    registry = SimpleNamespace(champion=lambda: champion, register=lambda *of: SimpleNamespace(version="8"),
                               set_alias=lambda *of: None, folder_of=lambda *of: tmp_path)

    def refused(*of: object) -> float:
        raise ChatFormatError("its chat template refuses a conversation of system, user: no system role")

    monkeypatch.setattr("mlops.release.registry.Registry", lambda *of: registry)
    monkeypatch.setattr("tasks.promote.hash_paths", lambda *of: "content")
    monkeypatch.setattr("tasks.promote.lineage", lambda *of: {})
    monkeypatch.setattr("tasks.promote.win_rate_low", refused)
    params = SimpleNamespace(stages=SimpleNamespace(promote=SimpleNamespace(registry="instructflow"), promoted="ppo"),
                             profile="smoke", seed=1)
    with pytest.raises(UserError, match=r"^the champion, instructflow-policy version 7, cannot answer the held-out "
                                        r"prompts: its chat template refuses .* promote\.registry may name another"):
        register(SimpleNamespace(params=params, root=tmp_path, scratch=tmp_path), [])  # type: ignore[arg-type]


def test_without_an_independent_judge_nothing_is_promoted(promotion: Promotion) -> None:
    path = promotion.pipeline.root / "metrics" / "evaluate.json"
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
        cwd=promotion.pipeline.root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        env={**os.environ, "MLFLOW_TRACKING_URI": promotion.store,
             "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"})  # it looks for uvicorn there
    try:
        while process.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=1)
                break
            except OSError:  # not listening yet
                time.sleep(0.25)
        assert process.poll() is None
        yield f"http://127.0.0.1:{port}/invocations"
    finally:
        os.killpg(process.pid, 15)
        process.wait()


def test_the_champion_answers_a_request(promotion: Promotion, served: str) -> None:
    prompts = ["what color is the ba-do?", "tell me a story."]
    body = {"dataframe_records": [{"prompt": prompt} for prompt in prompts],
            "params": {"max_new_tokens": 12, "temperature": 0.7, "seed": 5}}
    request = urllib.request.Request(served, json.dumps(body).encode(), {"Content-Type": "application/json"})
    answers = json.loads(urllib.request.urlopen(request).read())["predictions"]
    folder = promotion.pipeline.root / "models" / "policies" / "ppo"
    codec = PromptCodec(load_tokenizer(folder))
    sampling = Sampling(12, (codec.eos_id,), codec.pad_id, 0.7)
    ids = sample_responses(load_policy(folder), codec.prompts(prompts), sampling, generator(5, "served"))
    assert answers == [codec.decode(item) for item in ids]
    hello = [{"prompt": "hello"}]
    for odd, said in (
        ({"dataframe_records": hello, "params": {"temperature": -1.0}}, "temperature = -1: must be a number >= 0"),
        ({"dataframe_records": hello, "params": {"max_new_tokens": 0}}, "max_new_tokens = 0: must be >= 1"),
        ({"dataframe_records": hello, "params": {"max_new_tokens": 10**9}}, "tokens = 1000000000: the model has"),
        ({"dataframe_records": [*hello, {"prompt": "a story " * 999}]}, "row 2: "),
        ({"dataframe_records": [{"question": "a"}]}, "a row needs prompt"), ({"inputs": ["a"]}, "a row needs prompt"),
        ({"dataframe_records": [{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}]}, "both prompt and"),
        ({"dataframe_records": [{"messages": [{"role": "nobody", "content": "b"}]}]}, "unknown role: 'nobody'"),
    ):
        request = urllib.request.Request(served, json.dumps(odd).encode(), {"Content-Type": "application/json"})
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request)
        assert refused.value.code == 400
        assert said in json.loads(refused.value.read())["message"]
