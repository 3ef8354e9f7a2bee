"""Loads and saves models in shards in several processes, for test_load_sharded.py.

    python -m tests.rlhf.model.shards_in_processes '{...}'

The JSON has processes, out (a folder) and one of: pairs of a policy's and a reward model's folder, damaged (folders by
name), memory and tiny (folders of models).
"""

import filecmp
import json
import logging
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.errors import UserError
from rlhf.fast.decoder import decoder_for
from rlhf.model.load import Layout, load_policy, load_scorer, new_scorer, save_model
from rlhf.model.tokenizer import load_tokenizer
from rlhf.training import distributed


def whole(model: Any) -> dict[str, Tensor]:
    """All weights of a model, gathered."""
    return {name: distributed.full_tensor(value).detach().clone() for name, value in model.state_dict().items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor], name: str) -> None:
    assert one.keys() == other.keys(), name
    for key, value in one.items():
        assert value.dtype == other[key].dtype, (name, key)
        assert torch.equal(value, other[key]), (name, key)


def check_policy(folder: Path, out: Path) -> None:
    """Loaded in shards it has the weights, the ties, the buffers and the saved bytes of the model loaded whole."""
    alone, split = load_policy(folder), load_policy(folder, Layout(shard=True))
    name = type(alone).__name__
    assert distributed.sharded(split), name
    assert_equal(whole(alone), whole(split), name)
    buffers = dict(split.named_buffers())
    for key, value in alone.named_buffers():
        assert torch.equal(value, buffers[key]), (name, key)
    ties = [model.get_input_embeddings().weight is model.get_output_embeddings().weight for model in (alone, split)]
    assert ties[0] == ties[1], name
    decoders = [decoder_for(model, "fp32") for model in (alone, split)]
    if decoders[0] is not None and decoders[1] is not None:
        assert torch.equal(decoders[0].head[0], decoders[1].head[0]), name
        ids = torch.tensor([[5, 6, 7]])
        state = [one.hidden(ids, torch.arange(3).expand(1, 3), one.new_cache(1, 8), None, one.rope(8), None)
                 for one in decoders if one]
        assert torch.equal(*state), name
    for untie in (False, True):
        places = [out / f"{name}-{label}-{untie}" for label in ("whole", "split")]
        for model, place in zip((alone, split), places, strict=True):
            save_model(model, load_tokenizer(folder), place, untie)
        distributed.barrier()
        if distributed.is_main():
            files = sorted(path.name for path in places[0].iterdir())
            assert files == sorted(path.name for path in places[1].iterdir()), name
            differ = filecmp.cmpfiles(places[0], places[1], files, shallow=False)[1:]
            assert differ == ([], []), (name, untie, differ)


def check_scorers(policy: Path, scorer: Path) -> None:
    """Reward models and new heads."""
    alone, split = load_scorer(scorer), load_scorer(scorer, layout=Layout(shard=True))
    assert_equal(whole(alone), whole(split), str(scorer))
    fresh = [new_scorer(policy, 0, torch.Generator().manual_seed(4), Layout(shard=shard)) for shard in (False, True)]
    assert_equal(whole(fresh[0]), whole(fresh[1]), str(policy))
    narrow = load_scorer(scorer, layout=Layout(torch.bfloat16, shard=True))
    assert all(value.dtype == torch.bfloat16 for value in narrow.parameters())


def refusals(folders: dict[str, str]) -> dict[str, list[str]]:
    """What is said of each damaged folder, the same by all processes, whole or in shards."""
    found = {}
    for label, folder in folders.items():
        lines = []
        for shard in (False, True):
            try:
                load_policy(folder, Layout(shard=shard))
                lines.append("")
            except UserError as error:
                lines.append(str(error))
        assert len(set(distributed.all_gather(lines[1]))) == 1, label
        found[label] = lines
    return found


def check_precision(folder: Path) -> None:
    """In bf16 a sharded model's logits and gradients are those of autocast, up to bfloat16's rounding."""
    from rlhf.model.forward import next_token_log_probs

    ids = torch.randint(5, 300, (2, 12), generator=torch.Generator().manual_seed(2))
    alone, split = load_policy(folder), load_policy(folder, Layout(shard=True, precision="bf16"))
    exact = next_token_log_probs(alone, ids, "fp32")
    losses = [next_token_log_probs(model, ids, "bf16") for model in (alone, split) for _ in range(2)][1::2]
    rounding = (losses[0] - exact).abs().mean()
    assert rounding > 0, folder
    assert (losses[1] - exact).abs().mean() < 2 * rounding, folder
    (-losses[0].mean()).backward()
    distributed.backward(split, -losses[1].mean() / distributed.size())  # all processes have the same rows
    for (name, one), (_, other) in zip(alone.named_parameters(), split.named_parameters(), strict=True):
        if one.requires_grad and one.grad is not None and "bias" not in name:
            gradient = distributed.full_tensor(other.grad) if other.grad is not None else torch.zeros_like(one)
            assert gradient.dtype == torch.float32, name
            assert (gradient - one.grad).norm() < 0.1 * one.grad.norm(), (folder, name)


class Peak:
    """The most anonymous memory of this process while the block runs, above what it had before, bytes."""

    def __enter__(self) -> "Peak":
        self.before = self.bytes = resident()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()
        self.bytes -= self.before

    def _watch(self) -> None:
        while not self.ended.wait(0.001):
            self.bytes = max(self.bytes, resident())


def resident() -> int:
    """Memory of this process that is no file's, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon:")).split()[1])


def memory(folder: Path, out: Path) -> dict[str, float]:
    """Peak bytes of this process while it loads and saves a model in shards, and the bytes of the model."""
    with Peak() as loading:
        model = load_policy(folder, Layout(shard=True))
    with Peak() as saving:
        save_model(model, load_tokenizer(folder), out / "model")
    total = sum(value.numel() * value.element_size() for value in model.parameters())
    return {"load": loading.bytes, "save": saving.bytes, "model": total,
            "largest": max(value.numel() * value.element_size() for value in model.parameters())}


def main() -> None:
    task = json.loads(sys.argv[1])
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(1)
    if task["processes"] > 1:
        distributed.fork(task["processes"])
    out = Path(task["out"])
    result: Any = {}
    if "memory" in task:
        memory(Path(task["tiny"]), out / "tiny")  # what is imported and kept from then on
        result = memory(Path(task["memory"]), out)
    for policy, scorer in task.get("pairs", []):
        check_policy(Path(policy), out)
        check_scorers(Path(policy), Path(scorer))
        check_precision(Path(policy))
    if "damaged" in task:
        result = refusals(task["damaged"])
    result = distributed.all_gather(result)
    if distributed.is_main():
        (out / "result.json").write_text(json.dumps(result))
    distributed.leave()


if __name__ == "__main__":
    main()
