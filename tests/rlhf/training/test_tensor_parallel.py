"""Groups of processes that compute a model together train what one process does, alone or several by FSDP2."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.errors import UserError
from rlhf.model.layout import Layout
from rlhf.params import PpoParams, SftParams
from rlhf.training import tensor_parallel
from tests.rlhf.test_reward_model import rankings
from tests.rlhf.training.test_distributed import Result, Train, assert_same

GROUPS = [("llama", 2, 2, "rm"), ("llama", 2, 2, "sft"), ("qwen2", 2, 2, "ppo"),  # and processes, tensor_parallel
          ("qwen2", 4, 2, "rm"), ("qwen2", 4, 2, "sft"), ("llama", 4, 2, "ppo"), ("llama", 4, 4, "ppo")]


@pytest.fixture(scope="module")
def train(four_heads: dict[str, tuple[Path, Path]], texts: list[str], tmp_path_factory: pytest.TempPathFactory
          ) -> Train:
    demonstrations = [{"prompt": texts[number], "completion": texts[-number - 1], "split": "valid" if number % 4 == 0
                       else "train"} for number in range(32)]
    corpus = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts * 3))
    return Train(four_heads, {"sft": demonstrations, "rm": rankings(40), "ppo": texts[:8]}, corpus, "llama")


def of(train: Train, architecture: str) -> Train:
    return Train(train.folders, train.rows, train.corpus, architecture)


@pytest.fixture(scope="module")
def alone(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Result | None:
    """What one process makes of the Llama by PPO."""
    return train("ppo", tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize(("kind", "processes", "degree", "stage"), GROUPS)
def test_groups_of_processes_train_the_same_model_as_one(train: Train, kind: str, processes: int, degree: int,
                                                         stage: str, tmp_path: Path) -> None:
    some = of(train, kind)
    found = some(stage, tmp_path / "groups", processes=processes, shard=True, tensor_parallel=degree)
    assert_same(some(stage, tmp_path / "one"), found, some.policy)


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_run_in_groups_resumes_with_the_same_bytes_and_without_groups(train: Train, stage: str, tmp_path: Path
                                                                         ) -> None:
    sizes: dict[str, Any] = {"sft": {"batch_size": 4},
                             "ppo": {"episodes": 32, "batch_size": 8, "minibatch_size": 4}}[stage]
    groups: dict[str, Any] = {"processes": 4, "shard": True, "tensor_parallel": 2}
    whole = train(stage, tmp_path / "whole", **groups, **sizes)
    train(stage, tmp_path / "same", stop_after=2, **groups, **sizes)
    sharded: dict[str, Any] = {"processes": 2, "shard": True}
    ways: list[dict[str, Any]] = [{}, sharded, sharded | {"tensor_parallel": 2}]
    for number, way in enumerate(ways):
        shutil.copytree(tmp_path / "same", tmp_path / str(number))
        assert_same(whole, train(stage, tmp_path / str(number), **way, **sizes), train.policy)
    same = train(stage, tmp_path / "same", **groups, **sizes)
    assert whole is not None
    assert same is not None
    assert same.journal == whole.journal
    assert all(torch.equal(value, same.weights[name]) for name, value in whole.weights.items())


def test_a_run_without_groups_goes_on_in_groups(train: Train, alone: Result | None, tmp_path: Path) -> None:
    train("ppo", tmp_path / "run", stop_after=1)
    assert_same(alone, train("ppo", tmp_path / "run", processes=4, shard=True, tensor_parallel=2),
                train.policy)


def test_the_model_s_own_passes_in_groups(train: Train, alone: Result | None, tmp_path: Path,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the fast passes a group samples its rows together."""
    monkeypatch.setenv("INSTRUCTFLOW_FAST", "off")
    found = train("ppo", tmp_path / "plain", processes=4, shard=True, tensor_parallel=2)
    assert_same(alone, found, train.policy)


@pytest.mark.parametrize(("processes", "params", "line"), [
    (2, {"tensor_parallel": 2}, r"ppo\.tensor_parallel = 2: needs ppo\.shard: true"),
    (2, {"tensor_parallel": 2, "shard": True, "lora_rank": 4}, r"cannot be combined with ppo\.lora_rank"),
    (2, {"tensor_parallel": 2, "shard": True, "compile": True}, r"cannot be combined with ppo\.compile"),
    (3, {"tensor_parallel": 2, "shard": True}, r"ppo\.tensor_parallel = 2: must divide 3, the number of processes")])
def test_what_groups_cannot_do_is_refused(processes: int, params: dict[str, Any], line: str,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_parallel, "processes", lambda: processes)
    with pytest.raises(UserError, match=line):
        Layout.of(PpoParams(**params), "ppo")


def test_a_group_stays_on_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_parallel, "processes", lambda: 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"sft\.tensor_parallel = 4: must divide 2, the processes of one machine"):
        Layout.of(SftParams(shard=True, tensor_parallel=4), "sft")


@pytest.mark.parametrize(("config", "line"), [
    ({"num_key_value_heads": 1}, r"must divide the model's num_key_value_heads, 1"),
    ({"intermediate_size": 63}, r"must divide the model's intermediate_size, 63"),
    ({"model_type": "gpt_neox"}, r"tensor_parallel = 2: must be 1 for a model of type gpt_neox; .*llama and qwen2")])
def test_a_model_that_cannot_be_split_is_refused(config: dict[str, Any], line: str, monkeypatch: pytest.MonkeyPatch
                                                 ) -> None:
    monkeypatch.setattr(tensor_parallel, "_groups", tensor_parallel.Groups(2, "sft.tensor_parallel = 2"))
    shape = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
    tensor_parallel.check(type("Config", (), shape)())
    with pytest.raises(UserError, match=line):
        tensor_parallel.check(type("Config", (), shape | config)())
