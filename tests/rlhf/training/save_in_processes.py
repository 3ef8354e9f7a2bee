"""Saves small models and their optimizers in several processes, for test_checkpoint.py; prints JSON.

    python -m tests.rlhf.training.save_in_processes '{...}'

The JSON has processes and runs, a list of what is done one after the other. A run has folder, shard, steps (how many
are made and saved) and may have architecture, width, blocks, vocabulary, and kill (main or other: who kills itself)
with moment (of the last save). The answer has what each run found.
"""

import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from rlhf.training import checkpoint, distributed, parts
from rlhf.training.checkpoint import Checkpoints
from rlhf.training.optim import adamw
from rlhf.training.state import State, weights

KINDS: dict[str, tuple[Any, Any, bool]] = {
    "gpt_neox": (GPTNeoXConfig, GPTNeoXForCausalLM, True), "llama": (LlamaConfig, LlamaForCausalLM, False),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, True)}


def new_model(task: dict[str, Any]) -> Any:
    torch.manual_seed(1)
    config, kind, tied = KINDS[task.get("architecture", "gpt_neox")]
    width = task.get("width", 24)
    return kind(config(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=task.get("blocks", 2),
                       num_attention_heads=2, num_key_value_heads=2, vocab_size=task.get("vocabulary", 33),
                       tie_word_embeddings=tied))


def make_step(model: Any, optimizer: torch.optim.Optimizer, step: int) -> None:
    """A step whose gradients are the same for any number of processes; the last parameter is never stepped, as in the
    warm-up of PPO's value model."""
    for place, item in enumerate(list(model.parameters())[:-1]):
        gradient = torch.randn(item.shape, generator=torch.Generator().manual_seed(100 * step + place))
        item.grad = distributed.shard_like(gradient, item)
    optimizer.step()


def digest_of(state: State) -> str:
    """A hash of all tensors, whole, by name."""
    digest = hashlib.sha256()
    for name, value in sorted(state.tensors.items()):
        digest.update(name.encode() + distributed.full_tensor(value).contiguous().numpy().tobytes())
    return digest.hexdigest()


def peak(reset: bool = False) -> int:
    """The largest resident memory of this process since the last reset, in bytes; 0 where the system does not tell."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError):
        return 0


def kill_at(moment: str) -> None:
    """This process kills itself when its next save comes to the moment."""
    def kill(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    if moment == "between files":
        setattr(parts, "sha256", kill)  # noqa: B010
    elif moment == "before the rename":
        setattr(checkpoint, "sync_folder", kill)  # noqa: B010
    elif moment == "before the JSON":
        setattr(checkpoint, "write_json", kill)  # noqa: B010
    else:
        setattr(Path, "replace", in_json(kill, Path.replace))  # noqa: B010


def in_json(kill: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    def replace(self: Path, target: Path) -> Any:
        return kill() if ".json" in self.name else original(self, target)
    return replace


def run(task: dict[str, Any]) -> dict[str, Any]:
    """What one run found: resumed (step, 0: none), digest of its state at the end, and sizes in bytes."""
    model = new_model(task)
    if task["shard"]:
        distributed.shard(model)
    optimizer = adamw(model, 1e-2)

    def state() -> State:
        found = State({})
        found.add("model", weights(model))
        found.add_optimizer("optimizer", optimizer)
        return found

    used = 0
    with Checkpoints(Path(task["folder"])) as checkpoints:
        saved = checkpoints.latest()
        if saved is not None:
            saved.read("model", weights(model))
            saved.read_optimizer("optimizer", optimizer)
        for step in range(1, task["steps"] + 1):
            make_step(model, optimizer, step)
            optimizer.zero_grad(set_to_none=True)
            if step == task["steps"] and task.get("kill") == ("main" if distributed.is_main() else "other"):
                checkpoints.wait()
                kill_at(task["moment"])
            before = peak(reset=True)
            checkpoints.save(step, state())
            checkpoints.wait()
            used = max(used, peak() - before) if before else 0
    tensors = state().tensors
    return {"resumed": saved.step if saved else 0, "digest": digest_of(state()), "peaks": distributed.all_gather(used),
            "files": len(list(Path(task["folder"]).glob("step-*/*.distcp"))),
            "bytes": sum(value.nbytes for value in tensors.values()),
            "largest": max(value.nbytes for value in tensors.values())}


def main() -> None:
    task = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    if task["processes"] > 1:
        distributed.fork(task["processes"])
    found = [run(item) for item in task["runs"]]
    if distributed.is_main():
        print(json.dumps(found), flush=True)
    distributed.leave()


if __name__ == "__main__":
    main()
