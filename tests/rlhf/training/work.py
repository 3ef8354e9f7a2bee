"""A small training in several processes, for tests/rlhf/training/test_distributed.py: python -m tests.rlhf.parallel_work '{...}'

The JSON has stage, policy, scorer (folders), rows, folder, and may have processes (forked), stop_after (a step after
which SIGTERM is taken to have come to the last process), and parameters of the stage.
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
    """As if the last process got SIGTERM in this step."""
    own = Checkpoints.after_step

    def after_step(self: Checkpoints, number: int, state_of: Callable[[], dict[str, Any]]) -> None:
        StopSignal.requested = number == step and distributed.rank() == distributed.size() - 1
        own(self, number, state_of)

    setattr(Checkpoints, "after_step", after_step)  # noqa: B010


def see_what_is_split(counts: list[tuple[int, int]]) -> None:
    """Notes how many weights a sharded model has and how many of them lie in this process."""
    own = distributed.shard

    def shard(model: Any) -> None:
        own(model)
        weights: list[Any] = list(model.parameters())
        counts.append((sum(item.numel() for item in weights),
                       sum((item.to_local() if distributed.is_dtensor(item) else item).numel() for item in weights)))

    setattr(distributed, "shard", shard)  # noqa: B010


def train(given: dict[str, Any]) -> dict[str, float]:
    folder, policy, rows, changes = Path(given["folder"]), Path(given["policy"]), given["rows"], given["params"]
    if given["stage"] == "sft":
        return sft(SftParams(**changes), rows, policy, SEED, folder, Path(given["corpus"]))
    if given["stage"] == "rm":
        demonstrations = [{"prompt": row["prompt"], "completion": row["completions"][0]} for row in rows[:9]]
        return train_reward_model(RmParams(**changes), rows, demonstrations, policy, SEED, folder)[1]
    return train_ppo(PpoParams(**changes), rows, policy, Path(given["scorer"]), SEED, folder,
                     corpus=Path(given["corpus"]))


def main() -> None:
    given = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    if given.get("processes", 1) > 1:
        distributed.fork(given["processes"])
    distributed.join()
    if "stop_after" in given:
        stop_after(given["stop_after"])
    counts: list[tuple[int, int]] = []
    see_what_is_split(counts)
    try:
        metrics = train(given)
    except Interrupted:
        metrics = {}
    if given["params"].get("shard") and distributed.size() > 1:
        assert len(counts) == (4 if given["stage"] == "ppo" else 1)
        assert all(here < 0.6 * whole for whole, here in counts)
    if distributed.is_main():
        (Path(given["folder"]) / "metrics.json").write_text(json.dumps(metrics))
    distributed.leave()


if __name__ == "__main__":
    main()
