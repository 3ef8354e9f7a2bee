"""Every pair of options that touches memory or processes: two processes train what one does without them, or refuse."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.rlhf.test_reward_model import rankings

ROOT = Path(__file__).resolve().parents[3]
COMMON: dict[str, dict[str, Any]] = {
    "shard": {"shard": True},
    "micro_batch_size": {"micro_batch_size": 2},
    "micro_batch_tokens": {"micro_batch_tokens": 40},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "offload_activations": {"offload_activations": True},
    "cpu_offload": {"cpu_offload": True},
    "lora_rank": {"lora_rank": 4, "lr": 1e-2},
}
STAGES: dict[str, dict[str, Any]] = {
    "sft": {"epochs": 1, "batch_size": 6, "lr": 1e-3, "pretrain_mix": 0.3, "precision": "fp32"},
    "rm": {"epochs": 1, "batch_size": 6, "lr": 1e-3, "max_tokens": 60, "precision": "fp32", "max_prompts": 18},
    "ppo": {"episodes": 24, "batch_size": 12, "minibatch_size": 6, "micro_batch_size": 3, "inner_epochs": 1,
            "max_new_tokens": 8, "lr": 1e-3, "value_lr": 1e-3, "ptx_coef": 0.5, "ptx_batch_size": 5, "kl_limit": 0,
            "warmup_iterations": 0, "precision": "fp32"}}
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "sft": {**COMMON, "packing": {"packing": True}, "checkpoint": {"checkpoint": "valid_loss", "epochs": 2}},
    "rm": {**COMMON, "checkpoint": {"checkpoint": "valid_accuracy", "checks": 2}},
    "ppo": {**COMMON, "reuse_forward_passes": {"reuse_forward_passes": 1}, "frozen_on_cpu": {"frozen_on_cpu": True},
            "frozen_precision": {"frozen_precision": "bf16"}, "ema_decay": {"ema_decay": 0.5}}}
CHANGES_THE_RESULT = {"packing", "checkpoint", "ema_decay", "lora_rank"}  # the others change memory and time alone
REFUSED = {  # option: what it needs, or cannot be combined with
    "cpu_offload": "shard", "offload_activations": "gradient_checkpointing"}


def run(stage: str, folders: tuple[Path, Path], rows: Any, corpus: Path, out: Path, processes: int,
        sets: list[dict[str, Any]]) -> None:
    out.mkdir()
    task = {"stage": stage, "policy": str(folders[0]), "scorer": str(folders[1]), "rows": rows, "corpus": str(corpus),
            "folder": str(out), "processes": processes, "sets": sets}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                   "INSTRUCTFLOW_CHECKPOINT_SECONDS": "9999"}
    done = subprocess.run([sys.executable, "-m", "tests.rlhf.training.pairs_in_processes", json.dumps(task)], cwd=ROOT,
                          env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr


def refusal(pair: tuple[str, ...], params: dict[str, Any], stage: str) -> list[str]:
    """Parts of the line that refuses a pair; empty where it must work."""
    if params.get("tensor_parallel") and params.get("lora_rank"):
        return [f"{stage}.tensor_parallel", f"{stage}.lora_rank"]
    for option, needed in REFUSED.items():
        if option in pair and not params.get(needed):
            return [f"{stage}.{option}", f"{stage}.{needed}"]
    both = {"reuse_forward_passes", "micro_batch_tokens"}
    return [f"{stage}.{option}" for option in sorted(both)] if both <= set(pair) else []


def rows_of(stage: str, texts: list[str]) -> Any:
    demonstrations = [{"prompt": texts[number], "completion": texts[-number - 1],
                       "split": "valid" if number % 4 == 0 else "train"} for number in range(24)]
    return {"sft": demonstrations, "rm": rankings(24), "ppo": texts[:8]}[stage]


def compare(stage: str, pairs: list[tuple[str, ...]], always: dict[str, Any], folders: tuple[Path, Path], rows: Any,
            corpus: Path, place: Path) -> int:
    """Trains with each pair of options in two processes, `always` beside them, and compares with one process. Returns
    how many pairs worked; the others were refused as they must be."""
    options, base = OPTIONS[stage], STAGES[stage]
    sets = [base | dict(itertools.chain.from_iterable(options[name].items() for name in pair)) | always
            for pair in pairs]
    changing = [name for name in options if name in CHANGES_THE_RESULT]
    plain = [names for count in range(3) for names in itertools.combinations(changing, count)
             if any(set(names) <= set(pair) for pair in pairs)]
    run(stage, folders, rows, corpus, place / "one", 1,
        [dict(itertools.chain(base.items(), *(options[name].items() for name in names))) for names in plain])
    run(stage, folders, rows, corpus, place / "two", 2, sets)
    start = load_file(folders[0] / "model.safetensors")
    worked = 0
    for number, (pair, params) in enumerate(zip(pairs, sets, strict=True)):
        result = place / "two" / str(number)
        if expected := refusal(pair, params, stage):
            line = (result / "refused.txt").read_text()
            assert all(part in line for part in expected), (pair, line)
            continue
        assert not (result / "refused.txt").exists(), (pair, (result / "refused.txt").read_text())
        reference = tuple(name for name in changing if name in pair)
        one = load_file(place / "one" / str(plain.index(reference)) / "model" / "model.safetensors")
        two = load_file(result / "model" / "model.safetensors")
        assert one.keys() == two.keys(), pair
        for name, value in one.items():
            if name in start and "bias" not in name:
                change = (value - start[name]).norm()  # 0 of what LoRA leaves frozen
                assert (two[name] - value).norm() <= 0.01 * change, (pair, name)
        worked += 1
    return worked


@pytest.mark.parametrize("stage", STAGES)
def test_every_pair_works_as_one_process_does_or_is_refused(stage: str, model_folders: dict[str, tuple[Path, Path]],
                                                            texts: list[str], corpus: Path, tmp_path: Path) -> None:
    pairs: list[tuple[str, ...]] = list(itertools.combinations(OPTIONS[stage], 2))
    worked = compare(stage, pairs, {}, model_folders["gpt_neox"], rows_of(stage, texts), corpus, tmp_path)
    assert worked > len(pairs) / 2


@pytest.mark.parametrize("stage", STAGES)
def test_every_option_works_with_tensor_parallelism_or_is_refused(stage: str, four_heads: dict[str, tuple[Path, Path]],
                                                                  texts: list[str], corpus: Path, tmp_path: Path
                                                                  ) -> None:
    """On a Llama: two processes compute each pass together."""
    always = {"shard": True, "tensor_parallel": 2, "gradient_checkpointing": True}
    each: list[tuple[str, ...]] = [(name,) for name in OPTIONS[stage]]
    worked = compare(stage, each, always, four_heads["llama"], rows_of(stage, texts), corpus, tmp_path)
    assert worked == len(each) - 1  # lora_rank is refused


def test_a_pass_of_many_tokens_is_cut() -> None:
    """The micro-batches hold at most so many padded tokens, but for a row that is longer by itself."""
    from torch import nn

    from rlhf.training.micro_batches import micro_batches

    lengths = [5, 30, 7, 41, 7, 2]
    parts = [part for part, counts in micro_batches(nn.Linear(1, 1), lengths, 0, 40) if counts]
    assert sorted(index for part in parts for index in part) == list(range(6))
    assert [[lengths[index] for index in part] for part in parts] == [[2, 5, 7, 7], [30], [41]]
