"""Several processes train the same model as one, sharded or not; a run resumes with another number of processes."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf.errors import UserError
from rlhf.training import distributed
from rlhf.training.journal import read_journal
from tests.rlhf.engines.fake_engine import serving
from tests.rlhf.test_reward_model import rankings

STAGES: dict[str, dict[str, Any]] = {
    "sft": {"epochs": 2, "batch_size": 6, "lr": 1e-3, "pretrain_mix": 0.3, "checkpoint": "valid_loss"},
    "rm": {"epochs": 1, "batch_size": 6, "lr": 1e-3, "max_tokens": 60, "checkpoint": "valid_accuracy", "checks": 2},
    "ppo": {"episodes": 48, "batch_size": 12, "minibatch_size": 6, "micro_batch_size": 2, "inner_epochs": 2,
            "max_new_tokens": 8, "lr": 1e-3, "value_lr": 1e-3, "ptx_coef": 0.5, "ptx_batch_size": 5, "ema_decay": 0.5,
            "kl_limit": 0}}
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--module")
ROOT = Path(__file__).resolve().parents[3]


@dataclass
class Result:
    """What a run wrote."""

    weights: dict[str, torch.Tensor]
    journal: list[dict[str, str]]
    metrics: dict[str, float]


@dataclass
class Train:
    """Trains a stage in processes of its own: train("sft", tmp_path / "one", processes=2)."""

    folders: dict[str, tuple[Path, Path]]
    rows: dict[str, list[Any]]
    corpus: Path
    architecture: str = "gpt_neox"

    @property
    def policy(self) -> Path:
        return self.folders[self.architecture][0]

    def scored(self, folder: Path, **task: Any) -> dict[str, float]:
        """What `train_in_processes.score` found."""
        self.run({"stage": "score", "folder": str(folder), "scorer": str(self.folders[self.architecture][1]),
                  "params": {"shard": True}, **task})
        return dict(json.loads((folder / "metrics.json").read_text()))

    def run(self, task: dict[str, Any], launcher: tuple[str, ...] = ()) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
        command = [sys.executable, *(launcher or ("-m",)), "tests.rlhf.training.train_in_processes", json.dumps(task)]
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr

    def __call__(self, stage: str, folder: Path, launcher: tuple[str, ...] = (), processes: int = 1,
                 stop_after: int | None = None, **changes: Any) -> Result | None:
        policy, scorer = self.folders[self.architecture]
        task = {"stage": stage, "folder": str(folder), "policy": str(policy), "scorer": str(scorer),
                "rows": self.rows[stage], "corpus": str(self.corpus), "processes": processes,
                "params": STAGES[stage] | {"precision": "fp32"} | changes}
        if stop_after is not None:
            task["stop_after"] = stop_after
        folder.mkdir(exist_ok=True)
        self.run(task, launcher)
        if stop_after is not None:
            assert not (folder / "model").exists()
            return None
        return Result(load_file(folder / "model" / "model.safetensors"), read_journal(folder / "journal.csv"),
                      json.loads((folder / "metrics.json").read_text()))


@pytest.fixture(scope="module")
def train(model_folders: dict[str, tuple[Path, Path]], texts: list[str],
          tmp_path_factory: pytest.TempPathFactory) -> Train:
    demonstrations = [{"prompt": texts[number], "completion": texts[-number - 1], "split": "valid" if number % 4 == 0
                       else "train"} for number in range(32)]
    corpus = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts * 3))
    return Train(model_folders, {"sft": demonstrations, "rm": rankings(40), "ppo": texts[:8]}, corpus)


@pytest.fixture(scope="module")
def alone(train: Train, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result | None]:
    """The result of one process for each stage."""
    return {stage: train(stage, tmp_path_factory.mktemp(stage)) for stage in STAGES}


def assert_same(one: Result | None, other: Result | None, before: Path) -> None:
    """Both trainings are equal up to rounding: their weights differ by less than 1 % of the change since the start.

    Not entry by entry: Adam takes full steps for gradients that are only rounding errors, such as those of key biases.
    """
    assert one is not None
    assert other is not None
    start = load_file(before / "model.safetensors")
    assert one.weights.keys() == other.weights.keys()
    for name, value in one.weights.items():
        if name in start and "bias" not in name:
            change = (value - start[name]).norm()  # 0 of what LoRA leaves frozen
            assert (other.weights[name] - value).norm() <= 0.01 * change, name
    assert len(one.journal) == len(other.journal) > 3
    for row, second in zip(one.journal, other.journal, strict=True):
        for key, text in row.items():
            assert bool(second[key]) == bool(text), key
            assert float(second[key] or 0) == pytest.approx(float(text or 0), rel=1e-3, abs=1e-5), key
    assert other.metrics == pytest.approx(one.metrics, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("shard", [False, True], ids=["unsharded", "sharded"])
def test_two_processes_train_the_same_model_as_one(train: Train, alone: dict[str, Result | None], stage: str,
                                                   shard: bool, tmp_path: Path) -> None:
    assert_same(alone[stage], train(stage, tmp_path / "two", processes=2, shard=shard), train.policy)


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_train_the_same_adapters_as_one(train: Train, stage: str, tmp_path: Path) -> None:
    """The adapters of a block are sharded with its frozen weights; merging gathers them."""
    lora: dict[str, Any] = {"lora_rank": 4, "lr": 1e-2}
    one = train(stage, tmp_path / "one", **lora)
    assert_same(one, train(stage, tmp_path / "unsharded", processes=2, **lora), train.policy)
    train(stage, tmp_path / "sharded", processes=2, stop_after=2, shard=True, **lora)
    assert_same(one, train(stage, tmp_path / "sharded", processes=2, shard=True, **lora), train.policy)


def test_models_on_one_base_are_sharded_each_and_learn_the_same(train: Train, tmp_path: Path) -> None:
    train("rm", tmp_path / "rm", lora_rank=3, lr=1e-2)
    scorer = tmp_path / "rm" / "model"
    assert (scorer / "adapter" / "base.json").is_file()
    own = Train({train.architecture: (train.policy, scorer)}, train.rows, train.corpus)
    one, two = (own("ppo", tmp_path / str(count), processes=count, shard=count > 1, lora_rank=4, lr=1e-2)
                for count in (1, 2))
    assert_same(one, two, train.policy)


def test_a_sharded_base_in_bfloat16_under_adapters_in_float32(train: Train, tmp_path: Path) -> None:
    """FSDP gathers both types in one group. Rounding to bfloat16 differs with the rows of a batch."""
    lora: dict[str, Any] = {"lora_rank": 4, "lr": 1e-2, "lora_base": "bf16", "precision": "bf16"}
    one, two = (train("sft", tmp_path / str(count), processes=count, shard=count > 1, **lora) for count in (1, 2))
    assert one is not None
    assert two is not None
    start = load_file(train.policy / "model.safetensors")
    for name, value in one.weights.items():
        if "bias" not in name:
            change = (value - start[name]).norm()
            assert (two.weights[name] - value).norm() <= 0.25 * change, name
    assert two.metrics["sft/valid_loss"] == pytest.approx(one.metrics["sft/valid_loss"], rel=0.02)
    assert one.metrics["sft/valid_loss"] < one.metrics["sft/valid_loss_base"] - 0.2


@pytest.mark.parametrize("shard", [False, True], ids=["unsharded", "sharded"])
def test_reused_forward_passes_in_two_processes_change_nothing(train: Train, alone: dict[str, Result | None],
                                                               shard: bool, tmp_path: Path) -> None:
    """Each process reuses one of the two micro-batches of the first update."""
    two = train("ppo", tmp_path / "two", processes=2, shard=shard, reuse_forward_passes=1)
    assert_same(alone["ppo"], two, train.policy)


def test_a_sharded_policy_is_sampled_by_its_own_passes(train: Train, alone: dict[str, Result | None], tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """As every architecture without a decoder of ours is: the processes take different numbers of steps."""
    monkeypatch.setenv("INSTRUCTFLOW_FAST", "off")
    assert_same(alone["ppo"], train("ppo", tmp_path / "two", processes=2, shard=True), train.policy)


def test_processes_that_need_different_numbers_of_passes_make_as_many(train: Train, tmp_path: Path) -> None:
    """A sharded reward model needs all processes in each of its passes: one with shorter responses, which fit into
    fewer passes, left the other waiting for ever."""
    metrics = train.scored(tmp_path, processes=2, pass_tokens=40)
    assert metrics["difference"] < 1e-5
    assert metrics["own"] < metrics["others"] == metrics["all"]


@pytest.mark.parametrize("shard", [False, True], ids=["unsharded", "sharded"])
def test_weights_are_chosen_by_the_reward_model_s_score_in_several_processes(train: Train, shard: bool, tmp_path: Path
                                                                              ) -> None:
    scorer = str(train.folders[train.architecture][1])
    one, two = (train("sft", tmp_path / str(processes), processes=processes, shard=shard and processes > 1,
                      checkpoint="rm_score", reward_model=scorer) for processes in (1, 2))
    assert_same(one, two, train.policy)


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_resumes_with_another_number_of_processes(train: Train, alone: dict[str, Result | None], stage: str,
                                                        tmp_path: Path) -> None:
    train(stage, tmp_path / "many", processes=2, stop_after=1, shard=True)
    train(stage, tmp_path / "many", processes=3, stop_after=2)
    assert_same(alone[stage], train(stage, tmp_path / "many"), train.policy)


@pytest.mark.parametrize("stage", ["sft", "ppo"])
@pytest.mark.parametrize("shard", [False, True], ids=["unsharded", "sharded"])
def test_a_run_of_two_processes_resumes_with_one_two_or_four(train: Train, stage: str, shard: bool, tmp_path: Path
                                                             ) -> None:
    """Sharded or not: with as many processes as before the same bytes, else the same up to rounding."""
    sizes: dict[str, Any] = {"sft": {"batch_size": 4},
                             "ppo": {"episodes": 32, "batch_size": 8, "minibatch_size": 4}}[stage]
    whole = train(stage, tmp_path / "whole", processes=2, shard=shard, **sizes)
    train(stage, tmp_path / "2", processes=2, shard=shard, stop_after=2, **sizes)
    for processes, sharded in ((1, False), (4, not shard)):
        again = tmp_path / str(processes)
        shutil.copytree(tmp_path / "2", again)
        assert_same(whole, train(stage, again, processes=processes, shard=sharded, **sizes), train.policy)
    same = train(stage, tmp_path / "2", processes=2, shard=shard, **sizes)
    assert whole is not None
    assert same is not None
    assert same.journal == whole.journal
    assert all(torch.equal(value, same.weights[name]) for name, value in whole.weights.items())


def test_a_sharded_policy_is_sampled_by_a_server(train: Train, tmp_path: Path) -> None:
    """Its embeddings are tied: the server gets both whole, gathered from two processes."""
    with serving(train.policy) as server:
        one = train("ppo", tmp_path / "one", vllm_url=server.url)
        assert_same(one, train("ppo", tmp_path / "two", processes=2, shard=True, vllm_url=server.url), train.policy)
    assert one is not None
    assert len(one.journal) == 4
    assert all(0 < float(row["ppo/sampler_gap"]) < 1e-4 for row in one.journal)


@pytest.mark.parametrize("shard", [False, True])
def test_responses_drawn_ahead_are_the_same_in_two_processes(train: Train, tmp_path: Path, shard: bool) -> None:
    changes: dict[str, Any] = {"staleness": 1, "rollout_correction": 2.0}
    one = train("ppo", tmp_path / "one", **changes)
    assert_same(one, train("ppo", tmp_path / "two", processes=2, shard=shard, **changes), train.policy)
    assert one is not None
    assert float(one.journal[-1]["ppo/sampler_gap"]) > 1e-6


def test_the_same_number_of_processes_gives_the_same_bytes(train: Train, tmp_path: Path) -> None:
    one = train("sft", tmp_path / "one", processes=2, dropout=0.2)
    train("sft", tmp_path / "other", TORCHRUN, dropout=0.2, stop_after=3)
    other = train("sft", tmp_path / "other", processes=2, dropout=0.2)
    assert one is not None
    assert other is not None
    assert all(torch.equal(value, other.weights[name]) for name, value in one.weights.items())
    assert one.journal == other.journal


def test_a_batch_that_cannot_be_divided_among_the_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "shares", lambda: 3)
    distributed.check_divides(6, "sft.batch_size")
    with pytest.raises(UserError, match=r"sft\.batch_size = 8: must be a multiple of 3, the number of processes"):
        distributed.check_divides(8, "sft.batch_size")
