"""Several processes give what one gives, sharded or not; a run goes on with another number of them."""


import json
import os
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
from tests.rlhf.ppo.fake_vllm import serving
from tests.rlhf.test_reward_model import rankings

STAGES: dict[str, dict[str, Any]] = {
    "sft": {"epochs": 2, "batch_size": 6, "lr": 1e-3, "pretrain_mix": 0.3, "checkpoint": "valid_loss"},
    "rm": {"epochs": 1, "batch_size": 6, "lr": 1e-3, "max_tokens": 60, "checkpoint": "valid_accuracy", "checks": 2},
    "ppo": {"episodes": 48, "batch_size": 12, "minibatch_size": 6, "micro_batch_size": 2, "inner_epochs": 2,
            "max_new_tokens": 8, "lr": 1e-3, "value_lr": 1e-3, "ptx_coef": 0.5, "ptx_batch_size": 5, "ema_decay": 0.5,
            "kl_limit": 0}}
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--module")
REPO = Path(__file__).resolve().parents[2]


@dataclass
class Result:
    """What a run has left."""

    weights: dict[str, torch.Tensor]
    journal: list[dict[str, str]]
    metrics: dict[str, float]


@dataclass
class Work:
    """Runs a stage in processes of its own: work("sft", tmp_path / "one", processes=2)."""

    folders: dict[str, tuple[Path, Path]]
    rows: dict[str, list[Any]]
    corpus: Path
    architecture: str = "gpt_neox"

    @property
    def policy(self) -> Path:
        return self.folders[self.architecture][0]

    def __call__(self, stage: str, folder: Path, launcher: tuple[str, ...] = (), processes: int = 1,
                 stop_after: int | None = None, **changes: Any) -> Result | None:
        policy, scorer = self.folders[self.architecture]
        given = {"stage": stage, "folder": str(folder), "policy": str(policy), "scorer": str(scorer),
                 "rows": self.rows[stage], "corpus": str(self.corpus), "processes": processes,
                 "params": STAGES[stage] | {"precision": "fp32"} | changes}
        if stop_after is not None:
            given["stop_after"] = stop_after
        folder.mkdir(exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
        run = subprocess.run([sys.executable, *(launcher or ("-m",)), "tests.rlhf.parallel_work", json.dumps(given)],
                             cwd=REPO, env=environment, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr
        if stop_after is not None:
            assert not (folder / "model").exists()
            return None
        return Result(load_file(folder / "model" / "model.safetensors"), read_journal(folder / "journal.csv"),
                      json.loads((folder / "metrics.json").read_text()))


@pytest.fixture(scope="module")
def work(model_folders: dict[str, tuple[Path, Path]], texts: list[str],
         tmp_path_factory: pytest.TempPathFactory) -> Work:
    demonstrations = [{"prompt": texts[number], "completion": texts[-number - 1], "split": "valid" if number % 4 == 0
                       else "train"} for number in range(32)]
    corpus = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts * 3))
    return Work(model_folders, {"sft": demonstrations, "rm": rankings(40), "ppo": texts[:8]}, corpus)


@pytest.fixture(scope="module")
def alone(work: Work, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result | None]:
    """What one process makes of each stage."""
    return {stage: work(stage, tmp_path_factory.mktemp(stage)) for stage in STAGES}


def assert_same(one: Result | None, other: Result | None, before: Path) -> None:
    """The same training up to rounding: weights apart by less than a hundredth of the way they have come.

    Not entry by entry: Adam makes whole steps of gradients that are nothing but rounding, such as those of key biases.
    """
    assert one is not None
    assert other is not None
    start = load_file(before / "model.safetensors")
    assert one.weights.keys() == other.weights.keys()
    for name, value in one.weights.items():
        if name in start and "bias" not in name:
            assert (other.weights[name] - value).norm() < 0.01 * (value - start[name]).norm(), name
    assert len(one.journal) == len(other.journal) > 3
    for row, second in zip(one.journal, other.journal, strict=True):
        for key, text in row.items():
            assert float(second[key]) == pytest.approx(float(text), rel=1e-3, abs=1e-5), key
    assert other.metrics == pytest.approx(one.metrics, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("shard", [False, True], ids=["whole", "sharded"])
def test_two_processes_train_what_one_does(work: Work, alone: dict[str, Result | None], stage: str, shard: bool,
                                           tmp_path: Path) -> None:
    assert_same(alone[stage], work(stage, tmp_path / "two", processes=2, shard=shard), work.policy)


@pytest.mark.parametrize("shard", [False, True], ids=["whole", "sharded"])
def test_passes_that_two_processes_keep_change_nothing(work: Work, alone: dict[str, Result | None], shard: bool,
                                                       tmp_path: Path) -> None:
    """One of the two that each has of a first update is kept."""
    assert_same(alone["ppo"], work("ppo", tmp_path / "two", processes=2, shard=shard, reuse_forward_passes=1), work.policy)


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_goes_on_with_another_number_of_processes(work: Work, alone: dict[str, Result | None], stage: str,
                                                        tmp_path: Path) -> None:
    work(stage, tmp_path / "many", processes=2, stop_after=1, shard=True)
    work(stage, tmp_path / "many", processes=3, stop_after=2)
    assert_same(alone[stage], work(stage, tmp_path / "many"), work.policy)


def test_a_sharded_policy_is_sampled_by_a_server(work: Work, tmp_path: Path) -> None:
    """Its embeddings are tied: the server is given both whole, from parts that lie in two processes."""
    with serving(work.policy) as server:
        one = work("ppo", tmp_path / "one", vllm_url=server.url)
        assert_same(one, work("ppo", tmp_path / "two", processes=2, shard=True, vllm_url=server.url), work.policy)
    assert one is not None
    assert len(one.journal) == 4
    assert all(0 < float(row["ppo/sampler_gap"]) < 1e-4 for row in one.journal)


def test_the_same_number_of_processes_gives_the_same_bytes(work: Work, tmp_path: Path) -> None:
    one = work("sft", tmp_path / "one", processes=2, dropout=0.2)
    work("sft", tmp_path / "other", TORCHRUN, dropout=0.2, stop_after=3)
    other = work("sft", tmp_path / "other", processes=2, dropout=0.2)
    assert one is not None
    assert other is not None
    assert all(torch.equal(value, other.weights[name]) for name, value in one.weights.items())
    assert one.journal == other.journal


def test_a_batch_that_cannot_be_shared_out_is_a_clear_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "size", lambda: 3)
    distributed.check_divides(6, "sft.batch_size")
    with pytest.raises(UserError, match=r"sft\.batch_size = 8: must be a multiple of 3, the number of processes"):
        distributed.check_divides(8, "sft.batch_size")
