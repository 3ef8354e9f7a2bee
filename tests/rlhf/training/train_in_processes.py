"""A small training in several processes, for test_distributed.py.

    python -m tests.rlhf.training.train_in_processes '{...}'

The JSON has stage, policy and scorer (folders), rows, folder, params of the stage, and may have processes (number to
fork), stop_after (a step after which the last process behaves as if it had received SIGTERM) and pass_tokens (how many
padded tokens a pass of the reward model has at most).
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import rlhf.model.scoring
from rlhf.errors import Interrupted
from rlhf.model.load import load_scorer
from rlhf.model.scoring import score_sequences
from rlhf.params import PpoParams, RmParams, SftParams
from rlhf.ppo.run import train_ppo
from rlhf.reward_model import train_reward_model
from rlhf.sft import sft
from rlhf.training import distributed
from rlhf.training.checkpoint import Checkpoints, StopSignal
from rlhf.training.state import State

SEED = 5


def stop_after(step: int) -> None:
    """Makes the last process behave as if it received SIGTERM during this step."""
    original = Checkpoints.after_step

    def after_step(self: Checkpoints, number: int, state_of: Callable[[], State]) -> None:
        StopSignal.requested = number == step and distributed.rank() == distributed.size() - 1
        original(self, number, state_of)

    setattr(Checkpoints, "after_step", after_step)  # noqa: B010


def record_shard_sizes(counts: list[tuple[int, int]], degree: int) -> None:
    """Records (number of weights, number of them in this process) of every model that is sharded, and checks that
    groups of `degree` processes compute it together."""
    original = distributed.shard

    def shard(model: Any, *options: Any) -> None:
        original(model, *options)
        assert degree == 1 or in_groups(model, degree)
        weights: list[Any] = list(model.parameters())
        counts.append((sum(item.numel() for item in weights),
                       sum((item.to_local() if distributed.is_dtensor(item) else item).numel() for item in weights)))

    setattr(distributed, "shard", shard)  # noqa: B010


def in_groups(model: Any, degree: int) -> bool:
    """Whether the processes of a group each compute with their own part of each block's products."""
    split = [item for name, item in model.named_parameters() if "_proj.weight" in name]
    return bool(split) and all(
        item.device_mesh.mesh_dim_names == ("data", "tensor") and item.device_mesh.size(1) == degree
        and item.placements[1].is_shard() for item in split)


def train(task: dict[str, Any]) -> dict[str, float]:
    if task["stage"] == "score":
        return score(Path(task["scorer"]))
    folder, policy, rows, params = Path(task["folder"]), Path(task["policy"]), task["rows"], task["params"]
    if task["stage"] == "sft":
        return sft(SftParams(**params), rows, policy, SEED, folder, Path(task["corpus"]))
    if task["stage"] == "rm":
        demonstrations = [{"prompt": row["prompt"], "completion": row["completions"][0]} for row in rows[:9]]
        return train_reward_model(RmParams(**params), rows, demonstrations, policy, SEED, folder)[1]
    return train_ppo(PpoParams(**params), rows, policy, Path(task["scorer"]), SEED, folder,
                     corpus=Path(task["corpus"]))


def score(folder: Path) -> dict[str, float]:
    """Scores sequences that are longer in each next process, by a whole reward model and by a sharded one; returns the
    largest difference and the number of passes that the first process made for itself."""
    model = load_scorer(folder)
    mine = [[7] * length for length in range(3 + 8 * distributed.rank(), 9 + 8 * distributed.rank())]
    whole = score_sequences(model, mine, 0, "fp32")
    distributed.shard(model)
    counted: list[bool] = []
    original = distributed.equal_passes

    def equal_passes(*arguments: Any) -> Any:
        for batch, counts in original(*arguments):
            counted.append(counts)
            yield batch, counts

    setattr(distributed, "equal_passes", equal_passes)  # noqa: B010
    again = score_sequences(model, mine, 0, "fp32")
    found = distributed.all_gather((max(abs(a - b) for a, b in zip(whole, again, strict=True)), counted))
    first, last = found[0][1], found[-1][1]
    return {"difference": max(item for item, _ in found), "own": float(sum(first)), "all": float(len(first)),
            "others": float(sum(last))}


def main() -> None:
    task = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    if task.get("processes", 1) > 1:
        distributed.fork(task["processes"])
    distributed.join()
    if "pass_tokens" in task:
        few = partial(rlhf.model.scoring.pass_batches, max_tokens=task["pass_tokens"])
        setattr(rlhf.model.scoring, "pass_batches", few)  # noqa: B010
    if "stop_after" in task:
        stop_after(task["stop_after"])
    counts: list[tuple[int, int]] = []
    record_shard_sizes(counts, task["params"].get("tensor_parallel", 1))
    try:
        metrics = train(task)
    except Interrupted:
        metrics = {}
    if task["params"].get("shard") and distributed.size() > 1:
        adapted = bool(task["params"].get("lora_rank"))  # then the policy is the reference too
        assert len(counts) == {"ppo": 3 if adapted else 4}.get(task["stage"], 1)
        assert all(here < 0.6 * total for total, here in counts)
    if distributed.is_main():
        (Path(task["folder"]) / "metrics.json").write_text(json.dumps(metrics))
    distributed.leave()


if __name__ == "__main__":
    main()
