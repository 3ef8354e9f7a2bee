"""A small training in several processes, for test_distributed.py.

    python -m tests.rlhf.training.train_in_processes '{...}'

The JSON has stage, policy and scorer (folders), rows, folder, params of the stage, and may have processes (number to
fork) and stop_after (a step after which the last process behaves as if it had received SIGTERM).
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rlhf.errors import Interrupted
from rlhf.params import PpoParams, RmParams, SftParams
from rlhf.ppo.run import train_ppo
from rlhf.reward_model import train_reward_model
from rlhf.sft import sft
from rlhf.training import distributed
from rlhf.training.checkpoint import Checkpoints, StopSignal

SEED = 5


def stop_after(step: int) -> None:
    """Makes the last process behave as if it received SIGTERM during this step."""
    original = Checkpoints.after_step

    def after_step(self: Checkpoints, number: int, state_of: Callable[[], dict[str, Any]]) -> None:
        StopSignal.requested = number == step and distributed.rank() == distributed.size() - 1
        original(self, number, state_of)

    setattr(Checkpoints, "after_step", after_step)  # noqa: B010


def record_shard_sizes(counts: list[tuple[int, int]]) -> None:
    """Records (number of weights, number of them in this process) of every model that is sharded."""
    original = distributed.shard

    def shard(model: Any) -> None:
        original(model)
        weights: list[Any] = list(model.parameters())
        counts.append((sum(item.numel() for item in weights),
                       sum((item.to_local() if distributed.is_dtensor(item) else item).numel() for item in weights)))

    setattr(distributed, "shard", shard)  # noqa: B010


def train(task: dict[str, Any]) -> dict[str, float]:
    folder, policy, rows, params = Path(task["folder"]), Path(task["policy"]), task["rows"], task["params"]
    if task["stage"] == "sft":
        return sft(SftParams(**params), rows, policy, SEED, folder, Path(task["corpus"]))
    if task["stage"] == "rm":
        demonstrations = [{"prompt": row["prompt"], "completion": row["completions"][0]} for row in rows[:9]]
        return train_reward_model(RmParams(**params), rows, demonstrations, policy, SEED, folder)[1]
    return train_ppo(PpoParams(**params), rows, policy, Path(task["scorer"]), SEED, folder,
                     corpus=Path(task["corpus"]))


def main() -> None:
    task = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    if task.get("processes", 1) > 1:
        distributed.fork(task["processes"])
    distributed.join()
    if "stop_after" in task:
        stop_after(task["stop_after"])
    counts: list[tuple[int, int]] = []
    record_shard_sizes(counts)
    try:
        metrics = train(task)
    except Interrupted:
        metrics = {}
    if task["params"].get("shard") and distributed.size() > 1:
        assert len(counts) == (4 if task["stage"] == "ppo" else 1)
        assert all(here < 0.6 * total for total, here in counts)
    if distributed.is_main():
        (Path(task["folder"]) / "metrics.json").write_text(json.dumps(metrics))
    distributed.leave()


if __name__ == "__main__":
    main()
